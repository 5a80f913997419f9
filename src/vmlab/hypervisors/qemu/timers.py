"""Timers of a guest that QEMU loads and does not arm: written once more, so that they strike.

QEMU's riscv keeps the deadlines of its timers in the state of a machine (`stimecmp` of the Sstc
extension in each hart, `mtimecmp` in the ACLINT) but arms the QEMUTimer behind each only when the
guest writes its deadline (target/riscv/time_helper.c, hw/intc/riscv_aclint.c). A hart that waits
for its next timer interrupt when it is saved waits for ever when it is loaded. QEMU 10.2 saves the
QEMUTimers (its commits 09f89ccc9763 and b0daaa172a1c); writing a deadline that is there already
changes nothing then.

The decrementer of a ppc64le guest is lost as well, and before QEMU 8.2 (its commit 578912ad7312)
there is no way to write it: what gdbstub stores into the SPR does not reach the timer. Such guests
are not loaded at all.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from vmlab.hypervisors.monitored import readback
from vmlab.hypervisors.qemu import readback as qemu_readback
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.gdbstub import GdbStub, gdbstub
from vmlab.machine.architecture import Architecture

_STIMECMP: Final = (0x14D, 0x24D)
"""CSRs stimecmp and vstimecmp (RISC-V Sstc extension, 1.0)."""
_CSRS: Final = "riscv-csr.xml"
_KNOWN: Final = ("mstatus", 0x300)
"""A CSR that every hart has: where it is tells where the others are."""
_MTIMECMP: Final = 0x200_4000
_SOCKET_STRIDE: Final = 0x1_0000
"""Where the first socket's mtimecmp registers are, and how far on the next one's (QEMU's
hw/riscv/virt.c: VIRT_CLINT; each NUMA node is a socket)."""


DECREMENTER_SAVED: Final = (8, 2)
"""The first QEMU that saves and arms the decrementer."""
WHY_NOT: Final = "QEMU before 8.2 loads a pseries guest without its decrementer, and it hangs"


def survive(architecture: Architecture, version: tuple[int, ...], accelerator: str) -> bool:
    """Whether a guest's timers go on in a process that loads its state."""
    lost = architecture is Architecture.PPC64LE and accelerator == "tcg"
    return not lost or version >= DECREMENTER_SAVED


async def rearm(emulator: Emulator, architecture: Architecture) -> None:
    """Arm the timers of a process that has just loaded its state and stands still.

    Raises:
        OperationFailed: QEMU does not let them be written.
    """
    if (
        architecture is not Architecture.RISCV64
        or await qemu_readback.accelerator(emulator) != "tcg"
    ):
        # The others' timers are armed by QEMU, and those of KVM by the kernel.
        return
    vcpus = await readback.vcpus(emulator)
    async with gdbstub(emulator) as stub:
        await _rearm_harts(stub)
        await _rearm_aclint(stub, [vcpu.node or 0 for vcpu in vcpus])


async def _rearm_harts(stub: GdbStub) -> None:
    """Write each hart's supervisor deadlines, where it has any."""
    name, number = _KNOWN
    first = (await stub.describe(_CSRS))[name] - number
    for hart in await stub.threads():
        await stub.choose(hart)
        for csr in _STIMECMP:
            deadline = await stub.read_register(first + csr)
            if deadline is not None:
                await stub.write_register(first + csr, deadline)


async def _rearm_aclint(stub: GdbStub, nodes: list[int]) -> None:
    """Write the machine-level deadline of each hart, given the NUMA node of each."""
    await stub.physical(True)
    before: Counter[int] = Counter()
    for node in nodes:
        address = _MTIMECMP + node * _SOCKET_STRIDE + 8 * before[node]
        before[node] += 1
        await stub.write_word(address, await stub.read_word(address))
    await stub.physical(False)

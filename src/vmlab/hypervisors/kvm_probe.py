"""Tries whether KVM runs a guest: a few instructions that every kernel needs, in a few ms.

A script of its own, standard library only, run in a process of its own by
`vmlab.hypervisors.accelerators`: a KVM that hangs hangs that process. It prints one JSON object:
the last step that was reached, and what came back. Follows the Linux kernel's "The Definitive KVM
API Documentation" (virt/kvm/api.rst) and <linux/kvm.h>; the guest, AMD64 Architecture
Programmer's Manual, volume 2 (long mode, paging, interrupt gates).

On x86-64 the guest runs in long mode with paging: SSE, a locked 16-byte exchange, a trap to a
handler and back, a loop, two port writes. A KVM that lacks hardware underneath (one nested in
another hypervisor) may emulate some of these, slowly, or none: that boots no kernel. On other
hosts a virtual machine and a vCPU are made, and nothing is run.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import platform
import signal
import struct
import sys
import time
from contextlib import ExitStack

# <linux/kvm.h>: _IO, _IOR, _IOW and _IOWR of type 0xAE.
GET_API_VERSION = 0xAE00
CREATE_VM = 0xAE01
GET_VCPU_MMAP_SIZE = 0xAE04
CREATE_VCPU = 0xAE41
SET_TSS_ADDR = 0xAE47
RUN = 0xAE80
SET_USER_MEMORY_REGION = 0x4020AE46
SET_REGS = 0x4090AE82
GET_SREGS = 0x8138AE83
SET_SREGS = 0x4138AE84
GET_SUPPORTED_CPUID = 0xC008AE05
SET_CPUID2 = 0x4008AE90

EXIT_IO = 2
EXIT_INTR = 10
EXIT_NAMES = {
    5: "halt",
    8: "shutdown (triple fault)",
    9: "failed entry",
    17: "internal error",
}

API_VERSION = 12
"""The only one there is ("Applications should refuse to run if ... any other value")."""

MEMORY = 2 << 20
TRAPPED, FINISHED = [0xF1, 0x33], [0xF4, 0x4F]
"""The writes of the guest: port, value."""

# Where things are in the guest's memory.
PML4, PDPT, PD, PT, GDT, TSS, IDT = range(0x1000, 0x8000, 0x1000)
CODE, FAULT_HANDLER, TRAP_HANDLER, STACK = 0x10000, 0x13000, 0x12000, 0x80000
DATA = 0x100000
DATA_ADDRESS = 0x200000
"""Linear address of DATA: through the second entry of PD, and PT."""

GUEST = (
    b"\x0f\x57\xc0"  # xorps xmm0, xmm0
    + b"\xbe"
    + struct.pack("<I", DATA_ADDRESS)  # mov esi, DATA_ADDRESS
    + b"\x31\xc0\x31\xd2\x31\xdb\x31\xc9"  # eax = edx = ebx = ecx = 0
    b"\xf0\x48\x0f\xc7\x0e"  # lock cmpxchg16b [rsi]
    b"\xcc"  # int3, to TRAP_HANDLER and back
    b"\xb9\x40\x0d\x03\x00"  # mov ecx, 200000
    b"\xff\xc9\x75\xfc"  # 1: dec ecx; jnz 1b
    b"\xb0\x4f\xe6\xf4"  # out 0xf4, 0x4f
    b"\xf4"  # hlt
)
TRAP = b"\xb0\x33\xe6\xf1\x48\xcf"  # out 0xf1, 0x33; iretq
FAULT = b"\xb0\xee\xe6\xf4\xf4"  # out 0xf4, 0xee; hlt

_LIBC = ctypes.CDLL(None, use_errno=True)


def build_memory(memory: mmap.mmap) -> None:
    """Write page tables, descriptors, handlers and the program."""

    def quads(at: int, *values: int) -> None:
        struct.pack_into(f"<{len(values)}Q", memory, at, *values)

    def gate(vector: int, handler: int) -> None:
        # A present 64-bit interrupt gate in the code segment.
        struct.pack_into(
            "<HHBBHII", memory, IDT + 16 * vector, handler & 0xFFFF, 8, 0, 0x8E, handler >> 16, 0, 0
        )

    present_writable_user = 0x7
    quads(PML4, PDPT | present_writable_user)
    quads(PDPT, PD | present_writable_user)
    large_page = 0x80
    quads(PD, present_writable_user | large_page, PT | present_writable_user)
    quads(PT, DATA | present_writable_user)
    # Null, 64-bit code, data; the TSS of 16 bytes.
    quads(GDT, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0, 0x0000890060000067, 0)
    for vector in range(32):
        gate(vector, FAULT_HANDLER)
    gate(3, TRAP_HANDLER)
    for at, code in ((CODE, GUEST), (TRAP_HANDLER, TRAP), (FAULT_HANDLER, FAULT)):
        memory[at : at + len(code)] = code


def set_registers(vcpu: int) -> None:
    """Put the vCPU into long mode, at CODE."""

    def segment(
        base: int, limit: int, selector: int, kind: int, *, s: int, db: int, long: int, g: int
    ) -> bytes:
        # struct kvm_segment: ..., type, present, dpl, db, s, l, g, avl, unusable, padding
        return struct.pack("<QIH10B", base, limit, selector, kind, 1, 0, db, s, long, g, 0, 0, 0)

    special = bytearray(0x138)  # struct kvm_sregs
    fcntl.ioctl(vcpu, GET_SREGS, special, True)
    code = segment(0, 0xFFFFFFFF, 0x08, 11, s=1, db=0, long=1, g=1)
    data = segment(0, 0xFFFFFFFF, 0x10, 3, s=1, db=1, long=0, g=1)
    special[0:24] = code
    for position in range(1, 6):  # ds, es, fs, gs, ss
        special[24 * position : 24 * position + 24] = data
    special[144:168] = segment(TSS, 0x67, 0x28, 11, s=0, db=0, long=0, g=0)
    struct.pack_into("<QH", special, 192, GDT, 55)
    struct.pack_into("<QH", special, 208, IDT, 511)
    cr0, cr4, efer = 0x80050033, 0x620, 0xD01  # paging and protection; PAE, SSE; LME, LMA, NXE
    struct.pack_into("<6Q", special, 224, cr0, 0, PML4, cr4, 0, efer)
    fcntl.ioctl(vcpu, SET_SREGS, bytes(special))
    general = [0] * 18  # struct kvm_regs: rsp is the 7th, rip the 17th, rflags the 18th
    general[6], general[16], general[17] = STACK, CODE, 2
    fcntl.ioctl(vcpu, SET_REGS, struct.pack("<18Q", *general))


def copy_cpuid(system: int, vcpu: int) -> None:
    """Give the vCPU all that the host's has."""
    entries = 256
    table = bytearray(struct.pack("<II", entries, 0) + bytes(40 * entries))
    fcntl.ioctl(system, GET_SUPPORTED_CPUID, table, True)
    fcntl.ioctl(vcpu, SET_CPUID2, table, True)


def run(vcpu: int, shared: mmap.mmap, seconds: float) -> tuple[list[list[int]], str]:
    """Run the vCPU: what it wrote to ports, and why it stopped ("" if it wrote FINISHED)."""
    writes: list[list[int]] = []
    deadline = time.monotonic() + seconds
    # The signal makes KVM_RUN return; its handler has nothing to do.
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.01)
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.ioctl(vcpu, RUN, 0)
            except InterruptedError:
                continue
            (reason,) = struct.unpack_from("<I", shared, 8)
            if reason == EXIT_INTR:
                continue
            if reason != EXIT_IO:
                return writes, EXIT_NAMES.get(reason, f"exit {reason}")
            port, _count, offset = struct.unpack_from("<HIQ", shared, 34)
            writes.append([port, shared[offset]])
            if port == FINISHED[0]:
                return writes, ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return writes, "time ran out"


def probe(path: str, architecture: str, seconds: float) -> dict[str, object]:
    """What KVM does when it is asked to run the guest.

    Args:
        path: Of the device.
        architecture: The host's, as `uname -m` names it.
        seconds: That the guest is given.

    Returns:
        step: "open", "version", "create-vm", "create-vcpu" or "run", the last one reached;
        errno: why that failed, if it did; version; writes, exit and ms of the run.
    """
    step = "open"
    with ExitStack() as stack:

        def keep(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        try:
            system = keep(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            step = "version"
            version = fcntl.ioctl(system, GET_API_VERSION, 0)
            if version != API_VERSION:
                return {"step": step, "version": version}
            step = "create-vm"
            machine = keep(fcntl.ioctl(system, CREATE_VM, 0))
            if architecture != "x86_64":
                step = "create-vcpu"
                keep(fcntl.ioctl(machine, CREATE_VCPU, 0))
                return {"step": step}
            # Takes its argument by value, and one too large for fcntl.ioctl.
            _LIBC.ioctl(machine, ctypes.c_ulong(SET_TSS_ADDR), ctypes.c_ulong(0xFFFBD000))
            memory = mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            stack.callback(memory.close)
            build_memory(memory)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            fcntl.ioctl(
                machine,
                SET_USER_MEMORY_REGION,
                struct.pack("<IIQQQ", 0, 0, 0, MEMORY, address),
            )
            step = "create-vcpu"
            vcpu = keep(fcntl.ioctl(machine, CREATE_VCPU, 0))
            copy_cpuid(system, vcpu)
            set_registers(vcpu)
            step = "run"
            shared = mmap.mmap(vcpu, fcntl.ioctl(system, GET_VCPU_MMAP_SIZE, 0))
            stack.callback(shared.close)
            began = time.perf_counter()
            writes, reason = run(vcpu, shared, seconds)
            milliseconds = (time.perf_counter() - began) * 1e3
            return {"step": step, "writes": writes, "exit": reason, "ms": milliseconds}
        except OSError as error:
            return {"step": step, "errno": error.errno}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], platform.machine(), float(sys.argv[2]))))

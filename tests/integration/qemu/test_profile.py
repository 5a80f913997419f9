"""The suite's profile of QEMU: its guest boots and answers each question out of its own view."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from vmlab.conformance import qemu_profile
from vmlab.conformance.agent_probe import AgentProbe, memory_of_smbios, parse_cpus
from vmlab.conformance.probe import GuestCannotTell
from vmlab.conformance.qemu_profile import corrupt
from vmlab.hypervisors.qemu.hypervisor import FAULTS
from vmlab.machine.architecture import Architecture, host_architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import CorruptSnapshot, InvalidSpec, OperationFailed
from vmlab.machine.faults import FaultKind
from vmlab.machine.sizes import MIB
from vmlab.machine.states import MachineState


def test_memory_is_the_sum_of_the_modules_in_the_smbios_table() -> None:
    def module(size: int) -> bytes:
        return bytes([17, 0x1C, 0, 0]) + bytes(8) + size.to_bytes(2, "little") + bytes(14)

    other = bytes([1, 8, 0, 0]) + bytes(4) + b"QEMU\0more\0\0"
    table = other + module(128) + b"DIMM 0\0\0" + module(0xFFFF) + b"\0\0" + module(64) + b"\0\0"
    assert memory_of_smbios(table) == 192 * MIB
    for nothing in (b"", other, b"\x11\x00\x00\x00", bytes([17, 4, 0, 0])):
        with pytest.raises(GuestCannotTell):
            memory_of_smbios(nothing)


def test_lists_of_processors_are_read() -> None:
    assert parse_cpus("0-2,5\n") == (0, 1, 2, 5)
    assert parse_cpus("") == ()


def test_profile_is_that_of_the_architecture_in_the_options(profile_of: Any) -> None:
    profile = profile_of(Architecture.X86_64)
    other = profile.variant({"architecture": "riscv64"})
    assert other.spec.architecture is Architecture.RISCV64
    with pytest.raises(InvalidSpec, match="architecture"):
        profile.variant({"architecture": "z80"})


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_guest_of_the_profile_answers_every_question_that_it_can(
    bench: Any, profile_of: Any
) -> None:
    profile = profile_of(Architecture.X86_64)
    assert Capability.FORK in profile.must_declare

    async def test() -> None:
        machine = await bench.qemu.create(profile.spec)
        await machine.start()
        probe = AgentProbe(machine)
        assert await probe.vcpus() == 1
        assert await probe.memory() == 192 * MIB
        assert await probe.architecture() == "x86_64"
        assert {(disk.name, disk.size) for disk in await probe.disks()} == {
            ("data", 64 * MIB),
            ("extra", 32 * MIB),
        }
        info = await machine.info()
        assert [(nic.name, nic.mac, nic.link) for nic in await probe.nics()] == [
            ("net", info.nics[0].mac, True)
        ]
        assert await probe.read_memory(0, 3) == b"\0\0\0"
        await probe.write_memory(2, b"ab")
        assert await probe.read_memory(1, 4) == b"\0ab\0"
        await probe.write_disk("data", 1000, b"written")
        await probe.flush("data")
        assert await probe.read_disk("data", 999, 9) == b"\0written\0"
        with pytest.raises(OperationFailed, match="no disk 'none'"):
            await probe.read_disk("none", 0, 1)
        assert await probe.ticks() > 0
        assert 64 * MIB < await probe.memory_left() < 192 * MIB
        (node,) = await probe.nodes()
        assert (node.cpus, node.memory >= 192 * MIB) == ((0,), True)
        assert await probe.pinning() == {0: tuple(sorted(os.sched_getaffinity(0)))}
        await machine.pin({0: (min(os.sched_getaffinity(0)),)})
        assert await probe.pinning() == {0: (min(os.sched_getaffinity(0)),)}
        assert await probe.clock() > 1e9
        assert len(await probe.entropy()) == 16
        await probe.print("hello from the guest")
        console = await machine.console()
        async with asyncio.timeout(150):
            # The guest has given it to its UART, which takes its time and tells nobody.
            while b"hello from the guest" not in await console.log():  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.05)
        assert await probe.read_file("/proc/version")
        with pytest.raises(OperationFailed, match="failed in the guest with status"):
            await probe.read_file("/none")
        with pytest.raises(GuestCannotTell, match="nobody has told it"):
            await probe.hostname()
        assert await probe.typed() == b""
        assert await probe.pressed() == ()
        assert await probe.received("net") == []
        await probe.ignore_powerdown(True)
        await probe.ignore_powerdown(False)
        taken = await machine.snapshot("one")
        await corrupt(bench.qemu, machine, taken)
        with pytest.raises(CorruptSnapshot):
            await machine.restore("one")
        await probe.panic("on purpose")
        async with asyncio.timeout(300):
            async for event in bench.qemu.subscribe(0):
                if event.data.get("to") == "failed":
                    break
        assert b"on purpose" in await (await machine.console()).log()
        await machine.start()
        await probe.poweroff()
        async with asyncio.timeout(300):
            async for event in bench.qemu.subscribe(0):
                if event.data.get("to") == "stopped":
                    break
        assert machine.state is MachineState.STOPPED

    bench.run(test(), 1200)


@pytest.mark.boots
def test_profile_is_made_for_the_host_when_it_is_asked_for(
    profile_of: Any,
) -> None:
    assert Capability.HOTPLUG_NIC not in profile_of(Architecture.RISCV64).must_declare
    pseries = profile_of(Architecture.PPC64LE)
    assert Capability.FORK not in pseries.must_declare
    assert all(memory % (256 * MIB) == 0 for _, memory in pseries.sizes)
    assert pseries.spec.memory.size == pseries.sizes[0][1]
    profile = profile_of(host_architecture() or Architecture.X86_64)
    assert set(profile.faultless) == set(FaultKind) - FAULTS
    assert qemu_profile.profile.hypervisor == "qemu"
    with pytest.raises(AttributeError):
        qemu_profile.nothing  # noqa: B018 (looked up on purpose)

"""Broken QEMU drivers are caught by the suite, each by the check that is there for it.

Each is the driver with one thing wrong, run on a real guest, and only by the check that has to
find it: the whole suite on each would take hours.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest

from vmlab.conformance.registry import select
from vmlab.conformance.runner import Subject, run_check
from vmlab.hypervisors.base import DiskInfo, NicInfo, Probe
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.qemu import QemuHypervisor, provider
from vmlab.hypervisors.qemu.disks import DiskFile
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import Layout
from vmlab.hypervisors.qemu.machine import QemuMachine
from vmlab.hypervisors.qemu.snapshots import Saved
from vmlab.hypervisors.qmp import QmpEvent
from vmlab.machine.architecture import Architecture
from vmlab.machine.faults import Fault, PowerCut
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState

pytestmark = [pytest.mark.boots, pytest.mark.slow]


class MissesEvents(QemuMachine):
    """Ignores what QEMU tells of a guest that ended by itself."""

    def _on_event(self, number: int, event: QmpEvent) -> None:
        if event.name not in {"SHUTDOWN", "GUEST_PANICKED"}:
            super()._on_event(number, event)


class MissesPanics(QemuMachine):
    """Takes a guest that panicked for one that powered down."""

    def _on_event(self, number: int, event: QmpEvent) -> None:
        if event.name == "GUEST_PANICKED":
            event = QmpEvent("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, event.time)
        super()._on_event(number, event)


class KillsTheWrongProcess(QemuMachine):
    """Ends the process of another machine of its owner's as well as its own."""

    async def _do_delete(self, operation: Operation) -> None:
        for other in await self.qemu.list():
            assert isinstance(other, QemuMachine)
            if other is not self and other.emulator is not None:
                with suppress(ProcessLookupError):
                    os.kill(other.emulator.process.pid, signal.SIGKILL)
                break
        await super()._do_delete(operation)


class LeavesTheProcess(QemuMachine):
    """Forgets a machine whose process runs on."""

    async def discard(self, emulator: Emulator) -> None:
        await emulator.release()
        if self.emulator is emulator:
            # Its console is not at its end, and would be waited for.
            for line in self._lines.values():
                await line.disconnect()
            await self.detach()


class ReportsADiskThatIsNotThere(QemuMachine):
    """Says that a disk was plugged which the guest never saw."""

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        self.begin()
        return DiskInfo(name=disk.name, size=disk.size or 0, bus=disk.bus)


class ReportsANicThatIsNotThere(QemuMachine):
    """Says that a NIC was plugged which the guest never saw."""

    async def _do_plug_nic(self, operation: Operation, nic: Nic) -> NicInfo:
        self.begin()
        return NicInfo(name=nic.name, network=nic.network, mac="52:54:00:00:00:01")


class OnlySaysThatItPauses(QemuMachine):
    """Lets the guest run on while the machine is called paused."""

    async def _do_pause(self, operation: Operation) -> None:
        self.begin()

    async def _observe(self) -> MachineState:
        paused = self.state is MachineState.PAUSED
        return MachineState.PAUSED if paused else await super()._observe()


class BootsInsteadOfRestoring(QemuMachine):
    """Starts a machine anew where its memory should come back."""

    async def _take_over(self, saved: Saved, disks: list[Any], emulator: Emulator | None) -> None:
        await super()._take_over(saved, disks, emulator)
        assert self.emulator is not None
        await self.emulator.execute("system_reset")


class SqueezesNobody(QemuMachine):
    """Takes an order to leave a guest less memory, and does not."""

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        self.begin()
        return "nothing"

    async def _do_clear_fault(self, operation: Operation, fault: str) -> None:
        self.begin()


class CutsNoWire(SqueezesNobody):
    """Says that a wire is cut, and lets its packets through."""


class KeepsWhatWasNotFlushed(QemuMachine):
    """Ends a machine's process where its disks should lose their power."""

    async def break_device(
        self, emulator: Emulator, identity: str, fault: Fault
    ) -> Callable[[], Awaitable[None]] | None:
        if isinstance(fault, PowerCut):
            return None
        return await super().break_device(emulator, identity, fault)


class KeepsTheAddress(QemuMachine):
    """Makes copies that go on using the addresses of what they are copies of."""

    async def _make_copy(self, layout: Layout, disks: tuple[DiskFile, ...]) -> None:
        await super()._make_copy(layout, disks)
        self.layout = layout


class ForgetsTheConsole(QemuMachine):
    """Begins the console's log anew at each start."""

    async def _do_start(self, operation: Operation) -> None:
        for log in self.directory.glob("console-*.log"):
            log.unlink()
        await super()._do_start(operation)


class PinsNothing(QemuMachine):
    """Says that vCPUs are bound, and lets them float."""

    async def apply_pinning(self, pinning: Mapping[int, tuple[int, ...]]) -> None:
        return


MUTANTS: dict[type[QemuMachine], str] = {
    MissesEvents: "stop.by-guest",
    MissesPanics: "crash.panic",
    KillsTheWrongProcess: "delete.force",
    LeavesTheProcess: "delete.force",
    ReportsADiskThatIsNotThere: "change.hotplug-disk",
    ReportsANicThatIsNotThere: "change.hotplug-nic",
    OnlySaysThatItPauses: "pause.stands-still",
    BootsInsteadOfRestoring: "snapshot.memory-returns",
    SqueezesNobody: "fault.guest",
    CutsNoWire: "fault.network",
    KeepsWhatWasNotFlushed: "fault.machine",
    KeepsTheAddress: "fork.identity",
    ForgetsTheConsole: "console.log",
    PinsNothing: "configuration.pinning",
}
"""Each broken driver, and the check that finds it."""


class BrokenProvider:
    """QEMU with machines of a broken kind."""

    name = "qemu"

    def __init__(self, kind: type[QemuMachine]) -> None:
        self._kind = kind

    def probe(self) -> Probe:
        return provider.probe()

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> QemuHypervisor:
        kind = self._kind

        class Broken(QemuHypervisor):
            def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> QemuMachine:
                return kind(self, id_, spec, state)

        return Broken(owner, only=Architecture.X86_64)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MUTANTS, ids=lambda kind: kind.__name__)
def test_broken_driver_is_caught(subject_of: Any, kind: type[QemuMachine]) -> None:
    sound: Subject = subject_of(Architecture.X86_64)
    # What never comes is not waited for as long as what comes late on a busy host.
    profile = sound.profile.with_changes(slack=30.0)
    (check,) = select([MUTANTS[kind]])
    result = run_check(check, Subject(BrokenProvider(kind), profile))
    expected = "audit.processes" if kind is LeavesTheProcess else check.id
    assert expected in result.found, f"{kind.__doc__} Found: {result.found} {result.reason}"

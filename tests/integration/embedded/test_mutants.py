"""Broken drivers of the engine are caught by the suite, each by the check that is there for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from vmlab.conformance.registry import select
from vmlab.conformance.runner import Subject, run_check
from vmlab.hypervisors.base import DiskInfo, Probe
from vmlab.hypervisors.embedded import EmbeddedHypervisor, provider
from vmlab.hypervisors.embedded.machine import EmbeddedMachine, EngineProcess
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.qmp import QmpEvent
from vmlab.machine.faults import At, Fault, PowerCut
from vmlab.machine.spec import Disk, MachineSpec
from vmlab.machine.states import MachineState

pytestmark = [pytest.mark.boots, pytest.mark.slow]


class MissesEvents(EmbeddedMachine):
    """Ignores what the engine tells of a guest that ended by itself."""

    def _on_event(self, number: int, event: QmpEvent) -> None:
        if event.name not in {"SHUTDOWN", "GUEST_PANICKED"}:
            super()._on_event(number, event)


class LeavesTheProcess(EmbeddedMachine):
    """Forgets a machine whose process runs on."""

    async def discard(self, emulator: EngineProcess) -> None:
        await emulator.release()
        if self.emulator is emulator:
            # Its console is not at its end, and would be waited for.
            for line in self._lines.values():
                await line.disconnect()
            await self.detach()


class ReportsADiskThatIsNotThere(EmbeddedMachine):
    """Says that a disk was plugged which the guest never saw."""

    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        self.begin()
        return DiskInfo(name=disk.name, size=disk.size or 0, bus=disk.bus)


class OnlySaysThatItPauses(EmbeddedMachine):
    """Lets the guest run on while the machine is called paused."""

    async def _do_pause(self, operation: Operation) -> None:
        self.begin()

    async def _observe(self) -> MachineState:
        paused = self.state is MachineState.PAUSED
        return MachineState.PAUSED if paused else await super()._observe()


class KeepsWhatWasNotFlushed(EmbeddedMachine):
    """Ends a machine's process where its disks should lose their power."""

    async def break_device(
        self, emulator: EngineProcess, identity: str, fault: Fault
    ) -> Callable[[], Awaitable[None]] | None:
        if isinstance(fault, PowerCut):
            return None
        return await super().break_device(emulator, identity, fault)


class CountsNoOccasion(EmbeddedMachine):
    """Has every request struck where one of them should be."""

    async def break_device(
        self, emulator: EngineProcess, identity: str, fault: Fault
    ) -> Callable[[], Awaitable[None]] | None:
        always = fault.model_copy(update={"when": At(seconds=0)})
        return await super().break_device(emulator, identity, always)


MUTANTS: dict[type[EmbeddedMachine], str] = {
    MissesEvents: "stop.by-guest",
    LeavesTheProcess: "delete.force",
    ReportsADiskThatIsNotThere: "change.hotplug-disk",
    OnlySaysThatItPauses: "pause.stands-still",
    KeepsWhatWasNotFlushed: "fault.machine",
    CountsNoOccasion: "fault.triggers",
}
"""Each broken driver, and the check that finds it."""


class BrokenProvider:
    """The engine with machines of a broken kind."""

    name = "embedded"

    def __init__(self, kind: type[EmbeddedMachine]) -> None:
        self._kind = kind

    def probe(self) -> Probe:
        return provider.probe()

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> EmbeddedHypervisor:
        kind = self._kind

        class Broken(EmbeddedHypervisor):
            def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> Any:
                return kind(self, id_, spec, state)

        return Broken(owner)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MUTANTS, ids=lambda kind: kind.__name__)
def test_broken_driver_is_caught(subject: Subject, kind: type[EmbeddedMachine]) -> None:
    # What never comes is not waited for as long as what comes late on a busy host.
    profile = subject.profile.with_changes(slack=30.0)
    (check,) = select([MUTANTS[kind]])
    result = run_check(check, Subject(BrokenProvider(kind), profile))
    expected = "audit.processes" if kind is LeavesTheProcess else check.id
    assert expected in result.found, f"{kind.__doc__} Found: {result.found} {result.reason}"

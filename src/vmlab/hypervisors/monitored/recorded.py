"""A machine of which a record tells, and its process: written down, taken in turns, found again.

What the process does, and what its end means, is decided in `machine`; what it is started with, in
the back ends.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from vmlab.hypervisors import processes
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.emulator import LAST_MOMENTS, Emulator
from vmlab.hypervisors.monitored.streams import ConsoleLine, console_log, console_socket
from vmlab.hypervisors.monitored.turns import Turns
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.qmp import QmpEvent, QmpLost
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import MachineCrashed, MachineNotFound, OperationFailed, VmlabError
from vmlab.machine.events import EventType
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import OFF, TRANSITIONS, MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.monitored.hypervisor import MonitoredHypervisor

E = TypeVar("E", bound=Emulator)

_LAUNCHES_KEPT: Final = 4

_DELETED_ELSEWHERE: Final = "another process deleted it"

_STATES: Final[Mapping[str, MachineState]] = {
    "running": MachineState.RUNNING,
    "shutdown": MachineState.STOPPED,
    "guest-panicked": MachineState.FAILED,
    "internal-error": MachineState.FAILED,
}
"""QEMU's RunState (run-state.json) as our states; in all others the vCPUs stand still."""


class RecordedMachine(OperatedMachine, Generic[E]):
    """A machine with its record, once it has one, and its process, if it has one.

    Attributes:
        recorded: Whether the machine has a record, which is kept true.
        disks: Its disks, by name.
        revision: The number of its record, as it was written or read last.
        launches: How many processes it has had.
        active: The number of the one that it has, or had last.
        cut: NICs whose cable a fault has pulled out.
        emulator: Its process.
        directory: All that is the machine's.
    """

    emulator_class: ClassVar[type[Emulator]]

    def __init__(
        self,
        hypervisor: MonitoredHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        # Set first: the record that a change of state writes is made of these.
        self.monitored = hypervisor
        self.recorded = False
        self.revision = 0
        self.disks: dict[str, DiskFile] = {}
        self.launches = 0
        self.active = 0
        self.cut: set[str] = set()
        self.emulator: E | None = None
        self.directory: Path = hypervisor.records.directory(id_)
        self._lines: dict[str, ConsoleLine] = {}
        self._steps: list[Callable[[], Awaitable[None]]] = []
        self._turns = Turns(hypervisor.records, id_, self._catch_up)
        self._entered = False
        super().__init__(hypervisor, id_, spec, state)

    # What is told by its process.

    @abstractmethod
    def _on_event(self, number: int, event: QmpEvent) -> None:
        """The process of that number tells something."""

    @abstractmethod
    def _on_end(self, emulator: E, reason: str) -> None:
        """A process has ended, and not by this one's doing."""

    # Records.

    def to_record(self) -> dict[str, Any]:
        """What the next process needs to find the machine again."""
        return {
            "spec": self._spec.model_dump(mode="json"),
            "state": self.state.value,
            "reason": self.reason,
            "disks": [disk.to_record() for disk in self.disks.values()],
            "launches": self.launches,
            "active": self.active,
            "cut": sorted(self.cut),
            "revision": self.revision,
        }

    def from_record(self, record: Mapping[str, Any]) -> None:
        """Be the machine that `to_record` described."""
        found = [DiskFile.from_record(disk) for disk in record["disks"]]
        self.disks = {disk.name: disk for disk in found}
        self.launches = record["launches"]
        self.active = record["active"]
        self.cut = set(record["cut"])
        # Records of vmlab 0.1 had no number.
        self.revision = record.get("revision", 0)
        self.recorded = True
        if not self._lines:
            self.open_lines()

    def save(self) -> None:
        """Write the record, once the machine has one."""
        if self.recorded:
            revision = self.revision + 1
            self.monitored.records.save(self.id, {**self.to_record(), "revision": revision})
            self.revision = revision

    def _state_changed(self, old: MachineState, new: MachineState, reason: str) -> None:
        super()._state_changed(old, new, reason)
        # What was only seen is seen again by the next process, and may be older than the record.
        if new.is_stable and new is not MachineState.DELETED and self._turns.ours:
            self.save()

    def _complete(self, operation: Operation, target: MachineState | None) -> None:
        super()._complete(operation, target)
        self.save()

    # Other processes.

    async def _enter(self, operation: Operation) -> None:
        if not self.recorded:
            return

        def busy() -> None:
            operation.awaiting = (
                "another process was at work on the machine: wait for its end, or kill the machine"
            )
            if operation.forced:
                # What it does with the machine ends with the machine's process.
                for process in processes.adopt(self.monitored.owner, self.id):
                    process.kill()

        try:
            await self._turns.begin(busy)
        except MachineNotFound:
            await self._deleted_elsewhere()
        else:
            self._entered = True
        operation.awaiting = None

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._turns.end()

    async def _catch_up(self) -> None:
        """Be what another process has made of the machine meanwhile, if one has.

        Raises:
            MachineNotFound: it has deleted the machine.
            OperationFailed: the record is damaged.
        """
        if not self.recorded:
            return
        record = await done_in_thread(self.monitored.records.load, self.id)
        before = self.active
        with self.monitored.reading(self.id):
            if record.get("revision", 0) == self.revision:
                return
            kept, reason = MachineState(record["state"]), str(record["reason"])
            self._spec = MachineSpec.model_validate(record["spec"])
            self.from_record(record)
        if self.active != before or kept in OFF:
            await self._let_go()
        if self.emulator is None and kept not in OFF:
            await self._find(kept, alone=True)
        else:
            self._settle(kept, reason)

    async def _let_go(self) -> None:
        """Forget the machine's process, to whose end another process has seen."""
        emulator = self.emulator
        if emulator is None:
            return
        await emulator.release()
        if emulator.running:
            for line in self._lines.values():
                await line.disconnect()
        await self.detach()

    async def _deleted_elsewhere(self) -> None:
        """Another process has deleted the machine."""
        if self._deleted:
            return
        self.recorded = False
        await self._let_go()
        for line in self._lines.values():
            line.end()
        if MachineState.DELETING not in TRANSITIONS[self.state]:
            self._lifecycle.move(MachineState.UNKNOWN, _DELETED_ELSEWHERE)
        self._lifecycle.move(MachineState.DELETING, _DELETED_ELSEWHERE)
        self._emit(EventType.DELETED)
        self._lifecycle.move(MachineState.DELETED, _DELETED_ELSEWHERE)
        self._hypervisor.forget(self)

    async def look_at_record(self) -> None:
        """Be what others have made of a machine at rest, unless one of them is at it just now."""
        if self.recorded and self.emulator is None:
            try:
                async with self._turns.at_once():
                    # A turn begins with that.
                    pass
            except MachineNotFound:
                await self._deleted_elsewhere()

    # Undoing.

    def on_failure(self, step: Callable[[], Awaitable[None]]) -> None:
        """Have `step` run if the operation under way does not succeed; the last one first."""
        self._steps.append(step)

    def begin(self) -> None:
        """A hook begins: what the one before has done stays."""
        self._steps.clear()

    async def _undo(self, operation: Operation) -> None:
        while self._steps:
            step = self._steps[-1]
            await step()
            if step in self._steps:
                self._steps.remove(step)

    # Files.

    @property
    def disk_directory(self) -> Path:
        """Where the images of its disks are."""
        return self.directory / "disks"

    def launch_directory(self, number: int) -> Path:
        """The directory of its process of that number."""
        return self.directory / "launches" / str(number)

    def disk_path(self, disk: str, number: int) -> Path:
        """The file of a disk; a restored one gets another number."""
        return self.disk_directory / f"{disk}.{number}.qcow2"

    def growing_disk(self, name: str) -> DiskFile:
        """A disk that can grow, since its file may be written to.

        Raises:
            OperationFailed: it may not.
        """
        disk = self.disks[name]
        if not disk.made and disk.readonly:
            raise OperationFailed(
                f"disk {name!r} is an image that is only read",
                hint="with a source, give it a size larger than that when the machine is created",
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation="resize_disk",
            )
        return disk

    def make_directories(self) -> None:
        """Make the machine's directory, and tell the console's lines where their logs are."""
        self.monitored.records.create(self.id)
        self.disk_directory.mkdir(mode=0o700)
        self.open_lines()

    def open_lines(self) -> None:
        """Make the machine's end of each of its consoles."""
        self._lines = {
            console.name: ConsoleLine(
                console.name, self.name, self.directory / console_log(console)
            )
            for console in self._spec.consoles
        }

    async def remove_directory(self) -> None:
        """Remove everything of the machine's; again does nothing."""
        self.recorded = False
        await done_in_thread(self.monitored.records.remove, self.id)

    # The process.

    def next_launch(self) -> int:
        """The number of the process that is about to be started."""
        self.launches += 1
        self.save()
        # The logs of a few processes are enough.
        old = self.launch_directory(self.launches - _LAUNCHES_KEPT)
        shutil.rmtree(old, ignore_errors=True)
        return self.launches

    def watcher(self, number: int) -> Callable[[QmpEvent], None]:
        """What is told the events of the process of that number."""
        return lambda event: self._on_event(number, event)

    async def discard(self, emulator: E) -> None:
        """End a process that was started in vain, or that another one replaces."""
        await emulator.end()
        if self.emulator is emulator:
            await self.detach()
        else:
            emulator.clear()

    async def attach(self, emulator: E) -> None:
        """Make `emulator` the machine's process."""
        self.emulator = emulator
        self.active = int(emulator.directory.name)
        emulator.watch(lambda reason: self._on_end(emulator, reason))
        for name, line in self._lines.items():
            await line.connect(emulator.directory / console_socket(name))

    async def detach(self) -> None:
        """The machine's process has ended: let go of what led to it."""
        emulator, self.emulator = self.emulator, None
        for line in self._lines.values():
            await line.drain()
        if emulator is not None:
            emulator.clear()

    def need(self) -> E:
        """The machine's process.

        Raises:
            OperationFailed: it has none.
        """
        if self.emulator is None:
            raise OperationFailed(
                f"machine {self.name!r} has no {self.emulator_class.program} process",
                hint="start it first",
                machine=self.name,
                hypervisor=self._hypervisor.name,
            )
        return self.emulator

    # Finding it again.

    @abstractmethod
    def is_machine(self, argv: tuple[str, ...]) -> bool:
        """Whether a process of the machine's with that command line is the machine itself."""

    @abstractmethod
    async def adopt_emulator(self, process: processes.OwnedProcess, number: int) -> E:
        """Talk to a process of the machine's that somebody else started."""

    async def find_again(self) -> None:
        """Be in the state in which the machine of the record is found.

        Raises:
            MachineNotFound: it was deleted just now.
            OperationFailed: its record is damaged.
        """
        async with self._turns.at_once() as alone:
            if self.emulator is None:
                await self._find(self.state, alone=alone)

    async def _find(self, kept: MachineState, *, alone: bool) -> None:
        try:
            state = await self.find_process(kept, alone=alone)
        except VmlabError as error:
            self._settle(MachineState.UNKNOWN, self.monitored.unanswered(error))
        else:
            reason = "found again" if state is kept else "it changed while nobody watched"
            self._settle(state, reason)

    async def find_process(self, kept: MachineState, *, alone: bool) -> MachineState:
        """Find the machine's process again, of which the record tells; the state it is in.

        Args:
            kept: The state that the record tells.
            alone: Whether no other process is at work on the machine, so that a guest that went
                off may be seen to.

        Raises:
            QmpTimeout: it does not answer.
            QmpLost: it lives, and hung up.
        """
        number = self.active
        found = await done_in_thread(processes.adopt, self.monitored.owner, self.id)
        programs = [process for process in found if self.is_machine(process.argv)]
        if not programs:
            return await self._left_in(number) if kept.is_live else kept
        process = programs[-1]
        number = await done_in_thread(self.number_of, process)
        try:
            emulator = await self.adopt_emulator(process, number)
        except QmpLost:
            # It may be about to end.
            with suppress(TimeoutError):
                await process.wait(LAST_MOMENTS)
            if process.running:
                raise
            return await self._left_in(number)
        await self.attach(emulator)
        state = await asked(emulator) or MachineState.FAILED
        if alone and kept is MachineState.STARTING and state is MachineState.PAUSED:
            # Whoever started it died before it let its vCPUs run.
            state = MachineState.FAILED
        if state in {MachineState.STOPPED, MachineState.FAILED}:
            # The guest went off while nobody was there to see it.
            if alone:
                await self.discard(emulator)
            else:
                await self._let_go()
        return state

    async def _left_in(self, number: int) -> MachineState:
        """What has become of a machine whose process of that number has ended."""
        well = await done_in_thread(self.emulator_class.exited_in, self.launch_directory(number))
        return MachineState.STOPPED if well else MachineState.FAILED

    def number_of(self, process: processes.OwnedProcess) -> int:
        """The number of a process of the machine's: it works in the directory of that number.

        The record does not tell of one whose start was killed.
        """
        with suppress(OSError):
            directory = Path(f"/proc/{process.pid}/cwd").readlink()
            launches = self.launch_directory(self.active).parent
            if directory.name.isdecimal() and directory.parent == launches.resolve():
                return int(directory.name)
        return self.active


async def asked(emulator: Emulator) -> MachineState | None:
    """What the process says that its guest is doing; None from one that ends, or has ended."""
    if emulator.ending or not emulator.running:
        return None
    try:
        status = (await emulator.execute("query-status"))["status"]
    except MachineCrashed:
        # It ends just now, which is seen to on its own.
        return None
    return _STATES.get(status, MachineState.PAUSED)

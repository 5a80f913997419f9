"""A machine that is one process speaking QMP: boot, pause, shut down, kill; what happens by itself.

What its process is started with, and what is done with it beyond that, is its back end's.
"""

from __future__ import annotations

import asyncio
import shutil
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from vmlab.hypervisors import processes
from vmlab.hypervisors.base import Channel, Console
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.emulator import Emulator, put_away
from vmlab.hypervisors.monitored.faults import Faults
from vmlab.hypervisors.monitored.streams import (
    ConsoleLine,
    SocketChannel,
    channel_socket,
    console_log,
    console_socket,
)
from vmlab.hypervisors.monitored.turns import Turns
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.qmp import QmpEvent, QmpLost, QmpTimeout
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import (
    MachineCrashed,
    MachineNotFound,
    OperationFailed,
    ResourceNotFound,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import Fault
from vmlab.machine.spec import Disk, MachineSpec
from vmlab.machine.states import OFF, TRANSITIONS, MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.monitored.hypervisor import MonitoredHypervisor

E = TypeVar("E", bound=Emulator)

_ASK_AGAIN_S: Final = 2.0
"""Seconds after which a guest that has not begun to power down is asked again: it was booting."""
_LAUNCHES_KEPT: Final = 4

_DELETED_ELSEWHERE: Final = "another process deleted it"

_STATES: Final[Mapping[str, MachineState]] = {
    "running": MachineState.RUNNING,
    "shutdown": MachineState.STOPPED,
    "guest-panicked": MachineState.FAILED,
    "internal-error": MachineState.FAILED,
}
"""QEMU's RunState (run-state.json) as our states; in all others the vCPUs stand still."""


class MonitoredMachine(OperatedMachine, Generic[E]):
    """A machine with its process, if it has one.

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
        self._channels: dict[str, SocketChannel] = {}
        self._steps: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        # Those of them at whose end the machine has another state.
        self._ending: set[asyncio.Task[None]] = set()
        self._powering_down = False
        # The process whose end was told, which is told once.
        self._end_told: E | None = None
        self._turns = Turns(hypervisor.records, id_, self._catch_up)
        self._entered = False
        super().__init__(hypervisor, id_, spec, state)
        self.faults = Faults(self)

    # What back ends fill in.

    @abstractmethod
    def check_launch(self) -> None:
        """Refuse what cannot be started, before anything is made.

        Raises:
            InvalidSpec: naming the field.
            UnsupportedOperation: guests of the architecture do not boot so.
        """

    @abstractmethod
    async def make_disk(self, disk: Disk, path: Path) -> DiskFile:
        """Make a disk of the machine's; its file, if it gets one of its own, is `path`.

        Raises:
            InvalidSpec: what the disk is to be made of is not as it has to be.
            OperationFailed: it cannot be made.
        """

    @abstractmethod
    async def break_device(
        self, emulator: E, identity: str, fault: Fault
    ) -> Callable[[], Awaitable[None]] | None:
        """Break a disk, a wire, a vCPU, or have the disks lose their power.

        Args:
            emulator: The process.
            identity: The fault's id.
            fault: Of a kind that is declared; its occasions are counted if its trigger says so.

        Returns:
            What mends it, if that is possible.
        """

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
        """A disk that can grow, since its file is the machine's own.

        Raises:
            OperationFailed: it is not.
        """
        disk = self.disks[name]
        if not disk.made:
            raise OperationFailed(
                f"disk {name!r} is its source itself, which is never written to",
                hint="give it a size larger than its source when the machine is created",
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

    async def _do_create(self, operation: Operation) -> None:
        self.begin()
        self.check_launch()
        self.on_failure(self.remove_directory)
        await done_in_thread(self.make_directories)
        for disk in self._spec.disks:
            self.disks[disk.name] = await self.make_disk(disk, self.disk_path(disk.name, 0))
        self.recorded = True
        self.save()

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
        self.faults.forget()
        emulator, self.emulator = self.emulator, None
        for line in self._lines.values():
            await line.drain()
        self._channels.clear()
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

    # What happens by itself.

    def _on_event(self, number: int, event: QmpEvent) -> None:
        emulator = self.emulator
        if emulator is None or emulator.ending:
            return
        if emulator.directory != self.launch_directory(number):
            # Of a process that is about to replace the machine's, or was.
            return
        if event.name == "SHUTDOWN" and not self._powering_down:
            reason = str(event.data.get("reason", "guest-shutdown"))
            event_type = EventType.GUEST_SHUTDOWN
            self._ends(emulator, MachineState.STOPPED, event_type, reason, heard=True)
        elif event.name == "GUEST_PANICKED":
            told = event.data.get("info")
            reason = told if isinstance(told, str) else "the guest panicked"
            self._ends(emulator, MachineState.FAILED, EventType.GUEST_PANIC, reason, heard=True)
        elif event.name == "RESET":
            self._was_reset()
            self._in_background(self._begins_anew(emulator, event))
        elif event.name == "STOP" and self._current is None:
            self._in_background(self._look_again())

    def _was_reset(self) -> None:
        """The guest begins anew."""

    async def _begins_anew(self, emulator: E, event: QmpEvent) -> None:
        """A guest that restarts after its kernel panicked has failed, as one that tells of it.

        Debian's riscv64 kernel has no driver of the device that tells (pvpanic), and no kernel has
        one at the beginning of its boot: what it printed has to do.
        """
        panics = [await line.panicked() for line in self._lines.values()]
        if not event.data.get("guest"):
            return
        if reason := next(filter(None, panics), ""):
            self._ends(emulator, MachineState.FAILED, EventType.GUEST_PANIC, reason, heard=True)
        else:
            self._emit(EventType.GUEST_RESET, reason=str(event.data.get("reason", "")))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _on_end(self, emulator: E, reason: str) -> None:
        if emulator.exited:
            # Some end with their guest's power-off and say nothing, as QEMU's riscv board does
            # (hw/misc/sifive_test.c before 8.2).
            self._ends(emulator, MachineState.STOPPED, EventType.GUEST_SHUTDOWN, "guest-shutdown")
        else:
            self._ends(emulator, MachineState.FAILED, EventType.CRASHED, reason)

    def _ends(
        self,
        emulator: E,
        state: MachineState,
        event: EventType,
        reason: str,
        *,
        heard: bool = False,
    ) -> None:
        """The machine's process ends, and not by this one's doing; the first news of it counts.

        `heard` says that it told so itself.
        """
        if self._end_told is emulator:
            return
        self._end_told = emulator
        task = self._in_background(self._see_to_end(emulator, state, event, reason, heard))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _see_to_end(
        self, emulator: E, state: MachineState, event: EventType, reason: str, heard: bool
    ) -> None:
        """Settle what the end of the process means, unless another process has done that.

        It may be that process's doing. Its turn is waited for, but for an operation of this
        process's, which has the turn itself and may wait for this.
        """
        if not self.recorded:
            return await self._settle_end(emulator, state, event, reason)
        try:
            async with self._turns.shared() as begun:
                if begun and self.emulator is emulator:
                    await self._settle_end(emulator, state, event, reason)
                elif heard:
                    # What became of the machine is known; what its guest did is not told yet.
                    self._emit(event, reason=reason)
        except MachineNotFound:
            await self._deleted_elsewhere()

    async def _settle_end(
        self, emulator: E, state: MachineState, event: EventType, reason: str
    ) -> None:
        if state is MachineState.STOPPED:
            if emulator.ending:
                return
            await emulator.quit()
        else:
            await emulator.end()
        await self._gone(emulator)
        self._happened(state, event, reason)

    async def _gone(self, emulator: E) -> None:
        if self.emulator is emulator:
            await self.detach()

    async def _look_again(self) -> None:
        """The vCPUs were stopped from inside, as QEMU does when a disk is full."""
        with suppress(VmlabError):
            await self.status()

    async def _observe(self) -> MachineState:
        while True:
            emulator = self.emulator
            if emulator is not None:
                if (state := await _asked(emulator)) is not None:
                    return state
                await emulator.noticed()
            # Wait for what comes of its end: who is told of it may start the machine at once.
            await self._until_done(self._ending)
            if self.emulator is emulator:
                break
        failed = self.state is MachineState.FAILED or emulator is not None
        return MachineState.FAILED if failed else MachineState.STOPPED

    # Life.

    async def let_run(self, emulator: E) -> None:
        """Let the vCPUs run.

        A guest that ends at once spoils the operation under way, as it does later.

        Raises:
            OperationFailed: they do not run.
        """
        try:
            await emulator.execute("cont")
            status = (await emulator.execute("query-status"))["status"]
        except MachineCrashed:
            await emulator.noticed()
            if self._end_told is not emulator:
                raise
            status = "shutdown"
        if status in {"shutdown", "guest-panicked", "internal-error"}:
            # What the operation comes to is decided where its end is told.
            await self._until_done(self._ending)
        elif status != "running":
            raise OperationFailed(
                f"the vCPUs do not run: {emulator.program} is in the state {status!r}",
                machine=self.name,
                hypervisor=self._hypervisor.name,
            )

    async def _do_shutdown(self, operation: Operation) -> None:
        self.begin()
        emulator = self.need()
        self._powering_down = True
        try:
            reason = await self._powered_down(emulator)
            if reason is None or emulator.ending:
                # What follows from its end is told before anything else begins.
                await emulator.noticed()
                await self._settle_background()
                return
            self._emit(EventType.GUEST_SHUTDOWN, reason=reason)
            await emulator.quit()
            await self._gone(emulator)
        finally:
            self._powering_down = False

    async def _powered_down(self, emulator: E) -> str | None:
        """Ask the guest to power down until it has.

        Returns:
            The reason that its process gives; None if that has ended by itself.
        """
        with emulator.qmp.listen("SHUTDOWN") as off:
            while True:
                try:
                    await self.press_power_button(emulator)
                    event = await off.wait(_ASK_AGAIN_S)
                    return str(event.data.get("reason", ""))
                except QmpTimeout:
                    continue
                except (QmpLost, MachineCrashed) as error:
                    # It may be gone before its last event was read: status 0 is a power-off.
                    if await emulator.ended_well():
                        return None
                    if isinstance(error, QmpLost):
                        raise await emulator.crashed("stop", error) from error
                    raise

    async def press_power_button(self, emulator: E) -> None:
        """Ask the guest to power down."""
        await emulator.execute("system_powerdown")

    async def _do_kill(self, operation: Operation) -> None:
        self.begin()
        await self._end_process(operation)
        await self._settle_background()

    async def _end_process(self, operation: Operation) -> None:
        if self.emulator is not None:
            await self.discard(self.emulator)
        elif operation.before is MachineState.UNKNOWN:
            # One with which there was no talking.
            for process in await done_in_thread(processes.adopt, self.monitored.owner, self.id):
                await put_away(process)

    async def _settle_background(self) -> None:
        """Wait for the end of what began by itself."""
        await self._until_done(self._tasks)

    async def ended(self) -> None:
        """Wait for what comes of the end of its process."""
        await self._until_done(self._ending)

    async def _until_done(self, tasks: set[asyncio.Task[None]]) -> None:
        """Wait for tasks, but for the one that waits."""
        others = tasks - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    async def _do_reset(self, operation: Operation) -> None:
        self.begin()
        emulator = self.need()
        with emulator.qmp.listen("RESET") as reset:
            await emulator.execute("system_reset")
            try:
                await reset.wait()
            except QmpLost as error:
                raise await emulator.crashed("restart", error) from error

    async def _do_pause(self, operation: Operation) -> None:
        self.begin()
        await self.need().execute("stop")

    async def _do_resume(self, operation: Operation) -> None:
        self.begin()
        await self.let_run(self.need())

    async def _do_delete(self, operation: Operation) -> None:
        self.begin()
        await self._end_process(operation)
        await self._settle_background()
        for line in self._lines.values():
            line.end()
        await self.remove_directory()

    async def release(self) -> None:
        """Let go of the machine and leave it running."""
        self._turns.close()
        await self._settle_background()
        for line in self._lines.values():
            await line.disconnect()
            line.end()
        for channel in self._channels.values():
            await channel.close()
        if self.emulator is not None:
            await self.emulator.release()
            self.emulator = None

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
            QmpLost: it is gone.
        """
        number = self.active
        found = await done_in_thread(processes.adopt, self.monitored.owner, self.id)
        programs = [process for process in found if self.is_machine(process.argv)]
        if not programs:
            if not kept.is_live:
                return kept
            well = await done_in_thread(
                self.emulator_class.exited_in, self.launch_directory(number)
            )
            return MachineState.STOPPED if well else MachineState.FAILED
        emulator = await self.adopt_emulator(programs[-1], number)
        await self.attach(emulator)
        state = await _asked(emulator) or MachineState.FAILED
        if state in {MachineState.STOPPED, MachineState.FAILED}:
            # The guest went off while nobody was there to see it.
            if alone:
                await self.discard(emulator)
            else:
                await self._let_go()
        return state

    # Streams.

    async def _do_console(self, name: str) -> Console:
        if name not in self._lines:
            raise self._missing("console", name, tuple(self._lines))
        return self._lines[name].reader()

    async def _do_channel(self, name: str) -> Channel:
        if name not in self._spec.channels:
            raise self._missing("channel", name, self._spec.channels)
        present = self._channels.get(name)
        if present is not None and not present.closed:
            raise OperationFailed(
                f"channel {name!r} of machine {self.name!r} is open already",
                hint="close it first: a channel has one reader",
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation="channel",
            )
        path = self.need().directory / channel_socket(name)
        channel = await SocketChannel.open(name, self.name, path)
        self._channels[name] = channel
        return channel

    def _missing(self, kind: str, name: str, there: tuple[str, ...]) -> ResourceNotFound:
        return ResourceNotFound(
            f"machine {self.name!r} has no {kind} {name!r}",
            hint=f"it has {', '.join(there)}" if there else f"its specification has no {kind}s",
            machine=self.name,
            hypervisor=self._hypervisor.name,
            operation=kind,
        )

    # Faults.

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        self.begin()
        return await self.faults.inject(fault)

    async def _do_clear_fault(self, operation: Operation, fault: str) -> None:
        self.begin()
        await self.faults.clear(fault)

    def fault_ended(self, identity: str) -> None:
        """A fault's time was over."""
        self._emit(EventType.FAULT_CLEARED, fault=identity)

    def paused_by_fault(self) -> None:
        """The vCPUs were stopped by a fault."""
        if self._current is None or self._current.name == "inject":
            self._settle(MachineState.PAUSED, "paused by a fault")

    def resumed_by_fault(self) -> None:
        """The fault that stopped the vCPUs has ended."""
        if self.state is MachineState.PAUSED:
            self._settle(MachineState.RUNNING, "a fault that paused it ended")


async def _asked(emulator: Emulator) -> MachineState | None:
    """What the process says that its guest is doing; None from one that ends, or has ended."""
    if emulator.ending or not emulator.running:
        return None
    try:
        status = (await emulator.execute("query-status"))["status"]
    except MachineCrashed:
        # It ends just now, which is seen to on its own.
        return None
    return _STATES.get(status, MachineState.PAUSED)

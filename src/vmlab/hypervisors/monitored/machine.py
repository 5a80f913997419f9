"""A machine that is one process speaking QMP: boot, pause, shut down, kill; what happens by itself.

What its process is started with, and what is done with it beyond that, is its back end's.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors import processes
from vmlab.hypervisors.base import Channel, Console
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.emulator import put_away
from vmlab.hypervisors.monitored.faults import Faults
from vmlab.hypervisors.monitored.recorded import E, RecordedMachine, asked
from vmlab.hypervisors.monitored.streams import SocketChannel, channel_socket
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
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.monitored.hypervisor import MonitoredHypervisor

_ASK_AGAIN_S: Final = 2.0
"""Seconds after which a guest that has not begun to power down is asked again: it was booting."""


class MonitoredMachine(RecordedMachine[E]):
    """A machine whose process is started, spoken to, listened to and ended.

    Attributes:
        faults: What is broken of it.
    """

    def __init__(
        self,
        hypervisor: MonitoredHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        self._channels: dict[str, SocketChannel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Those of them at whose end the machine has another state.
        self._ending: set[asyncio.Task[None]] = set()
        self._powering_down = False
        # The process whose end was told, which is told once.
        self._end_told: E | None = None
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

    async def detach(self) -> None:
        """The machine's process has ended: let go of what led to it."""
        self.faults.forget()
        await super().detach()
        self._channels.clear()

    async def _gone(self, emulator: E) -> None:
        if self.emulator is emulator:
            await self.detach()

    async def _look_again(self) -> None:
        """The vCPUs were stopped from inside, as QEMU does when a disk is full."""
        with suppress(VmlabError):
            await self.status()

    async def _observe(self) -> MachineState:
        await self.look_at_record()
        while True:
            emulator = self.emulator
            if emulator is not None:
                if (state := await asked(emulator)) is not None:
                    return state
                await emulator.noticed()
            # Wait for what comes of its end: who is told of it may start the machine at once.
            await self._until_done(self._ending)
            if self.emulator is emulator:
                break
        failed = self.state is MachineState.FAILED or emulator is not None
        return MachineState.FAILED if failed else MachineState.STOPPED

    # Life.

    async def _do_create(self, operation: Operation) -> None:
        self.begin()
        self.check_launch()
        self.on_failure(self.remove_directory)
        await done_in_thread(self.make_directories)
        for disk in self._spec.disks:
            self.disks[disk.name] = await self.make_disk(disk, self.disk_path(disk.name, 0))
        self.recorded = True
        self.save()

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

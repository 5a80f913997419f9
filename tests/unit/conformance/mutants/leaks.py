"""Hypervisors that leave something behind, and those whose events or states do not add up."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from mutants.base import BrokenHypervisor, BrokenMachine, mutant
from vmlab.hypervisors.base import MachineStatus
from vmlab.hypervisors.operation import Operation
from vmlab.machine.errors import OperationFailed
from vmlab.machine.events import Event, EventType
from vmlab.machine.states import MachineState

KEPT: list[Any] = []
"""What was leaked, so that nothing closes it too early; the tests end all of it."""


def end_leaks() -> None:
    """Close and end what was leaked."""
    while KEPT:
        match KEPT.pop():
            case socket.socket() as leaked:
                leaked.close()
            case subprocess.Popen() as process:
                process.kill()
                process.wait()
            case threading.Event() as event:
                event.set()
            case threading.Thread() as thread:
                thread.join()
            case int(descriptor):
                os.close(descriptor)


@mutant("audit.sockets")
class LeaksListeningSocket(BrokenMachine):
    """Listens on a port for each snapshot and never stops."""

    async def _do_snapshot(self, *arguments: Any) -> Any:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        KEPT.append(listening)
        return await super()._do_snapshot(*arguments)


@mutant("audit.sockets")
class LeaksUnixSocket(BrokenMachine):
    """Keeps a connection to each machine that was forked."""

    async def _do_fork(self, *arguments: Any) -> None:
        KEPT.extend(socket.socketpair())
        await super()._do_fork(*arguments)


@mutant("audit.descriptors")
class LeaksDescriptor(BrokenMachine):
    """Opens a file for each pinning and does not close it."""

    async def _do_pin(self, *arguments: Any) -> None:
        KEPT.append(os.open(os.devnull, os.O_RDONLY))
        await super()._do_pin(*arguments)


@mutant("audit.files")
class LeaksFile(BrokenMachine):
    """Leaves a file of each machine in its owner's directory."""

    async def _do_delete(self, operation: Operation) -> None:
        await super()._do_delete(operation)
        (self._hypervisor.owner.directory / f"{self.name}.log").write_bytes(b"left")


@mutant("audit.files")
class LeaksTemporaryFile(BrokenMachine):
    """Leaves a temporary file of each restore."""

    async def _do_restore(self, *arguments: Any) -> None:
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        Path(name).write_bytes(b"left")  # noqa: ASYNC240  # a thread would be a leak too
        await super()._do_restore(*arguments)


@mutant("audit.processes")
class LeaksProcess(BrokenMachine):
    """Starts a process for each pinning and does not end it."""

    async def _do_pin(self, *arguments: Any) -> None:
        KEPT.append(subprocess.Popen(["sleep", "1000"]))  # noqa: ASYNC220  # as above
        await super()._do_pin(*arguments)


@mutant("audit.processes")
class LeaksDaemon(BrokenMachine):
    """Starts a process that makes itself independent, and does not end it."""

    async def _do_pin(self, *arguments: Any) -> None:
        command = "sleep 1000 </dev/null >/dev/null 2>&1 &"
        subprocess.run(  # noqa: ASYNC221  # as above
            ["sh", "-c", command], check=True, start_new_session=True
        )
        await super()._do_pin(*arguments)


@mutant("audit.threads")
class LeaksThread(BrokenMachine):
    """Starts a thread for each pinning that goes on waiting."""

    async def _do_pin(self, *arguments: Any) -> None:
        event = threading.Event()
        thread = threading.Thread(target=event.wait, name="leaked", daemon=True)
        thread.start()
        # Popped from the end: the event first, so that the thread can be joined.
        KEPT.extend([thread, event])
        await super()._do_pin(*arguments)


@mutant("audit.tasks")
class LeaksTask(BrokenMachine):
    """Watches each machine that is pinned with a task that nobody ends."""

    async def _do_pin(self, *arguments: Any) -> None:
        KEPT.append(asyncio.ensure_future(asyncio.sleep(10_000_000)))
        await super()._do_pin(*arguments)


@mutant("audit.close")
class LeavesFollowersWaiting(BrokenHypervisor):
    """Does not end those who follow its events when it is closed."""

    async def close(self) -> None:
        self.log.close = lambda: None
        await super().close()


@mutant("audit.close", only=False)
class ComplainsWhenClosed(BrokenHypervisor):
    """Closes and says that it could not."""

    async def close(self) -> None:
        await super().close()
        raise OperationFailed("closing failed", hypervisor=self.name)


@mutant("audit.deletion")
class ClingsToTyped(BrokenMachine):
    """Refuses at first to delete a machine whose console was typed into."""

    refused = False

    async def delete(self, **options: Any) -> None:
        if self.state.is_live and self.hardware.guest.state.typed and not self.refused:
            self.refused = True
            raise OperationFailed("somebody typed", machine=self.name)
        await super().delete(**options)


@mutant("audit.numbers")
class LosesEvent(BrokenHypervisor):
    """Loses the event that a fault was cleared; its number is missing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        emit = self.log.emit

        def lossy(type_: EventType, **facts: Any) -> Event:
            if type_ is EventType.FAULT_CLEARED:
                self.log._lost.add(self.log.last + 1)
            return emit(type_, **facts)

        self.log.emit = lossy


@mutant("audit.numbers", only=False)
class TimeRunsBack(BrokenHypervisor):
    """Tells some events with a time before the one of the event before."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        emit = self.log.emit

        def early(type_: EventType, **facts: Any) -> Event:
            event = emit(type_, **facts)
            if event.sequence % 7 == 3:
                event = event.model_copy(update={"time": event.time - 100})
                self.log._events[-1] = event
            return event

        self.log.emit = early


@mutant("audit.transitions")
class TellsWrongOrigin(BrokenHypervisor):
    """Tells that a machine that is being deleted was created until then."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        emit = self.log.emit

        def wrong(type_: EventType, **facts: Any) -> Event:
            if type_ is EventType.STATE and facts.get("to") == "deleting":
                facts["from"] = "created"
            return emit(type_, **facts)

        self.log.emit = wrong


@mutant("audit.transitions", only=False)
class SkipsStates(BrokenHypervisor):
    """Does not tell that a machine is being paused, only that it is."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        emit = self.log.emit

        def terse(type_: EventType, **facts: Any) -> Event | None:
            if type_ is EventType.STATE and facts.get("to") == "pausing":
                return None
            return emit(type_, **facts)

        self.log.emit = terse


@mutant("audit.operations")
class NeverEnds(BrokenHypervisor):
    """Announces that vCPUs are being pinned, and never that they are."""

    def announce_end(self, operation: Operation, machine: Any) -> None:
        if operation.name != "pin":
            super().announce_end(operation, machine)


@mutant("audit.operations", only=False)
class EndsTwice(BrokenHypervisor):
    """Announces twice that a machine was paused."""

    def announce_end(self, operation: Operation, machine: Any) -> None:
        super().announce_end(operation, machine)
        if operation.name == "pause":
            super().announce_end(operation, machine)


@mutant("audit.state")
class SaysPausedAfterReset(BrokenMachine):
    """Says of a machine that was reset that it is paused, until the next operation."""

    was_reset = False

    async def restart(self, *, graceful: bool = True, timeout: float | None = None) -> None:
        await super().restart(graceful=graceful, timeout=timeout)
        self.was_reset = not graceful

    async def kill(self, **options: Any) -> None:
        self.was_reset = False
        await super().kill(**options)

    async def status(self, *, timeout: float | None = None) -> MachineStatus:
        status = await super().status(timeout=timeout)
        if self.was_reset:
            return status.model_copy(update={"state": MachineState.PAUSED})
        return status


@mutant("audit.state", only=False)
class StaysPausing(BrokenMachine):
    """Is pausing for ever."""

    def _complete(self, operation: Operation, target: MachineState | None) -> None:
        super()._complete(operation, MachineState.PAUSING if operation.name == "pause" else target)

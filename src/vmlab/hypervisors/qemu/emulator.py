"""One QEMU process: started or found again, spoken to over QMP, watched, ended.

Knows processes and QMP, not machines' states: what an exit or an event means is decided by
`machine`, which is told of each.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors import processes
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.command_line import QMP_SOCKET, SECOND_QMP_SOCKET
from vmlab.hypervisors.qemu.threads import done_in_thread
from vmlab.hypervisors.qmp import (
    COMMAND_TIMEOUT,
    QmpConnection,
    QmpError,
    QmpEvent,
    QmpLost,
    QmpTimeout,
)
from vmlab.machine.errors import MachineCrashed, OperationFailed

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.processes import OwnedProcess

QMP_LOG: Final = "qmp.log"
MESSAGES: Final = "qemu.log"
COMMAND_LINE: Final = "command-line"
_ADOPTION_TIMEOUT: Final = 5.0
"""Seconds that a process found again has to answer: QEMU talks to one client at a time."""
_KILL_AGAIN: Final = 5.0
"""Seconds after which a process that was killed, and still runs, is killed again."""
_QUIT_GRACE: Final = 5.0
"""Seconds that QEMU has to flush its disks and go."""


class Emulator:
    """A running QEMU; made by `start` or `adopt`.

    Attributes:
        directory: Where its sockets, its messages and its command line are.
        qmp: The conversation with it.
        process: The process.
        ending: Whether it is being ended from here, so that its end is no crash.
    """

    def __init__(
        self, machine: str, directory: Path, process: OwnedProcess, qmp: QmpConnection
    ) -> None:
        self.machine = machine
        self.directory = directory
        self.process = process
        self.qmp = qmp
        self.ending = False
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        directory: Path,
        *,
        owner: Owner,
        machine: str,
        id_: str,
        on_event: Callable[[QmpEvent], None],
    ) -> Emulator:
        """Start QEMU in `directory` and connect to it; its vCPUs stand still.

        Raises:
            OperationFailed: it did not start; with what it said. Nothing runs.
        """
        await done_in_thread(_prepare, directory, argv)
        process = await processes.spawn(
            argv,
            owner=owner,
            machine=id_,
            stdout=directory / MESSAGES,
            stderr=directory / MESSAGES,
            cwd=directory,
        )
        try:
            qmp = await QmpConnection.open(
                directory / QMP_SOCKET,
                machine=machine,
                hypervisor="qemu",
                log=directory / QMP_LOG,
                ended=lambda: None if process.running else _last_words(directory, process),
                on_event=on_event,
            )
        except BaseException as error:
            await uninterrupted(_put_away(process))
            if isinstance(error, QmpLost):
                raise OperationFailed(
                    f"QEMU did not start: {_last_words(directory, process)}",
                    hint=f"its command line is in {directory / COMMAND_LINE}",
                    machine=machine,
                    hypervisor="qemu",
                    operation="start",
                ) from error
            raise
        return cls(machine, directory, process, qmp)

    @classmethod
    async def adopt(
        cls,
        process: OwnedProcess,
        directory: Path,
        *,
        machine: str,
        on_event: Callable[[QmpEvent], None],
    ) -> Emulator:
        """Connect to a QEMU that somebody else started, and that one other may still talk to.

        Raises:
            QmpTimeout: it talks to two other processes, or hangs.
            QmpLost: it is gone.
        """

        async def open_(name: str) -> QmpConnection:
            return await QmpConnection.open(
                directory / name,
                machine=machine,
                hypervisor="qemu",
                log=directory / QMP_LOG,
                ended=lambda: None if process.running else "the process has ended",
                timeout=_ADOPTION_TIMEOUT,
                on_event=on_event,
            )

        try:
            qmp = await open_(QMP_SOCKET)
        except QmpTimeout:
            qmp = await open_(SECOND_QMP_SOCKET)
        return cls(machine, directory, process, qmp)

    def watch(self, on_end: Callable[[Emulator, str], None]) -> None:
        """Call `on_end` with how it ended, unless it is ended from here."""
        self._watch = asyncio.create_task(self._notice(on_end))

    async def _notice(self, on_end: Callable[[Emulator, str], None]) -> None:
        await self.process.wait()
        if not self.ending:
            on_end(self, self.last_words())

    async def noticed(self) -> None:
        """If it has ended, wait until whoever watches it was told."""
        if self._watch is not None and not self.running:
            await asyncio.wait([self._watch])

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process.running

    def last_words(self) -> str:
        """How the process ended and what it said last, in a sentence."""
        return _last_words(self.directory, self.process)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = COMMAND_TIMEOUT,
    ) -> Any:
        """Run a QMP command.

        Raises:
            QmpError: QEMU refused it.
            QmpTimeout: no answer in time.
            MachineCrashed: the process has ended.
        """
        try:
            return await self.qmp.execute(command, arguments, timeout=timeout)
        except QmpLost as error:
            raise await self.crashed(command, error) from error

    async def ended_well(self) -> bool:
        """Whether the process ends now, or has ended, with status 0: by itself or when asked to."""
        try:
            return await self.process.wait(1.0) == 0
        except TimeoutError:
            return False

    async def crashed(self, operation: str, error: QmpLost) -> MachineCrashed:
        """What the loss of the conversation means."""
        try:
            await self.process.wait(1.0)
            reason = self.last_words()
        except TimeoutError:
            reason = error.message
        return MachineCrashed(
            f"{operation} failed: {reason}",
            hint=f"its messages are in {self.directory / MESSAGES}",
            machine=self.machine,
            hypervisor="qemu",
            operation=operation,
        )

    async def run_job(
        self, command: str, arguments: Mapping[str, Any], *, timeout: float | None = None
    ) -> None:
        """Start a job (docs/interop/qemu-qmp-ref, "Jobs") and wait for its end.

        A cancelled call cancels the job, and waits for that.

        Raises:
            OperationFailed: it failed, with why.
        """
        job = f"{command}-job"
        with self.qmp.listen(
            "JOB_STATUS_CHANGE",
            match=lambda event: (
                event.data.get("id") == job and event.data.get("status") == "concluded"
            ),
        ) as concluded:
            try:
                await self.execute(command, {"job-id": job, **arguments})
                await concluded.wait(timeout)
            except (QmpError, MachineCrashed):
                # There is no job.
                raise
            except QmpLost as error:
                raise await self.crashed(command, error) from error
            except BaseException:
                # A job that saves or loads cannot be cancelled half-way: wait for it.
                await uninterrupted(self._settle_job(job))
                raise
        await uninterrupted(self._dismiss(job, command))

    async def _settle_job(self, job: str) -> None:
        while self.running:
            known = [other for other in await self.execute("query-jobs") if other["id"] == job]
            if not known:
                return
            if known[0]["status"] == "concluded":
                await self.execute("job-dismiss", {"id": job})
                return
            await asyncio.sleep(0.02)

    async def _dismiss(self, job: str, command: str) -> None:
        failed = [
            other.get("error")
            for other in await self.execute("query-jobs")
            if other["id"] == job and other.get("error")
        ]
        await self.execute("job-dismiss", {"id": job})
        if failed:
            raise OperationFailed(
                f"{command} failed: {failed[0]}",
                machine=self.machine,
                hypervisor="qemu",
                operation=command,
            )

    async def end(self) -> None:
        """Kill it and wait; the process first, then the conversation. Again does nothing."""
        self.ending = True
        await uninterrupted(self._end())

    async def _end(self) -> None:
        await _put_away(self.process)
        await self.qmp.close()
        if self._watch is not None:
            await self._watch

    async def quit(self) -> None:
        """Have it flush its disks and go, and kill it if it does not."""
        self.ending = True
        try:
            await self.qmp.execute("quit", timeout=_QUIT_GRACE)
            await self.process.wait(_QUIT_GRACE)
        except (OperationFailed, TimeoutError):
            # It is gone already, or hangs: `end` sees to both.
            self.process.kill()
        await self.end()

    async def release(self) -> None:
        """Let go of it and leave it running."""
        self.ending = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self.qmp.close()


def _prepare(directory: Path, argv: Sequence[str]) -> None:
    directory.mkdir(mode=0o700, parents=True)
    (directory / COMMAND_LINE).write_text(_readable(argv), "utf-8")


async def _put_away(process: OwnedProcess) -> None:
    # Once should do. It was seen once that it did not, and nobody may wait for ever for that.
    while True:
        process.kill()
        try:
            await process.wait(_KILL_AGAIN)
        except TimeoutError:
            continue
        return


def _last_words(directory: Path, process: OwnedProcess) -> str:
    """How a process ended, and the last that it said."""
    status = process.returncode
    if status is None:
        how = "QEMU has ended"
    elif status < 0:
        how = f"QEMU was killed by signal {-status}"
    else:
        how = f"QEMU ended with status {status}"
    try:
        said = (directory / MESSAGES).read_text("utf-8", "replace").strip().rpartition("\n")[2]
    except OSError:
        said = ""
    return f"{how}: {said}" if said else how


def _readable(argv: Sequence[str]) -> str:
    """A command line, quoted for a shell, one option to a line."""
    lines = [""]
    for word in argv:
        if word.startswith("-") and lines[-1]:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + shlex.quote(word)
    return " \\\n    ".join(lines) + "\n"

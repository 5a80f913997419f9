"""A process that is a machine and speaks QMP: started or found again, spoken to, watched, ended.

Knows processes and QMP, not machines' states: what an exit or an event means is decided by
`machine`, which is told of each. What is one program's own is in a class of that program's.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from vmlab.hypervisors import processes
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.process_identity import activity
from vmlab.hypervisors.qmp import (
    COMMAND_TIMEOUT,
    QmpConnection,
    QmpEvent,
    QmpLost,
    QmpTimeout,
)
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import MachineCrashed, OperationFailed

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.processes import OwnedProcess

QMP_SOCKET: Final = "qmp.sock"
QMP_LOG: Final = "qmp.log"
COMMAND_LINE: Final = "command-line"
_ADOPTION_TIMEOUT: Final = 5.0
"""Seconds that a process found again has to answer: QEMU talks to one client of a socket."""
_KILL_AGAIN: Final = 5.0
"""Seconds after which a process that was killed, and still runs, is killed again."""
_KILLS: Final = 12
"""How often it is killed before it is given up: it waits in the host's kernel then."""
_QUIT_GRACE: Final = 30.0
"""Seconds that it has to flush its disks and go."""
LAST_MOMENTS: Final = 30.0
"""Seconds in which a process ends that has hung up: the host may be busy, or its memory large."""
_LEFT_ALONE: Final = 1.0
"""The same of one that was let go of here, which may have ended all the same."""


class Emulator:
    """A running process; made by `start` or `adopt`.

    Attributes:
        program: What it is called in messages.
        hypervisor: Name of the hypervisor that it belongs to.
        messages: Name of the file of what it says.
        sockets: Names of the sockets of its monitors, each of which may be taken.
        transient: Patterns of the files that go with it; its logs stay.
        directory: Where its sockets, its messages and its command line are.
        qmp: The conversation with it.
        process: The process.
        ending: Whether it is being ended from here, so that its end is no crash.
    """

    program: ClassVar[str]
    hypervisor: ClassVar[str]
    messages: ClassVar[str]
    sockets: ClassVar[tuple[str, ...]] = (QMP_SOCKET,)
    transient: ClassVar[tuple[str, ...]] = ("*.sock",)

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
        files: Mapping[str, str] | None = None,
    ) -> Self:
        """Start it in `directory` and connect to it; its vCPUs stand still.

        Args:
            argv: The command line.
            directory: For all that is the process's.
            owner: Whose it is.
            machine: Name of the machine.
            id_: Id of the machine.
            on_event: Told every event.
            files: Names and texts of files that it finds in its directory.

        Raises:
            OperationFailed: it did not start; with what it said. Nothing runs.
        """
        await done_in_thread(_prepare, directory, argv, files or {})
        process = await processes.spawn(
            argv,
            owner=owner,
            machine=id_,
            stdout=directory / cls.messages,
            stderr=directory / cls.messages,
            cwd=directory,
        )
        try:
            qmp = await QmpConnection.open(
                directory / cls.sockets[0],
                machine=machine,
                hypervisor=cls.hypervisor,
                log=directory / QMP_LOG,
                ended=lambda: None if process.running else cls._last_words(directory, process),
                on_event=on_event,
            )
        except BaseException as error:
            await uninterrupted(put_away(process))
            if isinstance(error, QmpLost):
                raise OperationFailed(
                    f"{cls.program} did not start: {cls._last_words(directory, process)}",
                    hint=f"its command line is in {directory / COMMAND_LINE}",
                    machine=machine,
                    hypervisor=cls.hypervisor,
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
    ) -> Self:
        """Connect to one that somebody else started, and that another may still talk to.

        Raises:
            QmpTimeout: all its monitors are taken, or it hangs.
            QmpLost: it is gone.
        """

        async def open_(name: str) -> QmpConnection:
            return await QmpConnection.open(
                directory / name,
                machine=machine,
                hypervisor=cls.hypervisor,
                log=directory / QMP_LOG,
                ended=lambda: None if process.running else "the process has ended",
                timeout=_ADOPTION_TIMEOUT,
                on_event=on_event,
            )

        *taken, last = cls.sockets
        for name in taken:
            with suppress(QmpTimeout):
                return cls(machine, directory, process, await open_(name))
        return cls(machine, directory, process, await open_(last))

    def watch(self, on_end: Callable[[str], None]) -> None:
        """Call `on_end` with how it ended, unless it is ended from here."""
        self._watch = asyncio.create_task(self._notice(on_end))

    async def _notice(self, on_end: Callable[[str], None]) -> None:
        await self.process.wait()
        if not self.ending:
            on_end(self.last_words())

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
        return self._last_words(self.directory, self.process)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = COMMAND_TIMEOUT,
    ) -> Any:
        """Run a QMP command.

        Raises:
            QmpError: it refused.
            QmpTimeout: no answer in time; it says what the process is at.
            MachineCrashed: the process has ended.
        """
        try:
            return await self.qmp.execute(command, arguments, timeout=timeout)
        except QmpTimeout as error:
            seen = await asyncio.to_thread(activity, self.process.identity)
            raise self.qmp.failure(QmpTimeout, f"{error.message}; {seen}") from error
        except QmpLost as error:
            raise await self.crashed(command, error) from error

    @property
    def exited(self) -> bool:
        """Whether the process has ended well: by itself, or when it was asked to."""
        return self.process.returncode == 0

    @classmethod
    def exited_in(cls, directory: Path) -> bool:
        """Whether one that ran in `directory` has ended well, as far as what it left can tell."""
        return False

    async def ended_well(self) -> bool:
        """Whether the process ends now, or has ended, and well."""
        try:
            await self._hung_up()
        except TimeoutError:
            return False
        return self.exited

    async def _hung_up(self) -> None:
        """Wait for the end of the process, with which there is no talking any more.

        Raises:
            TimeoutError: it lives.
        """
        await self.process.wait(_LEFT_ALONE if self.ending else LAST_MOMENTS)

    async def crashed(self, operation: str, error: QmpLost) -> MachineCrashed:
        """What the loss of the conversation means."""
        try:
            await self._hung_up()
            reason = self.last_words()
        except TimeoutError:
            reason = error.message
        return MachineCrashed(
            f"{operation} failed: {reason}",
            hint=f"its messages are in {self.directory / self.messages}",
            machine=self.machine,
            hypervisor=self.hypervisor,
            operation=operation,
        )

    async def end(self) -> None:
        """Kill it and wait; the process first, then the conversation. Again does nothing."""
        self.ending = True
        await uninterrupted(self._end())

    async def _end(self) -> None:
        try:
            await put_away(self.process)
        finally:
            await self.qmp.close()
            if self._watch is not None:
                if self.running:
                    self._watch.cancel()
                await asyncio.wait([self._watch])

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

    def clear(self) -> None:
        """Remove what is of no use now that it has ended; its logs stay."""
        for pattern in self.transient:
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)

    @classmethod
    def _last_words(cls, directory: Path, process: OwnedProcess) -> str:
        """How a process ended, and the last that it said."""
        status = process.returncode
        if status is None:
            how = f"{cls.program} has ended"
        elif status < 0:
            how = f"{cls.program} was killed by signal {-status}"
        else:
            how = f"{cls.program} ended with status {status}"
        try:
            said = (directory / cls.messages).read_text("utf-8", "replace").strip()
        except OSError:
            said = ""
        last = said.rpartition("\n")[2]
        return f"{how}: {last}" if last else how


def _prepare(directory: Path, argv: Sequence[str], files: Mapping[str, str]) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in {**files, COMMAND_LINE: _readable(argv)}.items():
        (directory / name).write_text(text, "utf-8")


async def put_away(process: OwnedProcess) -> None:
    """End a process and wait for that.

    Raises:
        OperationFailed: it cannot be ended, with what it waits for.
    """
    # Once should do. It was seen once that it did not, and nobody may wait for ever for that.
    for _ in range(_KILLS):
        process.kill()
        with suppress(TimeoutError):
            await process.wait(_KILL_AGAIN)
            return
    raise OperationFailed(
        f"process {process.pid} lives on after SIGKILL ({_standing(process.pid)})",
        hint="it waits in the host's kernel, whose log may say for what",
        operation="kill",
    )


def _standing(pid: int) -> str:
    """What the host's kernel says of a process that does not end."""
    told = []
    for name in ("status", "wchan"):
        try:
            text = (Path("/proc") / str(pid) / name).read_text("utf-8", "replace")
        except OSError as error:
            text = error.strerror or str(error)
        lines = [line for line in text.splitlines() if line.startswith("State:")] or [text]
        told.append(f"{name}: {lines[0].removeprefix('State:').strip()}")
    return ", ".join(told)


def _readable(argv: Sequence[str]) -> str:
    """A command line, quoted for a shell, one option to a line."""
    lines = [""]
    for word in argv:
        if word.startswith("-") and lines[-1]:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + shlex.quote(word)
    return " \\\n    ".join(lines) + "\n"

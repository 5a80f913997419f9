"""A command in a guest: what is run, and what came of it. The same for every channel."""

from __future__ import annotations

import signal as signals
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

from vmlab.machine.errors import OperationFailed, VmlabError

LONGEST_COMMAND: Final = 120_000
"""Bytes; Linux takes no single argument of 128 KiB or more (MAX_ARG_STRLEN)."""

Sink = Callable[[bytes], Awaitable[None]]
"""Takes output as it comes; while it waits, so does the guest."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line for the guest's /bin/sh.

    `input` is None (the command reads /dev/null), all of it, or pieces as they become available.
    `takes`: the text calls `take >FILE` once, which is `cat` at the channel's best speed, and does
    not end with status 0 unless that did.
    """

    text: str
    input: bytes | AsyncIterable[bytes] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str | None = None
    takes: bool = False

    def script(self, *, own_take: bool = False) -> str:
        """The text with directory and environment in front, and `take` unless the guest has it.

        Raises:
            OperationFailed: no shell could be given it.
        """
        lines = ["take() { cat; }"] if self.takes and not own_take else []
        lines += [f"cd {quote(self.directory)} || exit 126"] if self.directory else []
        lines += [f"export {name}={quote(value)}" for name, value in self.environment.items()]
        text = "\n".join([*lines, self.text])
        if len(text.encode("utf-8", "surrogateescape")) > LONGEST_COMMAND or "\0" in text:
            raise OperationFailed(
                f"a command has at most {LONGEST_COMMAND} bytes and no NUL",
                hint="write it to a file in the guest and run that",
                operation="execute",
            )
        return text


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command did.

    `status` is the exit status as a shell reports it: 128 + n for a command that signal n ended.
    """

    command: str
    status: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    seconds: float

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are not UTF-8 are kept as surrogate escapes."""
        return self.stdout_bytes.decode("utf-8", "surrogateescape")

    @property
    def stderr(self) -> str:
        """Standard error as text; bytes that are not UTF-8 are kept as surrogate escapes."""
        return self.stderr_bytes.decode("utf-8", "surrogateescape")

    @property
    def signal(self) -> int | None:
        """The signal that ended the command, as far as a shell's status tells."""
        number = self.status - 128
        return number if number in {member.value for member in signals.Signals} else None

    @property
    def ok(self) -> bool:
        """Whether the command exited with status 0."""
        return self.status == 0


async def _drop(data: bytes) -> None:
    """Takes output that nobody wants."""


class CommandChannel(ABC):
    """A way to run commands in a guest."""

    name: ClassVar[str]

    @abstractmethod
    async def connect(self, *, timeout: float) -> None:
        """Wait until the guest answers.

        Raises:
            DeadlineExceeded: it does not within `timeout` seconds.
            ChannelClosed: the machine ended meanwhile.
        """

    @abstractmethod
    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        """Run a command to its end and return its status as a shell reports it.

        Cancelling ends the command in the guest: first by SIGTERM, then by SIGKILL.

        Args:
            command: What to run.
            stdout: Takes its standard output.
            stderr: Takes its standard error.
            started: Told the command's process id in the guest, where the channel knows it.

        Raises:
            ChannelClosed: the guest or its agent died before the command ended.
        """

    @abstractmethod
    async def signal(self, process: int, number: int) -> None:
        """Send a signal to the process group of a command that `started` told of."""

    async def ping(self) -> None:
        """Return when the guest has answered a question; may be cancelled at any time.

        A channel on which a question is in the way of commands does not ask, and returns at once.

        Raises:
            ChannelClosed: the guest died.
        """
        await self.run(Command(":"), stdout=_drop, stderr=_drop)

    @abstractmethod
    async def close(self) -> None:
        """Let go of the guest; commands under way fail."""


class AgentRestarted(VmlabError):
    """The guest's agent died and came back while a command ran; what became of it is unknown."""


def quote(text: str) -> str:
    """`text` as one word of a POSIX shell."""
    return "'" + text.replace("'", "'\\''") + "'"

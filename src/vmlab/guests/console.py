"""Commands by a shell on the serial console, for guests that have nothing else.

A shell is found by its prompt, after logging in where that is asked for. It then runs a loop that
reads lines and evaluates them, in a raw terminal without echo; each command stands between marks
that no echo can contain. One command runs at a time. Whatever else writes to the console (the
kernel, a daemon) is mixed into the output: binary data mostly passes, but nothing promises it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import ClassVar, Final

from vmlab.guests.agent import LONGEST_COMMAND, safe_length
from vmlab.guests.command import Command, CommandChannel, Sink, quote
from vmlab.hypervisors.base import Console
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed, VmlabError

_ESCAPES: Final = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and questions to the terminal (ECMA-48), which shells put around their prompts."""

_PROMPT: Final = re.compile(rb"[#$>%] ?\Z")
_LOGIN: Final = re.compile(rb"login: ?\Z")
_PASSWORD: Final = re.compile(rb"[Pp]assword: ?\Z")
_REFUSED: Final = re.compile(rb"[Ll]ogin incorrect")

_ENTER_EVERY: Final = 2.0
_KILL_AFTER: Final = 5.0

_PIECE: Final = 300
"""Characters, or bytes of input, in one line: with all of them quoted it stays below the 4096
bytes that a terminal holds for a slow reader (N_TTY_BUF_SIZE in Linux's n_tty.c)."""

# One line of less than 1024 bytes, which is what busybox's line editor takes. `set -m` gives each
# command a process group and leaves SIGINT alone; without a controlling terminal setsid has to do.
# The first answer tells the directory for files.
_LOOP: Final = (
    "o=$(stty -g);stty raw -echo;dmesg -n 1;set -m;x=;case $- in *m*);;*)x=setsid;;esac;"
    "V=loop;p=;n=$(printf '\\nx');n=${n%x};d=;"
    "for t in /dev/shm /tmp /run;do [ -d $t ]&&[ -w $t ]&&d=$t&&break;done;"
    'echo "$V"-TOKEN "$d";'
    'while IFS= read -r l;do eval "$l";done;stty $o'
)

# The group's first process outlives what ends the command, to tell of it. Text for str.replace.
_RUNNER: Final = (
    "trap : INT TERM HUP QUIT USR1 USR2 ALRM PIPE; echo bTOKEN $$; "
    'sh -c "$1" <"$2" 2>ERR; r=$?; echo mTOKEN; SHOW echo eTOKEN $r'
)

OpenConsole = Callable[[], Awaitable[Console]]


class ConsoleChannel(CommandChannel):
    """Commands by a login on a console, one at a time.

    Standard error comes after standard output, when the command has ended (mixed into it where the
    guest has no writable directory). Input is written to a file before the command starts.

    Args:
        open_console: Opens the console, as `Machine.console` does.
        user: Who logs in, where a login is asked for.
        password: Their password; None if none is asked for.
    """

    name: ClassVar[str] = "console"

    def __init__(
        self, open_console: OpenConsole, *, user: str = "root", password: str | None = None
    ) -> None:
        self._open = open_console
        self._user = user
        self._password = password
        self._console: Console | None = None
        self._lock = asyncio.Lock()
        self._held = b""
        self._directory = ""

    async def connect(self, *, timeout: float) -> None:
        """Find a shell, log in if need be.

        Raises:
            DeadlineExceeded: there is none within `timeout` seconds.
            OperationFailed: the login is refused.
            ChannelClosed: the machine ended meanwhile.
        """
        try:
            async with asyncio.timeout(timeout), self._lock:
                await self._drop()
                await self._shell()
        except TimeoutError:
            raise DeadlineExceeded(
                "waiting for a shell on the console",
                seconds=timeout,
                hint="the guest has to run a shell or a login on its serial console",
            ) from None

    async def _shell(self) -> Console:
        """The console, with the loop running on it."""
        if self._console is not None:
            return self._console
        console = await self._open()
        try:
            await self._start(console)
        except BaseException:
            await console.close()
            raise
        self._console = console
        return console

    async def _start(self, console: Console) -> None:
        """Press Enter, answer what is asked, until a shell runs the loop."""
        while True:
            await console.write(b"\n")
            seen = b""
            try:
                async with asyncio.timeout(_ENTER_EVERY):
                    while True:
                        seen += await self._more(console)
                        shown = _ESCAPES.sub(b"", seen)
                        if _REFUSED.search(shown):
                            raise OperationFailed(
                                f"the console refuses the login of {self._user!r}",
                                hint="check the user and the password that the image declares",
                                operation="connect",
                            )
                        if _LOGIN.search(shown):
                            await console.write(self._user.encode() + b"\n")
                            seen = b""
                        elif _PASSWORD.search(shown):
                            await console.write((self._password or "").encode() + b"\n")
                            seen = b""
                        elif _PROMPT.search(shown):
                            break
            except TimeoutError:
                # Nothing at all: perhaps the loop of a host before us, in a restored guest.
                if seen.strip() or not await self._loops(console):
                    continue
                return
            if await self._agree(console):
                return

    async def _agree(self, console: Console) -> bool:
        """Start the loop; whether it answered."""
        token = secrets.token_hex(8)
        loop = _LOOP.replace("TOKEN", f'{token[:8]}""{token[8:]}')
        await console.write(f"sh -c {quote(loop)} 2>/dev/null\n".encode())
        return await self._answered(console, token)

    async def _loops(self, console: Console) -> bool:
        """Whether the loop runs already."""
        token = secrets.token_hex(8)
        await console.write(f'echo "$V"-{token[:8]}""{token[8:]} "$d"\n'.encode())
        return await self._answered(console, token)

    async def _answered(self, console: Console, token: str) -> bool:
        self._held = b""
        try:
            # Long enough for an emulated guest under load to start a shell and a few programs.
            async with asyncio.timeout(5 * _ENTER_EVERY):
                self._directory = (await self._until(console, f"loop-{token}".encode())).decode()
        except TimeoutError:
            return False
        return True

    async def _more(self, console: Console) -> bytes:
        data = await console.read()
        if not data:
            raise ChannelClosed(
                "the console ended: the guest died or was stopped",
                hint="its log tells what happened last",
            )
        return data

    async def _until(self, console: Console, mark: bytes, sink: Sink | None = None) -> bytes:
        """Give what comes before `mark` to `sink`; returns the rest of the mark's line."""
        held, self._held = self._held, b""
        while True:
            position = held.find(mark)
            if position >= 0:
                if sink is not None and position:
                    await sink(held[:position])
                held = held[position:]
                line, newline, after = held[len(mark) :].partition(b"\n")
                if newline:
                    self._held = after
                    return line.strip()
            elif safe := safe_length(held, mark):
                if sink is not None:
                    await sink(held[:safe])
                held = held[safe:]
            held += await self._more(console)

    async def _do(self, console: Console, line: bytes) -> bytes:
        """Have the loop evaluate a line and wait until it has; returns the line's status."""
        token = secrets.token_hex(8)
        await console.write(line + f"; echo a''{token} $?\n".encode())
        return await self._until(console, f"a{token}".encode())

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        text = command.script()
        if len(text.encode("utf-8", "surrogateescape")) > LONGEST_COMMAND or "\0" in text:
            raise OperationFailed(
                f"a command has at most {LONGEST_COMMAND} bytes and no NUL",
                hint="write it to a file in the guest and run that",
                operation="execute",
            )
        async with self._lock:
            console = await self._shell()
            if command.input is not None and not self._directory:
                raise OperationFailed(
                    "the guest has no writable directory for a command's input",
                    hint="one of /dev/shm, /tmp or /run has to be writable",
                    operation="execute",
                )
            running = _Running(self._directory)
            try:
                await self._prepare(console, running, text, command.input)
                await console.write(running.line())
                process = await self._until(console, f"b{running.token}".encode())
                if started is not None:
                    started(int(process))
                await self._until(console, f"m{running.token}".encode(), stdout)
                status = await self._until(console, f"e{running.token}".encode(), stderr)
                await self._do(console, running.cleaning())
            except BaseException:
                await self._end(console, running)
                raise
            return int(status) if status.isdigit() else 255

    async def _prepare(
        self,
        console: Console,
        running: _Running,
        text: str,
        given: bytes | AsyncIterable[bytes] | None,
    ) -> None:
        """Put the script into a variable and the input into a file."""
        await self._do(console, b"s=")
        for start in range(0, len(text), _PIECE):
            piece = quote(text[start : start + _PIECE]).replace("\n", "'\"$n\"'")
            await self._do(console, f's="$s"{piece}'.encode("utf-8", "surrogateescape"))
        if given is None:
            return
        running.input = f"{running.files}.in"
        await self._do(console, f"(umask 77; : >{running.input})".encode())
        async for block in _blocks(given):
            for start in range(0, len(block), _PIECE):
                octal = _printable(block[start : start + _PIECE])
                line = f"printf '{octal}' >>{running.input}"
                if await self._do(console, line.encode()) != b"0":
                    raise OperationFailed(
                        f"the guest cannot write a command's input to {running.input}",
                        hint="its file system is full, or read-only",
                        operation="execute",
                    )

    async def _end(self, console: Console, running: _Running) -> None:
        """End a command that nobody waits for any more: SIGTERM, then SIGKILL.

        If the loop does not answer any more the console is let go of, and the next command looks
        for a shell anew.
        """
        try:
            async with asyncio.timeout(4 * _KILL_AFTER):
                await console.write(running.kill("TERM") + b"\n")
                with suppress(TimeoutError):
                    async with asyncio.timeout(_KILL_AFTER):
                        await self._until(console, f"e{running.token}".encode())
                await self._do(console, running.kill("KILL") + b"; " + running.cleaning())
        except (VmlabError, TimeoutError):
            await self._drop()
        except BaseException:
            await self._drop()
            raise

    async def signal(self, process: int, number: int) -> None:
        if self._console is None:
            raise ChannelClosed("the console is closed", operation="signal")
        await self._console.write(_kill(str(int(number)), str(int(process))) + b"\n")

    async def close(self) -> None:
        """Leave the shell at its prompt and let go of the console."""
        async with self._lock:
            if self._console is not None:
                with suppress(VmlabError):
                    await self._console.write(b"stty $o; exit\n")
            await self._drop()

    async def _drop(self) -> None:
        console, self._console = self._console, None
        self._held = b""
        if console is not None:
            await console.close()


class _Running:
    """One command's marks, files and process group."""

    def __init__(self, directory: str) -> None:
        self.token = secrets.token_hex(8)
        self.files = f"{directory}/.vmlab-{self.token}" if directory else ""
        self.input = "/dev/null"

    def line(self) -> bytes:
        """What starts the script that is in $s; the begin mark carries its process id."""
        errors = f"{self.files}.err" if self.files else ""
        runner = (
            _RUNNER.replace("ERR", errors or "&1")
            .replace("SHOW", f"cat {errors};" if errors else "")
            .replace("TOKEN", f"''{self.token}")
        )
        private = f"(umask 77; : >{errors}); " if errors else ""
        return (
            f'[ "$p" ] && wait $p; {private}'
            f'$x sh -c {quote(runner)} sh "$s" {self.input} </dev/null & p=$!\n'
        ).encode()

    def kill(self, signal: str) -> bytes:
        """A line that signals the command."""
        return _kill(signal, "$p")

    def cleaning(self) -> bytes:
        """A line that takes the command's files away."""
        return f"rm -f {self.files}.in {self.files}.err; s=".encode() if self.files else b"s="


def _kill(signal: str, process: str) -> bytes:
    return f"kill -{signal} -{process} || kill -{signal} {process}".encode()


_PLAIN: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ./:,=+_")


def _printable(data: bytes) -> str:
    """`data` as a format of printf(1) within single quotes."""
    return "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in data)


async def _blocks(given: bytes | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(given, bytes):
        yield given
        return
    async for block in given:
        yield block

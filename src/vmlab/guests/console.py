"""Commands by a shell on the serial console, for guests that have nothing else.

A shell (`vmlab.guests.console_login` finds it) runs a loop that reads lines and evaluates them, in
a raw terminal without echo; each command stands between marks that no echo can contain. One command
runs at a time. Whatever else writes to the console (a daemon, the kernel's emergencies) is mixed
into the output: binary data mostly passes, but nothing promises it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from base64 import b64encode
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import suppress
from typing import ClassVar, Final

from vmlab.guests.command import Command, CommandChannel, Sink, quote
from vmlab.guests.console_login import Asked, Dialogue, more
from vmlab.guests.marks import MarkedStream, blocks
from vmlab.hypervisors.base import Console
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, OperationFailed, VmlabError

_KILL_AFTER: Final = 5.0

_PIECE: Final = 600
"""Characters of a script in one line: with all of them quoted it stays below the 4096 bytes that a
terminal holds for a slow reader (N_TTY_BUF_SIZE in Linux's n_tty.c)."""

_BLOCK: Final = 2700
"""Bytes of input in one line as base64, which also stays below that."""

_OCTAL_BLOCK: Final = 900
"""The same where the guest has no base64, and printf has to write four digits a byte."""

# One line of less than 1024 bytes, which is what busybox's line editor takes. `set -m` gives each
# command a process group and leaves SIGINT alone; without a controlling terminal setsid has to do.
# The kernel's messages but emergencies are kept off the console (proc(5), printk) until the end.
# The first answer tells the directory for files, and of base64(1); an empty line is answered for
# those who look for the loop. Lines are read by a process without children, because a SIGCHLD makes
# busybox's read begin anew and forget what it has.
_LOOP: Final = (
    "o=$(stty -g);K=/proc/sys/kernel/printk;k=$(cat $K);echo 1 >$K;"
    """trap 'stty $o;[ "$k" ]&&echo "$k" >$K' 0;stty raw -echo;"""
    "set -m;x=;case $- in *m*);;*)x=setsid;;esac;"
    "V=loop;p=;n=$(printf '\\nx');n=${n%x};d=;"
    "for t in /dev/shm /tmp /run;do [ -d $t ]&&[ -w $t ]&&d=$t&&break;done;"
    "b=;command -v base64 >/dev/null&&b=64;"
    'echo "$V"-TOKEN "$d:$b";'
    'while l=$(IFS= read -r l&&printf %s "$l");do [ "$l" ]||echo "vmlab-$V-here";eval "$l";done'
)

# The group's first process outlives what ends the command, to tell of it. Text for str.replace.
_RUNNER: Final = (
    "trap : INT TERM HUP QUIT USR1 USR2 ALRM PIPE; echo bTOKEN $$; "
    'sh -c "$1" <"$2" 2>ERR; r=$?; echo mTOKEN; SHOW echo eTOKEN $r'
)

# A process that is waited for is gone; its id may be another's from then on.
_FORGET: Final = '[ "$p" ] && wait $p; p='

_PANIC: Final = re.compile(rb"\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? Kernel panic - not syncing")
_SILENCE: Final = 10.0
"""Seconds of silence after which a panic that was printed is this guest's, and not some log's."""

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
        self._directory = ""
        self._base64 = False
        self._refused = False

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
                self._refused = False
                await self._shell()
        except TimeoutError:
            raise DeadlineExceeded(
                "waiting for a shell on the console",
                seconds=timeout,
                hint=f"it refused the login of {self._user!r}: check user and password"
                if self._refused
                else "the guest has to run a shell or a login on its serial console",
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
        """Find a shell and have it run the loop, or find the loop of a host before us."""
        dialogue = Dialogue(console, user=self._user, password=self._password)
        answer = None
        while answer is None:
            try:
                standing = await dialogue.shell()
            finally:
                self._refused = dialogue.refused
            token = secrets.token_hex(8)
            # The mark is not in the line itself, which may be echoed.
            split = f'{token[:8]}""{token[8:]}'
            if standing is Asked.LOOP:
                line = f'{_kill("KILL", "$p")}; {_FORGET}; echo "$V"-{split} "$d:$b"'
            else:
                line = f"sh -c {quote(_LOOP.replace('TOKEN', split))} 2>/dev/null"
            answer = await dialogue.ask(line, f"loop-{token}".encode())
        self._stream = MarkedStream(_Printed(console).read)
        directory, _, base64 = answer.decode().partition(":")
        self._directory = directory
        self._base64 = base64 == "64"

    async def _until(self, mark: str, sink: Sink | None = None) -> bytes:
        """Give what comes before `mark` to `sink`; returns the rest of the mark's line."""
        line = await self._stream.until(mark.encode(), sink)
        assert line is not None  # `more` raises at the end
        return line

    async def _do(self, console: Console, line: bytes) -> bytes:
        """Have the loop evaluate a line and wait until it has; returns the line's status."""
        token = secrets.token_hex(8)
        await console.write(line + f"; echo a''{token} $?\n".encode())
        return await self._until(f"a{token}")

    async def run(
        self,
        command: Command,
        *,
        stdout: Sink,
        stderr: Sink,
        started: Callable[[int], None] | None = None,
    ) -> int:
        text = command.script()
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
                running.started = True
                await console.write(running.line())
                process = await self._until(f"b{running.token}")
                running.begun = True
                if started is not None:
                    started(int(process))
                await self._until(f"m{running.token}", stdout)
                status = await self._until(f"e{running.token}", stderr)
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
        async for block in blocks(given):
            step = _BLOCK if self._base64 else _OCTAL_BLOCK
            for start in range(0, len(block), step):
                part = block[start : start + step]
                if self._base64:
                    writes = f"echo {b64encode(part).decode()} | base64 -d"
                else:
                    writes = f"printf '{_printable(part)}'"
                if await self._do(console, f"{writes} >>{running.input}".encode()) != b"0":
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
                with suppress(TimeoutError):
                    async with asyncio.timeout(_KILL_AFTER):
                        await self._terminate(console, running)
                await self._do(console, f"{_kill('KILL', '$p')}; ".encode() + running.cleaning())
        except (VmlabError, TimeoutError):
            await self._drop()
        except BaseException:
            await self._drop()
            raise

    async def _terminate(self, console: Console, running: _Running) -> None:
        if not running.started:
            return
        if not running.begun:
            # Before it has a process group and its traps a signal would end what tells of it.
            await self._until(f"b{running.token}")
        await console.write(_kill("TERM", "$p").encode() + b"\n")
        await self._until(f"e{running.token}")

    async def ping(self) -> None:
        """Return at once: the shell runs one command at a time, and shows what is typed."""

    async def signal(self, process: int, number: int) -> None:
        if self._console is None:
            raise ChannelClosed("the console is closed", operation="signal")
        await self._console.write(_kill(str(int(number)), str(int(process))).encode() + b"\n")

    async def close(self) -> None:
        """Leave the shell at its prompt and let go of the console."""
        async with self._lock:
            if self._console is not None:
                with suppress(VmlabError):
                    await self._console.write(b"exit\n")
            await self._drop()

    async def _drop(self) -> None:
        console, self._console = self._console, None
        if console is not None:
            await console.close()


class _Printed:
    """What the console prints, until the guest's kernel panics: nothing comes after that."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = b""
        self._panicked = False

    async def read(self) -> bytes:
        try:
            async with asyncio.timeout(_SILENCE if self._panicked else None):
                data = await more(self._console)
        except TimeoutError:
            raise ChannelClosed(
                "the guest's kernel panicked", hint="the console's log tells why"
            ) from None
        self._last = (self._last + data)[-4096:]
        if _PANIC.search(self._last):
            self._panicked = True
            self._last = b""
        return data


class _Running:
    """One command's marks, files and process group."""

    def __init__(self, directory: str) -> None:
        self.token = secrets.token_hex(8)
        self.files = f"{directory}/.vmlab-{self.token}" if directory else ""
        self.input = "/dev/null"
        self.started = False
        """Whether the loop was told to start it."""
        self.begun = False
        """Whether it told its process id."""

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
            f'{private}$x sh -c {quote(runner)} sh "$s" {self.input} </dev/null & p=$!\n'
        ).encode()

    def cleaning(self) -> bytes:
        """A line that forgets the command and takes its files away."""
        files = f"rm -f {self.files}.in {self.files}.err; " if self.files else ""
        return f"{_FORGET}; {files}s=".encode()


def _kill(signal: str, process: str) -> str:
    """A line that signals a command's process group; `process` may be empty in the end."""
    return f'[ "{process}" ] && {{ kill -{signal} -{process} || kill -{signal} {process}; }}'


_PLAIN: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ./:,=+_")


def _printable(data: bytes) -> str:
    """`data` as a format of printf(1) within single quotes."""
    return "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in data)

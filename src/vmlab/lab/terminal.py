"""A command in a guest on this process's terminal: a console of the guest's as its terminal.

The console is of the kind virtio (hvc(4) in the guest); its size is set, and followed when the
window changes (SIGWINCH, tty_ioctl(4) TIOCSWINSZ by stty in the guest).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Final

from vmlab.guests.command import AgentRestarted, Command, quote
from vmlab.hypervisors.base import Console, Machine
from vmlab.lab.boot import TERMINAL
from vmlab.lab.passthrough import from_file, leash, shell_text, to_file
from vmlab.lab.session import Session, death
from vmlab.machine.errors import ChannelClosed, OperationFailed, VmlabError

ENVIRONMENT: Final = ("TERM", "COLORTERM", "LANG")
"""What a command on a terminal is told of this process's environment."""

# On ppc64le the first hvc is the serial console.
_FIND: Final = (
    "read -r active </sys/class/tty/console/active; "
    "case $active in *hvc0*) t=/dev/hvc1 ;; *) t=/dev/hvc0 ;; esac; "
)
_LEAVE: Final = b"\x1d"
Resizing = Callable[[Callable[[], None]], AbstractContextManager[None]]
_LAST_OUTPUT: Final = 5.0
"""Seconds that the command's last output has to arrive after the command has ended."""


def on_terminal() -> bool:
    """Whether stdin and stdout are a terminal."""
    return os.isatty(0) and os.isatty(1)


async def run_on_terminal(
    session: Session, words: Sequence[str], *, resizing: Resizing | None = None
) -> int:
    """Run a command of words with this process's terminal; returns its exit status.

    Args:
        session: The machine, with a console TERMINAL.
        words: The command.
        resizing: Has its argument called when the terminal's size changes, while it is entered;
            None waits for SIGWINCH, which only a loop in the main thread can.

    Raises:
        ChannelClosed: the guest died.
    """
    text = shell_text(words)
    size = os.get_terminal_size(1)
    script, end = on_console(text, size.lines, size.columns)
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    # A size that changes while an earlier change is being told is told afterwards.
    changed = asyncio.Event()
    async with await session.machine.console(TERMINAL) as console:
        with raw(0), (resizing or resizing_window)(changed.set):
            started = asyncio.Event()
            showing = asyncio.ensure_future(_show(console, end))
            parts = [
                asyncio.ensure_future(_type(console, started)),
                asyncio.ensure_future(_follow_size(session, changed)),
            ]
            try:
                status = await session.guest.channel.run(
                    Command(script, leash(session), environment),
                    stdout=to_file(1),
                    stderr=to_file(2),
                    started=lambda process: started.set(),
                )
                await asyncio.wait({showing}, timeout=_LAST_OUTPUT)
                return status
            except (AgentRestarted, ChannelClosed) as error:
                raise await death(session, text, error) from error
            finally:
                for part in (showing, *parts):
                    part.cancel()
                await asyncio.wait({showing, *parts})


async def show_console(machine: Machine, only_log: bool = False, name: str = "serial") -> int:
    """Show a console and type on it, until Ctrl-] is typed or the machine is gone.

    Args:
        machine: Whose console.
        only_log: Print what it has printed so far, and no more.
        name: Which one.
    """
    async with await machine.console(name) as console:
        await to_file(1)(await (console.log() if only_log else console.history(sys.maxsize)))
        return 0 if only_log else await converse(console)


async def converse(console: Console) -> int:
    """Show what an open console prints, and type on it, until Ctrl-] is typed or it has ended."""
    with raw(0) if os.isatty(0) else nullcontext():
        parts = {
            asyncio.ensure_future(_show(console, b"")),
            asyncio.ensure_future(_type_until_left(console)),
        }
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)
    return 0


async def _type_until_left(console: Console) -> None:
    async for data in from_file(0):
        before, left, _ = data.partition(_LEAVE)
        if before:
            await console.write(before)
        if left:
            return


def on_console(text: str, rows: int, columns: int) -> tuple[str, bytes]:
    """What has a guest's shell run `text` on the console TERMINAL, and the mark of its last output.

    Args:
        text: For the guest's shell.
        rows: Lines of the terminal.
        columns: Columns of the terminal.
    """
    token = secrets.token_hex(8)
    # It is kept open all the time: a terminal that nobody has open forgets its size.
    script = (
        f"{_FIND}exec 9<>$t; stty -F $t sane rows {rows} cols {columns}; "
        f"setsid -c sh -c {quote(text)} <&9 >&9 2>&9 9<&-; s=$?; "
        f"stty -F $t raw -echo; printf '\\001end {token}' >&9; exit $s"
    )
    return script, f"\x01end {token}".encode()


def resized(rows: int, columns: int) -> str:
    """What tells a guest's shell the size of the console TERMINAL, and whoever runs on it."""
    return f"{_FIND}stty -F $t rows {rows} cols {columns}"


async def printed(console: Console, end: bytes) -> AsyncIterator[bytes]:
    """What comes from the console, until the mark that says that all has come, if any."""
    held = b""
    while data := await console.read():
        held += data
        position = held.find(end) if end else -1
        if position >= 0:
            if position:
                yield held[:position]
            return
        keep = next((n for n in range(len(end) - 1, 0, -1) if held.endswith(end[:n])), 0)
        if len(held) > keep:
            yield held[: len(held) - keep]
        held = held[len(held) - keep :]


async def _show(console: Console, end: bytes) -> None:
    """Print what comes from the console, until the mark that says that all has come, if any."""
    show = to_file(1)
    async for data in printed(console, end):
        await show(data)


async def _type(console: Console, started: asyncio.Event) -> None:
    """What is typed here goes to the console, as soon as there is somebody to read it."""
    await started.wait()
    with suppress(ChannelClosed):
        async for data in from_file(0):
            await console.write(data)


async def _follow_size(session: Session, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        size = os.get_terminal_size(1)
        with suppress(VmlabError):
            await session.guest.execute(resized(size.lines, size.columns), timeout=10)


@contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """The terminal passes every key on, Ctrl-C included, and is as before afterwards."""
    try:
        before = termios.tcgetattr(descriptor)
        tty.setraw(descriptor)
    except termios.error as error:
        raise OperationFailed(f"this terminal cannot be used: {error}") from error
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def resizing_window(changed: Callable[[], None]) -> Iterator[None]:
    """`changed` is called whenever the terminal's window gets another size (SIGWINCH)."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)

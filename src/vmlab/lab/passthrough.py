"""A command in a guest as if it ran here: this process's stdin, stdout, stderr and signals.

Nothing is collected: output goes out as it comes, and while nobody takes it the guest waits.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from vmlab.guests.command import AgentRestarted, Command, Sink, quote
from vmlab.lab.session import Interrupts, Session, death
from vmlab.machine.errors import ChannelClosed, OperationFailed, VmlabError

_PIECE: Final = 1 << 16
_KILL_AFTER: Final = 5.0
_SHELL_TEXT: Final = re.compile(r"[\s;&|<>()$`*?]")


def to_file(descriptor: int) -> Sink:
    """A sink that writes to a file descriptor, in a thread: it may block."""

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    async def take(data: bytes) -> None:
        await asyncio.to_thread(write, data)

    return take


class Outlet:
    """A file descriptor that a command's output goes to, until it takes no more.

    What comes afterwards is dropped, so that the guest is not left waiting; `shut` is set, and
    `error` says why.
    """

    def __init__(self, descriptor: int) -> None:
        self._write = to_file(descriptor)
        self.shut = asyncio.Event()
        self.error: OSError | None = None

    async def take(self, data: bytes) -> None:
        """Write it, or drop it."""
        if self.error is None:
            try:
                await self._write(data)
            except OSError as error:
                self.error = error
                self.shut.set()


def has_input(descriptor: int) -> bool:
    """Whether there is anything to read from: open, and not the null device."""
    try:
        info = os.fstat(descriptor)
    except OSError:
        return False
    null = os.stat(os.devnull)  # noqa: PTH116 (the device is what is compared)
    return not (stat.S_ISCHR(info.st_mode) and info.st_rdev == null.st_rdev)


async def from_file(descriptor: int) -> AsyncIterator[bytes]:
    """What can be read from a file descriptor, as it comes, until its end.

    When the reader goes, nothing more is taken from it: the rest is for the next one who reads.
    """
    loop = asyncio.get_running_loop()
    pieces = asyncio.Queue[bytes]()
    room = threading.Semaphore(4)
    leaving, left = os.pipe()

    def read() -> None:
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        ready.register(leaving, select.POLLIN)
        with suppress(RuntimeError):  # the loop has ended
            while True:
                room.acquire()
                if any(number == leaving for number, _ in ready.poll()):
                    return
                try:
                    data = os.read(descriptor, _PIECE)
                except OSError:
                    data = b""
                loop.call_soon_threadsafe(pieces.put_nowait, data)
                if not data:
                    return

    def reader() -> None:
        try:
            read()
        finally:
            os.close(leaving)

    threading.Thread(target=reader, name="stdin", daemon=True).start()
    try:
        while data := await pieces.get():
            room.release()
            yield data
    finally:
        os.close(left)
        room.release()


def leash(session: Session) -> AsyncIterator[bytes] | None:
    """Input that says nothing and ends with this process, for a command in a machine that stays.

    The agent sends SIGHUP to a command whose input ends otherwise than it should. None where there
    is no need for it, or no agent.
    """
    channel = session.guest.channel
    name = getattr(getattr(channel, "choice", None), "name", channel.name)
    return _silence() if session.kept and name == "agent" else None


async def _silence() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def shell_text(words: Sequence[str]) -> str:
    """The words as they are; or a single one as text for a shell, if no program is called that."""
    if len(words) == 1 and _SHELL_TEXT.search(words[0]):
        return words[0]
    return "exec " + " ".join(quote(word) for word in words)


async def run_here(
    session: Session,
    interrupts: Interrupts,
    words: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    directory: str | None = None,
) -> int:
    """Run a command of words in the guest on this process's streams; returns its exit status.

    SIGINT goes to the command; a third one within the run ends the session instead.

    Raises:
        MachineCrashed: the guest died.
        BrokenPipeError: nobody reads stdout or stderr any more; the command was ended.
        OperationFailed: they cannot be written, because the disk is full for example; the same.
    """
    process: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    pressed = 0

    async def pass_on(number: int) -> None:
        nonlocal pressed
        pressed += 1
        if pressed >= 3:
            interrupts.to = None
            interrupts.end(number)
            return
        with suppress(VmlabError):
            await session.guest.channel.signal(await process, number)

    text = shell_text(words)
    given = from_file(0) if has_input(0) else leash(session)
    if given is not None and not has_input(0):
        text = f"exec </dev/null; {text}"
    command = Command(text, given, dict(environment or {}), directory)
    outlets = Outlet(1), Outlet(2)
    interrupts.to = pass_on

    async def send(number: int) -> None:
        await session.guest.channel.signal(await process, number)

    ending = asyncio.ensure_future(end_unread(send, outlets))
    try:
        status = await session.guest.channel.run(
            command, stdout=outlets[0].take, stderr=outlets[1].take, started=process.set_result
        )
    except (AgentRestarted, ChannelClosed) as error:
        raise await death(session, text, error) from error
    finally:
        interrupts.to = None
        ending.cancel()
        await asyncio.wait({ending})
    refuse_unwritten(outlets)
    return status


def refuse_unwritten(outlets: Sequence[Outlet]) -> None:
    """Tell of output that was dropped; the outlets are those of stdout and stderr.

    Raises:
        BrokenPipeError: nobody reads one of them any more.
        OperationFailed: one cannot be written, because the disk is full for example.
    """
    for name, outlet in zip(("stdout", "stderr"), outlets, strict=True):
        if isinstance(outlet.error, BrokenPipeError):
            raise outlet.error
        if outlet.error is not None:
            raise OperationFailed(
                f"the command's {name} cannot be written here: {outlet.error.strerror}; "
                "the command was ended",
                operation="run",
            ) from outlet.error


async def end_unread(send: Callable[[int], Awaitable[None]], outlets: Sequence[Outlet]) -> None:
    """End a command whose output goes nowhere any more, by what ends one here (pipe(7)).

    `send` sends it a signal.

    One that ignores SIGPIPE would find out by its next write; here it is killed a little later.
    """
    waiting = [asyncio.ensure_future(outlet.shut.wait()) for outlet in outlets]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for number in (signal.SIGPIPE, signal.SIGKILL):
            with suppress(VmlabError):
                await send(number)
            await asyncio.sleep(_KILL_AFTER)
    finally:
        for task in waiting:
            task.cancel()

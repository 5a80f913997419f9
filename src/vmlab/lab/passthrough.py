"""A command in a guest as if it ran here: this process's stdin, stdout, stderr and signals.

Nothing is collected: output goes out as it comes, and while nobody takes it the guest waits.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

from vmlab.guests.command import AgentRestarted, Command, Sink, quote
from vmlab.lab.session import Interrupts, Session, death
from vmlab.machine.errors import ChannelClosed, VmlabError

_PIECE: Final = 1 << 16
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

    The thread that reads is left waiting when the reader goes: a read cannot be called back.
    """
    loop = asyncio.get_running_loop()
    pieces = asyncio.Queue[bytes]()
    room = threading.Semaphore(4)

    def read() -> None:
        with suppress(RuntimeError):  # the loop has ended
            while True:
                room.acquire()
                try:
                    data = os.read(descriptor, _PIECE)
                except OSError:
                    data = b""
                loop.call_soon_threadsafe(pieces.put_nowait, data)
                if not data:
                    return

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while data := await pieces.get():
        room.release()
        yield data


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
        ChannelClosed: the guest died.
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
    command = Command(
        text, from_file(0) if has_input(0) else None, dict(environment or {}), directory
    )
    interrupts.to = pass_on
    try:
        return await session.guest.channel.run(
            command, stdout=to_file(1), stderr=to_file(2), started=process.set_result
        )
    except (AgentRestarted, ChannelClosed) as error:
        raise await death(session, text, error) from error
    finally:
        interrupts.to = None

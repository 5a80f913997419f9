"""Consoles and guest channels: streams over the Unix sockets of a machine's process.

It serves one client of a socket at a time and keeps a log of each console by itself. A console
can have any number of readers here, who go on reading when the machine is started again; a channel
has one, and ends with the process.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import struct
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmlab.engine.panic import PanicWatch
from vmlab.hypervisors.base import Channel, Console
from vmlab.hypervisors.qmp import connect_socket
from vmlab.machine.errors import ChannelClosed
from vmlab.machine.spec import Console as ConsoleSpec

_CHUNK: Final = 65536
_LOG_LAG: Final = 1.0
"""Seconds that the log may lag behind what was sent."""
_TAIL: Final = 256
"""Bytes of what was sent last that are looked for in the log."""
_WINDOW: Final = 65536
"""Bytes at the log's end that they are looked for in."""
_HANDED_ON: Final = 4
"""Turns of the event loop in which what was read from a socket comes to who waits for it."""
_RUN: Final = re.compile(rb"(.)\1+", re.DOTALL)


def console_socket(name: str) -> str:
    """The socket of a console, in the directory of the process."""
    return f"console-{name}.sock"


def channel_socket(name: str) -> str:
    """The socket of a guest channel, in the directory of the process."""
    return f"channel-{name}.sock"


def console_log(console: ConsoleSpec) -> str:
    """The file that a console's output is kept in, in the directory of the machine."""
    return f"console-{console.name}.log"


class SocketChannel(Channel):
    """A guest channel."""

    def __init__(
        self,
        name: str,
        machine: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.name = name
        self.closed = False
        self._machine = machine
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, name: str, machine: str, path: Path) -> SocketChannel:
        """Connect to the socket at `path`.

        Raises:
            ChannelClosed: nobody listens there.
        """
        try:
            reader, writer = await asyncio.open_connection(sock=connect_socket(path), limit=1 << 20)
        except OSError as error:
            raise ChannelClosed(
                f"channel {name!r} cannot be opened: {error.strerror or error}",
                hint="look whether the machine still runs",
                machine=machine,
                operation="channel",
            ) from error
        return cls(name, machine, reader, writer)

    async def read(self, size: int = _CHUNK) -> bytes:
        try:
            return await self._reader.read(size)
        except (ConnectionError, OSError):
            return b""

    async def write(self, data: bytes) -> None:
        # At its end a stream takes writes for a while and drops them.
        if not self.closed and not self._reader.at_eof() and not self._writer.is_closing():
            try:
                self._writer.write(data)
                await self._writer.drain()
                return
            except (ConnectionError, OSError):
                self.closed = True
        raise ChannelClosed(
            f"channel {self.name!r} has ended: the guest is gone",
            hint="open the channel again when the machine runs",
            machine=self._machine,
            operation="channel",
        )

    async def close(self) -> None:
        self.closed = True
        if self._writer.transport.get_write_buffer_size():
            # Nobody may ever take the rest: closing would wait for that.
            self._writer.transport.abort()
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except (ConnectionError, OSError):
            # It was closed from the other side.
            return


class _Pipe:
    """Bytes on their way to one reader."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self.ended = False

    def feed(self, data: bytes) -> None:
        self._buffer += data
        self._news.set()

    def end(self) -> None:
        self.ended = True
        self._news.set()

    async def read(self, size: int) -> bytes:
        while not self._buffer and not self.ended:
            self._news.clear()
            await self._news.wait()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


class ConsoleLine:
    """One console of a machine, over all its processes.

    Args:
        name: Its name.
        machine: Name of the machine, for errors.
        log: Where the process keeps what the guest prints.
    """

    def __init__(self, name: str, machine: str, log: Path) -> None:
        self.name = name
        self.machine = machine
        self._log = log
        self._pipes: set[_Pipe] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None
        self._tail = b""
        self._panics = PanicWatch()

    async def connect(self, path: Path) -> None:
        """Attach to a process that has just been started or found again.

        Raises:
            OSError: it does not listen.
        """
        await self.disconnect()
        self._tail = b""
        self._panics.reset()
        reader, writer = await asyncio.open_connection(sock=connect_socket(path))
        self._writer = writer
        self._pump = asyncio.create_task(self._run(reader))

    async def _run(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                data = await reader.read(_CHUNK)
            except (ConnectionError, OSError):
                return
            if not data:
                return
            self._tail = (self._tail + data)[-_TAIL:]
            self._panics.feed(data)
            for pipe in self._pipes:
                pipe.feed(data)

    async def panicked(self) -> str:
        """What the kernel said of a panic before it began anew just now; empty if it did not."""
        await self._caught_up()
        reason = self._panics.reason
        self._panics.reset()
        return reason

    async def _caught_up(self) -> None:
        """Wait until all that was sent before this call has been read."""
        while self._unread():  # noqa: ASYNC110 (the loop reads it meanwhile)
            await asyncio.sleep(0)
        for _ in range(_HANDED_ON):
            await asyncio.sleep(0)

    def _unread(self) -> bool:
        """Whether the socket has something that the pump will read."""
        writer, pump = self._writer, self._pump
        if writer is None or writer.is_closing() or pump is None or pump.done():
            return False
        waiting = fcntl.ioctl(writer.get_extra_info("socket"), termios.FIONREAD, bytes(4))
        return struct.unpack("i", waiting) != (0,)

    async def drain(self) -> None:
        """Read to its end what a process that has ended had sent."""
        if self._pump is not None:
            await self._pump
        await self.disconnect()

    async def disconnect(self) -> None:
        """Let go of the process; readers stay."""
        pump, writer = self._pump, self._writer
        self._pump = self._writer = None
        if pump is not None:
            pump.cancel()
            await asyncio.wait([pump])
        if writer is not None:
            writer.close()
            try:
                await writer.wait_closed()
            except (ConnectionError, OSError):
                # The process closed it first.
                return

    def reader(self) -> MachineConsole:
        """A new reader, of what comes from now on."""
        pipe = _Pipe()
        self._pipes.add(pipe)
        return MachineConsole(self, pipe, self._pipes.discard)

    async def write(self, data: bytes) -> None:
        """Type `data`.

        Raises:
            ChannelClosed: the machine is off.
        """
        writer, pump = self._writer, self._pump
        if writer is not None and pump is not None and not pump.done():
            try:
                writer.write(data)
                await writer.drain()
                return
            except (ConnectionError, OSError):
                # It ended just now; the error is the same.
                self._writer = None
        raise ChannelClosed(
            f"console {self.name!r} has nobody behind it: the machine is off",
            hint="start the machine first",
            machine=self.machine,
            operation="console",
        )

    async def log(self) -> bytes:
        """All that was printed; what a reader has been given is in it.

        QEMU logs a character twice that its socket did not take at once, as it does not when
        nobody reads for a while.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + _LOG_LAG
        tail = self._tail
        while True:
            text = await asyncio.to_thread(self._read)
            # The socket is written to first.
            if _ends_with(text, tail) or now() >= deadline:
                return text
            await asyncio.sleep(0.001)

    def _read(self) -> bytes:
        return self._log.read_bytes() if self._log.exists() else b""

    def end(self) -> None:
        """The machine is gone: all readers are at their end."""
        for pipe in self._pipes:
            pipe.end()
        self._pipes.clear()


def _ends_with(log: bytes, sent: bytes) -> bool:
    """Whether what was sent last is near the end of a log; of a run, one character counts."""
    return _RUN.sub(rb"\1", sent) in _RUN.sub(rb"\1", log[-_WINDOW:])


class MachineConsole(Console):
    """One reader of a console."""

    def __init__(self, line: ConsoleLine, pipe: _Pipe, forget: Callable[[_Pipe], None]) -> None:
        self.name = line.name
        self._line = line
        self._pipe = pipe
        self._forget = forget

    async def read(self, size: int = _CHUNK) -> bytes:
        return await self._pipe.read(size)

    async def write(self, data: bytes) -> None:
        if self._pipe.ended:
            raise ChannelClosed(
                f"console {self.name!r} was closed",
                hint="open it again",
                machine=self._line.machine,
                operation="console",
            )
        await self._line.write(data)

    async def log(self) -> bytes:
        return await self._line.log()

    async def close(self) -> None:
        self._pipe.end()
        self._forget(self._pipe)

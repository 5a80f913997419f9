"""Consoles and guest channels: streams over the Unix sockets of a machine's process.

It serves one client of a socket at a time and keeps a log of each console by itself. A console
can have any number of readers here, who go on reading when the machine is started again; a channel
has one, and ends with the process.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmlab.engine.panic import PanicWatch
from vmlab.hypervisors.base import Channel, Console
from vmlab.hypervisors.qmp import connect_socket
from vmlab.machine.errors import ChannelClosed
from vmlab.machine.spec import Console as ConsoleSpec

_CHUNK: Final = 65536
_LOG_LAG: Final = 10.0
"""Seconds that the log may lag behind what was sent: the host may be busy."""
_TAIL: Final = 256
"""Bytes of what was sent last that are looked for in the log."""
_WINDOW: Final = 65536
"""Bytes at the log's end that they are looked for in."""
_HANDED_ON: Final = 4
"""Turns of the event loop in which what was read from a socket comes to who waits for it."""
_SOONEST: Final = 0.001
_LATEST: Final = 0.03
"""Seconds between two looks at a log: while it grows, and while it does not."""
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
        self.fed = 0
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self.ended = False

    def feed(self, data: bytes) -> None:
        self.fed += len(data)
        self._buffer += data
        self._taken.clear()
        self._news.set()

    def end(self) -> None:
        self.ended = True
        self._news.set()
        self._taken.set()

    async def read(self, size: int) -> bytes:
        while not self._buffer and not self.ended:
            self._news.clear()
            self._taken.set()
            await self._news.wait()
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def taken(self) -> None:
        """Wait until the reader has come back for more than there is."""
        await self._taken.wait()


class ConsoleLine:
    """One console of a machine, over all its processes.

    What the guest prints is read from the log, until somebody types: where a client of its socket
    is slow, QEMU makes the guest wait, and in the end loses some, and logs twice what the socket
    did not take at once. Without a client it does neither. From the first answer to a key on, it
    is read from the socket.

    Args:
        name: Its name.
        machine: Name of the machine, for errors.
        log: Where the process keeps what the guest prints.

    Attributes:
        by_socket: Whether it is read from the socket by now.
    """

    def __init__(self, name: str, machine: str, log: Path) -> None:
        self.name = name
        self.machine = machine
        self.by_socket = False
        self._log = log
        self._pipes: set[_Pipe] = set()
        self._panics = PanicWatch()
        # The log: how much of it was given to readers, and who looks whether there is more.
        self._offset = 0
        self._follower: asyncio.Task[None] | None = None
        # The socket: where it is, and its client since somebody typed.
        self._path: Path | None = None
        self._socket: socket.socket | None = None
        self._pump: asyncio.Task[None] | None = None
        self._typing = asyncio.Lock()
        self._tail = b""
        # How long the log was when the process got its client.
        self._served_from = 0
        # Bytes that will come from the socket, and that readers had from the log.
        self._known = 0

    async def connect(self, path: Path) -> None:
        """A process has just been started or found again; it listens at `path`."""
        await self.disconnect()
        self._path = path
        self.by_socket = False
        self._tail = b""
        self._offset = self._size()
        self._panics.reset()
        self._follow()

    def reader(self) -> MachineConsole:
        """A new reader, of what comes from now on."""
        self._advance()
        pipe = _Pipe()
        self._pipes.add(pipe)
        self._follow()
        return MachineConsole(self, pipe, self._pipes.discard)

    def _give(self, data: bytes) -> None:
        self._panics.feed(data)
        for pipe in self._pipes:
            pipe.feed(data)

    # The log.

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0

    def _follow(self) -> None:
        """Have somebody look whether the log grows, as long as anybody reads."""
        if self._path is not None and self._pipes and self._follower is None:
            self._follower = asyncio.create_task(self._grows())

    async def _grows(self) -> None:
        quiet = _SOONEST
        try:
            while self._pipes and not self.by_socket:
                quiet = _SOONEST if self._advance() else min(2 * quiet, _LATEST)
                await asyncio.sleep(quiet)
        finally:
            self._follower = None

    def _advance(self, end: int | None = None) -> bool:
        """Give readers what is new in the log, up to a place in it; whether there was anything."""
        if self._path is None or self.by_socket or self._size() <= self._offset:
            return False
        with self._log.open("rb") as log:
            log.seek(self._offset)
            # Where nobody has read for long, there is much.
            while data := log.read(_CHUNK if end is None else max(0, end - self._offset)):
                self._offset += len(data)
                self._give(data)
        return True

    # The socket.

    async def write(self, data: bytes) -> None:
        """Type `data`.

        Raises:
            ChannelClosed: the machine is off.
        """
        try:
            if self._socket is None and self._path is not None:
                self._served_from = self._size()
                self._socket = connect_socket(self._path)
                self._pump = asyncio.create_task(self._run(self._socket))
            client, pump = self._socket, self._pump
            if client is not None and pump is not None and not pump.done():
                async with self._typing:
                    await asyncio.get_running_loop().sock_sendall(client, data)
                return
        except OSError as error:
            raise self._off() from error
        raise self._off()

    def _off(self) -> ChannelClosed:
        return ChannelClosed(
            f"console {self.name!r} has nobody behind it: the machine is off",
            hint="start the machine first",
            machine=self.machine,
            operation="console",
        )

    async def _run(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(client, _CHUNK)
            except OSError:
                return
            if not data:
                return
            if self.by_socket:
                known = min(self._known, len(data))
                self._known -= known
                if data := data[known:]:
                    self._tail = (self._tail + data)[-_TAIL:]
                    self._give(data)
            else:
                await self._change_over(client, data)

    async def _change_over(self, client: socket.socket, data: bytes) -> None:
        """The process serves this client: from now on the socket counts.

        What it has sent until now is, or will be in a moment, in the log as well, from which
        readers have it until then. Where that never comes a character may be lost or come twice.

        Args:
            client: The socket.
            data: The first that it has sent.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + _LOG_LAG
        sent, count = data, len(data)
        while (end := self._logged_until(sent, count)) is None and now() < deadline:
            await asyncio.sleep(_SOONEST)
            while known := _unread(client):
                more = client.recv(known)
                sent, count = (sent + more)[-_TAIL:], count + len(more)
        self._advance(end)
        # What readers have from the log beyond that comes yet.
        self._known = _unread(client) if end is None else self._offset - end
        self.by_socket = True

    def _logged_until(self, sent: bytes, count: int) -> int | None:
        """Where the log has the end of what was sent to the client; None if it has not yet.

        Args:
            sent: The last of it.
            count: How much it was in all.
        """
        sent = sent[-_TAIL:]
        first = max(self._served_from, self._size() - _WINDOW)
        earliest = self._served_from + count - len(sent) - first
        found = self._read(first, None).find(sent, max(0, earliest))
        return first + found + len(sent) if found >= 0 else None

    async def panicked(self) -> str:
        """What the kernel said of a panic before it began anew just now; empty if it did not."""
        await self._caught_up()
        reason = self._panics.reason
        self._panics.reset()
        return reason

    async def catch_up(self, pipe: _Pipe) -> None:
        """Wait until a reader has taken all that was printed before this call."""
        await self._caught_up()
        await pipe.taken()

    async def _caught_up(self) -> None:
        """Wait until all that was printed before this call has been given to readers."""
        self._advance()
        client, pump = self._socket, self._pump
        if not self.by_socket or client is None or pump is None:
            return
        while not pump.done() and _unread(client):  # noqa: ASYNC110 (the loop reads it meanwhile)
            await asyncio.sleep(0)
        for _ in range(_HANDED_ON):
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """Read to its end what a process that has ended had printed."""
        if self._pump is not None:
            await self._pump
        self._advance()
        await self.disconnect()

    async def disconnect(self) -> None:
        """Let go of the process; readers stay."""
        self._advance()
        tasks = [task for task in (self._follower, self._pump) if task is not None]
        client = self._socket
        self._follower = self._pump = self._socket = self._path = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if client is not None:
            # Who still types learns of it: nobody is told of a file that is closed.
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            async with self._typing:
                client.close()

    async def log(self) -> bytes:
        """All that was printed; what a reader has been given is in it.

        QEMU logs a character twice that its socket did not take at once.
        """
        await self._logged()
        return await asyncio.to_thread(self._read, 0, None)

    async def before(self, pipe: _Pipe, size: int) -> bytes:
        """The last that was printed before what a reader was given, at most `size` bytes."""
        await self._caught_up()
        await self._logged()
        by_log = self._path is not None and not self.by_socket
        given = self._offset if by_log else self._size() - _unread(self._socket)
        end = given - pipe.fed
        return await asyncio.to_thread(self._read, max(0, end - size), max(0, end))

    async def _logged(self) -> None:
        """Wait until what was sent last is in the log, or will hardly ever be."""
        now = asyncio.get_running_loop().time
        deadline = now() + _LOG_LAG
        tail = self._tail
        while True:
            # The socket is written to first.
            if _ends_with(self._read(self._size() - _WINDOW, None), tail) or now() >= deadline:
                return
            await asyncio.sleep(0.001)

    def _read(self, start: int, end: int | None) -> bytes:
        """What stands in the log from one place to another, or to its end."""
        if not self._log.exists():
            return b""
        with self._log.open("rb") as log:
            log.seek(max(0, start))
            return log.read() if end is None else log.read(end - log.tell())

    def end(self) -> None:
        """The machine is gone: all readers are at their end."""
        for pipe in self._pipes:
            pipe.end()
        self._pipes.clear()


def _unread(client: socket.socket | None) -> int:
    """How many bytes have arrived at a socket and were not read (ioctl_tty(2), FIONREAD)."""
    if client is None:
        return 0
    count = fcntl.ioctl(client, termios.FIONREAD, bytes(4))
    return int(struct.unpack("i", count)[0])


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

    async def history(self, size: int) -> bytes:
        return await self._line.before(self._pipe, size)

    async def catch_up(self) -> None:
        await self._line.catch_up(self._pipe)

    async def close(self) -> None:
        self._pipe.end()
        self._forget(self._pipe)

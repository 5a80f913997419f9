"""The host's ends of a simulated machine's console and guest channels.

Bytes go both ways through plain buffers; whoever reads waits until there are some or the other
side is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmlab.hypervisors.base import Channel, Console
from vmlab.machine.errors import ChannelClosed

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.hardware import Hardware


class Pipe:
    """Bytes on their way to a reader; they end when the writer does."""

    __slots__ = ("_buffer", "_waiting", "ended")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiting: list[asyncio.Future[None]] = []
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Add bytes; those that come after the end are lost."""
        if not self.ended:
            self._buffer += data
            self._wake()

    def end(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._wake()

    def discard(self) -> None:
        """The reader has let go: what was not read never will be."""
        self._buffer.clear()
        self.end()

    async def read(self, size: int) -> bytes:
        """At least one byte and at most `size`; b"" at the end."""
        while not self._buffer and not self.ended:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()


class SimulatedChannel(Channel):
    """A guest channel: what is written goes to the guest, what the guest answers is read.

    Args:
        name: The channel's name.
        machine: The machine's name, for errors.
        send: Hands bytes to the guest.
        closed: Called once when this end is closed.
    """

    def __init__(
        self,
        name: str,
        machine: str,
        send: Callable[[SimulatedChannel, bytes], None],
        closed: Callable[[SimulatedChannel], None],
    ) -> None:
        self.name = name
        self.pipe = Pipe()
        # The beginning of a line whose end has not come yet.
        self.unfinished = b""
        self._machine = machine
        self._send = send
        self._closed = closed

    async def read(self, size: int = 65536) -> bytes:
        return await self.pipe.read(size)

    async def write(self, data: bytes) -> None:
        if self.pipe.ended:
            raise ChannelClosed(
                f"channel {self.name!r} has ended: the guest is gone",
                hint="open the channel again when the machine runs",
                machine=self._machine,
                operation="channel",
            )
        self._send(self, data)
        await asyncio.sleep(0)

    async def close(self) -> None:
        self.pipe.discard()
        self._closed(self)


class SimulatedConsole(Console):
    """A console: what the guest prints from now on is read, and all of it is in the log."""

    def __init__(self, name: str, hardware: Hardware) -> None:
        self.name = name
        self.pipe = Pipe()
        self._hardware = hardware
        self._start = len(hardware.consoles[name])
        hardware.listeners[name].append(self.pipe)

    async def read(self, size: int = 65536) -> bytes:
        return await self.pipe.read(size)

    async def write(self, data: bytes) -> None:
        if self.pipe.ended or not self._hardware.has_power:
            raise ChannelClosed(
                f"console {self.name!r} has nobody behind it: the machine is off",
                hint="start the machine first",
                machine=self._hardware.name,
                operation="console",
            )
        self._hardware.type_on_console(self.name, data)
        await asyncio.sleep(0)

    async def close(self) -> None:
        self.pipe.discard()
        listeners = self._hardware.listeners[self.name]
        if self.pipe in listeners:
            listeners.remove(self.pipe)

    async def log(self) -> bytes:
        return bytes(self._hardware.consoles[self.name])

    async def history(self, size: int) -> bytes:
        return bytes(self._hardware.consoles[self.name][max(0, self._start - size) : self._start])

"""The console device with several ports (virtio 1.2, 5.3): consoles and guest channels.

A port is joined to an `Endpoint` on the host (a socket, a stream). What the guest sends while
nobody is there is dropped; what it sends faster than the endpoint takes waits in its queue.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

from vmlab.engine.devices.virtio.device import Request, VirtioDevice
from vmlab.engine.devices.workers import Workers
from vmlab.engine.memory.ram import Ram

F_SIZE: Final = 0
F_MULTIPORT: Final = 1
F_EMERG_WRITE: Final = 2

_DEVICE_READY: Final = 0
_DEVICE_ADD: Final = 1
_DEVICE_REMOVE: Final = 2
_PORT_READY: Final = 3
_CONSOLE_PORT: Final = 4
_RESIZE: Final = 5
_PORT_OPEN: Final = 6
_PORT_NAME: Final = 7

_CONTROL: Final = struct.Struct("<IHH")
_CONFIG: Final = struct.Struct("<HHII")
_EMERGENCY: Final = 8
"""Offset of `emerg_wr` in the configuration space."""
_CONTROL_RECEIVE: Final = 2
_CONTROL_SEND: Final = 3
_PIECE: Final = 65536
_MAX_CONTROL: Final = 1024
"""Control messages that wait for a driver which takes none; more than that many are its fault."""


class Endpoint(Protocol):
    """The host's side of a port. Its methods are called from workers."""

    def attach(self, port: Port) -> None:
        """The port that this endpoint belongs to; called once."""

    def send(self, data: bytes) -> int:
        """Bytes from the guest; how many were taken. If not all: call `port.resume` later.

        Nobody there: all are.
        """

    def receive(self, size: int) -> bytes:
        """Up to `size` bytes for the guest; none if there are none now."""

    @property
    def connected(self) -> bool:
        """Whether somebody is there."""

    def close(self) -> None:
        """Release what it holds."""


@dataclass
class PortState:
    """Everything that a snapshot must hold of a port."""

    guest_ready: bool = False
    guest_open: bool = False


@dataclass
class ConsoleState:
    """Everything that a snapshot must hold of the device; its ports have states of their own."""

    columns: int = 0
    rows: int = 0
    control: deque[bytes] = field(default_factory=deque)
    """Messages that wait for buffers of the control queue."""


class Port:
    """One port of a console device.

    Args:
        name: What the guest finds it by (/dev/virtio-ports/NAME); "" for a console.
        endpoint: The host's side.
        console: Whether the guest shall use it as a console (hvc).
    """

    def __init__(self, name: str, endpoint: Endpoint, *, console: bool = False) -> None:
        self.name = name
        self.endpoint = endpoint
        self.console = console
        self.state = PortState()
        self.number = -1
        self._device: VirtioConsole | None = None

    def join(self, device: VirtioConsole, number: int) -> None:
        """Become port `number` of a device."""
        self.number = number
        self._device = device
        self.endpoint.attach(self)

    def resume(self) -> None:
        """The endpoint takes bytes again."""
        if self._device is not None:
            self._device.kick(_queues(self.number)[1])

    def arrived(self) -> None:
        """The endpoint has bytes for the guest."""
        if self._device is not None:
            self._device.kick(_queues(self.number)[0])

    def connection_changed(self) -> None:
        """Somebody has come to the endpoint, or left it."""
        if self._device is not None:
            self._device.tell_open(self)


def _queues(port: int) -> tuple[int, int]:
    """The receive and the transmit queue of a port (5.3.2)."""
    return (0, 1) if port == 0 else (2 * port + 2, 2 * port + 3)


class VirtioConsole(VirtioDevice):
    """The device; port 0 comes first and is a console unless it has a name.

    Args:
        ports: From port 0 on; at least one.
        columns: Width of the console in characters; 0 if nobody knows.
        rows: Height of the console.
    """

    device_id: ClassVar[int] = 3

    def __init__(
        self,
        name: str,
        ram: Ram,
        workers: Workers,
        ports: list[Port],
        *,
        columns: int = 0,
        rows: int = 0,
    ) -> None:
        self.ports = ports
        self.own = ConsoleState(columns, rows)
        queues = [128, 128, 32, 32] + [128, 128] * (len(ports) - 1)
        features = 1 << F_SIZE | 1 << F_MULTIPORT | 1 << F_EMERG_WRITE
        super().__init__(name, ram, workers, queues, features)
        for number, port in enumerate(ports):
            port.join(self, number)

    def config(self) -> bytes:
        """struct virtio_console_config (5.3.4)."""
        return _CONFIG.pack(self.own.columns, self.own.rows, len(self.ports), 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """A character for the emergency console; the driver may do so before it is up."""
        if offset == _EMERGENCY and data:
            self.ports[0].endpoint.send(data[:1])

    def resize(self, columns: int, rows: int) -> None:
        """The terminal at the console has another size."""
        with self.lock:
            self.own.columns, self.own.rows = columns, rows
            for port in self.ports:
                if port.console and port.state.guest_ready:
                    # The spec's text has columns first, Linux and QEMU rows first (5.3.6.2 note).
                    self._tell(port.number, _RESIZE, 0, struct.pack("<HH", rows, columns))
        self.config_changed()

    def on_reset(self) -> None:
        """No port is open or ready."""
        self.own.control.clear()
        for port in self.ports:
            port.state = PortState()

    def close(self) -> None:
        """Close all endpoints."""
        for port in self.ports:
            port.endpoint.close()

    # --------------------------------------------------------------------------- control queue

    def _tell(self, port: int, event: int, value: int, text: bytes = b"") -> None:
        if len(self.own.control) < _MAX_CONTROL:
            self.own.control.append(_CONTROL.pack(port, event, value) + text)
            self.kick(_CONTROL_RECEIVE)

    def tell_open(self, port: Port) -> None:
        """Tell the driver whether somebody is at the port's other end."""
        with self.lock:
            if port.state.guest_ready and self.has(F_MULTIPORT):
                self._tell(port.number, _PORT_OPEN, int(port.endpoint.connected))

    def _listen(self, message: bytes) -> None:
        if len(message) < _CONTROL.size:
            return
        number, event, value = _CONTROL.unpack_from(message)
        with self.lock:
            if event == _DEVICE_READY:
                if value:
                    for port in self.ports:
                        self._tell(port.number, _DEVICE_ADD, 1)
                return
            if number >= len(self.ports):
                return
            port = self.ports[number]
            if event == _PORT_READY and value:
                port.state.guest_ready = True
                if port.console:
                    self._tell(number, _CONSOLE_PORT, 1)
                if port.name:
                    self._tell(number, _PORT_NAME, 1, port.name.encode() + b"\0")
                if port.endpoint.connected:
                    self._tell(number, _PORT_OPEN, 1)
            elif event == _PORT_OPEN:
                port.state.guest_open = bool(value)
        if event == _PORT_OPEN and value:
            self.kick(_queues(number)[0])

    # ----------------------------------------------------------------------------------- data

    def process(self, index: int) -> None:
        """Serve one queue."""
        if index == _CONTROL_RECEIVE:
            self._send_control()
        elif index == _CONTROL_SEND:
            while (request := self.take(index)) is not None:
                self._listen(request.read(_MAX_CONTROL))
                request.done()
        else:
            number = 0 if index < 2 else (index - 2) // 2
            if index & 1:
                self._from_guest(self.ports[number], index)
            else:
                self._to_guest(self.ports[number], index)

    def _send_control(self) -> None:
        while self.own.control:
            request = self.take(_CONTROL_RECEIVE)
            if request is None:
                return
            try:
                message = self.own.control.popleft()
            except IndexError:  # a reset has come between
                request.put_back()
                return
            request.write(message)
            request.done()

    def _from_guest(self, port: Port, index: int) -> None:
        while (request := self.take(index)) is not None:
            while data := request.read(_PIECE):
                taken = port.endpoint.send(data)
                if taken < len(data):
                    self._wait_for_room(request, data[taken:])
                    return
            request.done(0)

    def _wait_for_room(self, request: Request, unsent: bytes) -> None:
        """Shorten the chain to what is still to be sent, and let it be the next again."""
        left = len(unsent) + request.left_to_read
        skip = request.readable - left
        segments: list[tuple[int, int]] = []
        for address, size in request.chain.readable:
            cut = min(skip, size)
            skip -= cut
            if cut < size:
                segments.append((address + cut, size - cut))
        request.chain.readable = segments
        request.put_back()

    def _to_guest(self, port: Port, index: int) -> None:
        # Without the multiport feature there is one port and nobody opens it.
        while port.state.guest_open or not self.has(F_MULTIPORT) or port.console:
            request = self.take(index)
            if request is None:
                return
            data = port.endpoint.receive(min(request.writable, _PIECE))
            if not data:
                request.put_back()
                return
            request.write(data)
            request.done()

"""The network device (virtio 1.2, 5.1) on a segment: frames in and out, mergeable buffers.

No offloads: a checksum is the guest's own business, and frames have at most 65,550 bytes.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar, Final, Protocol

from vmlab.engine.devices.virtio.device import Request, VirtioDevice
from vmlab.engine.devices.virtio.wire_faults import WireFaults
from vmlab.engine.devices.workers import Workers
from vmlab.engine.memory.ram import Ram

F_MTU: Final = 3
F_MAC: Final = 5
F_MRG_RXBUF: Final = 15
F_STATUS: Final = 16
F_CTRL_VQ: Final = 17
F_GUEST_ANNOUNCE: Final = 21

_RECEIVE: Final = 0
_TRANSMIT: Final = 1
_CONTROL: Final = 2
_LINK_UP: Final = 1
_ANNOUNCE: Final = 2
_HEADER: Final = 12
_NUM_BUFFERS: Final = 10
_CONFIG: Final = struct.Struct("<6sHHH")
_CLASS_ANNOUNCE: Final = 3
_ANNOUNCE_ACK: Final = 0
_CONTROL_OK: Final = 0
_CONTROL_ERROR: Final = 1

MAX_FRAME: Final = 65_550
BACKLOG: Final = 256
"""Frames that wait for buffers of the guest's; what comes then is dropped, or not read yet."""


class Segment(Protocol):
    """A network that the device is plugged into."""

    def attach(self, device: VirtioNet) -> None:
        """The device on this end; called once."""

    def send(self, frame: bytes) -> bool:
        """Put a frame on the wire; False: not now, `device.resume` will be called."""

    def resume(self) -> None:
        """The device takes frames again."""

    def close(self) -> None:
        """Leave the segment."""


@dataclass
class NetState:
    """Everything that a snapshot must hold."""

    link_up: bool = True
    announce: bool = False
    backlog: deque[bytes] = field(default_factory=deque)


@dataclass
class NetCounters:
    """What went through, for metrics."""

    received: int = 0
    received_bytes: int = 0
    sent: int = 0
    sent_bytes: int = 0
    dropped: int = 0


class VirtioNet(VirtioDevice):
    """The device.

    Args:
        mac: Six bytes.
        segment: Where it is plugged in.
        mtu: What the driver is told, or 0 to tell nothing.

    Attributes:
        faults: What befalls its frames; None is nothing at all.
    """

    device_id: ClassVar[int] = 1

    def __init__(
        self,
        name: str,
        ram: Ram,
        workers: Workers,
        mac: bytes,
        segment: Segment,
        *,
        mtu: int = 0,
        queue_size: int = 256,
    ) -> None:
        features = 1 << F_MAC | 1 << F_STATUS | 1 << F_MRG_RXBUF
        features |= 1 << F_CTRL_VQ | 1 << F_GUEST_ANNOUNCE
        if mtu:
            features |= 1 << F_MTU
        self.counters = NetCounters()
        self.own = NetState()
        self.mac = mac
        self._mtu = mtu
        self._segment = segment
        self.faults: WireFaults | None = None
        super().__init__(name, ram, workers, [queue_size, queue_size, 64], features)
        segment.attach(self)

    def config(self) -> bytes:
        """struct virtio_net_config (5.1.4)."""
        status = (_LINK_UP if self.own.link_up else 0) | (_ANNOUNCE if self.own.announce else 0)
        return _CONFIG.pack(self.mac, status, 1, self._mtu)

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it out."""
        if self.own.link_up != up:
            self.own.link_up = up
            self.config_changed()

    def announce(self) -> None:
        """Ask the guest to tell the network where it is now (after a migration or a fork)."""
        if self.has(F_GUEST_ANNOUNCE):
            self.own.announce = True
            self.config_changed()

    def on_reset(self) -> None:
        """Nothing is to be announced and what waited is gone."""
        self.own.announce = False
        self.own.backlog.clear()

    def close(self) -> None:
        """Leave the segment."""
        self._segment.close()

    # ------------------------------------------------------------------------- from the wire

    @property
    def full(self) -> bool:
        """Whether the segment should wait for `resume` before it hands over more."""
        return len(self.own.backlog) >= BACKLOG

    def arrived(self, frame: bytes) -> None:
        """A frame from the segment."""
        if self.faults is None or not self.faults.take(lambda: self._arrived(frame)):
            self._arrived(frame)

    def _arrived(self, frame: bytes) -> None:
        with self.lock:
            if not self.running or not self.own.link_up or len(frame) > MAX_FRAME or self.full:
                self.counters.dropped += 1
                return
            self.own.backlog.append(frame)
        self.kick(_RECEIVE)

    def resume(self) -> None:
        """The segment takes frames again."""
        self.kick(_TRANSMIT)

    def process(self, index: int) -> None:
        """Serve one queue."""
        if index == _RECEIVE:
            self._receive()
        elif index == _TRANSMIT:
            self._transmit()
        else:
            super().process(index)

    def _receive(self) -> None:
        while True:
            with self.lock:
                if not self.own.backlog:
                    return
                frame = self.own.backlog[0]
            packet = bytes(_HEADER) + frame
            requests = self._buffers_for(len(packet))
            if requests is None:
                return
            with self.lock:
                if not self.own.backlog or self.own.backlog[0] is not frame:
                    for request in reversed(requests):
                        request.put_back()
                    continue
                was_full = self.full
                self.own.backlog.popleft()
                self._deliver(requests, packet)
            if was_full:
                self._segment.resume()

    def _buffers_for(self, size: int) -> list[Request] | None:
        """Buffers that hold `size` bytes; None if the guest has not made enough available."""
        requests: list[Request] = []
        room = 0
        while room < size:
            request = self.take(_RECEIVE)
            if request is None:
                for taken in reversed(requests):
                    taken.put_back()
                return None
            requests.append(request)
            room += request.writable
            if not self.has(F_MRG_RXBUF):
                break
        return requests

    def _deliver(self, requests: list[Request], packet: bytes) -> None:
        if sum(request.writable for request in requests) < len(packet):
            self.counters.dropped += 1  # 5.1.6.4: a buffer too small for the frame
            for request in requests:
                request.done(0)
            return
        data = bytearray(packet)
        struct.pack_into("<H", data, _NUM_BUFFERS, len(requests))
        done = 0
        for request in requests:
            done += request.write(bytes(data[done : done + request.writable]))
            request.done()
        self.counters.received += 1
        self.counters.received_bytes += len(packet) - _HEADER

    # --------------------------------------------------------------------------- to the wire

    def _transmit(self) -> None:
        while (request := self.take(_TRANSMIT)) is not None:
            frame = request.read(_HEADER + MAX_FRAME + 1)[_HEADER:]
            if not frame or len(frame) > MAX_FRAME or not self.own.link_up:
                self.counters.dropped += 1
            elif self._send(frame):
                self.counters.sent += 1
                self.counters.sent_bytes += len(frame)
            else:
                request.put_back()
                return
            request.done(0)

    def _send(self, frame: bytes) -> bool:
        """Put a frame on the wire; False: not now."""
        if self.faults is not None and self.faults.take(lambda: self._segment.send(frame)):
            return True
        return self._segment.send(frame)

    def handle(self, request: Request) -> None:
        """A command of the control queue (5.1.6.5)."""
        command = request.read(2)
        status = _CONTROL_ERROR
        if command == bytes((_CLASS_ANNOUNCE, _ANNOUNCE_ACK)):
            self.own.announce = False
            status = _CONTROL_OK
        request.write(bytes((status,)))
        request.done()

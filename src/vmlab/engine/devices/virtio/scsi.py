"""The SCSI host (virtio 1.2, 5.6): disks as targets, which come and go while the guest runs.

Each disk is logical unit 0 of a target of its own. A driver that negotiated HOTPLUG is told by an
event; if it has no buffer for the event, the next one says that some were missed.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar, Final

from vmlab.engine.devices.storage.disk import Disk
from vmlab.engine.devices.virtio.device import Request, VirtioDevice
from vmlab.engine.devices.virtio.queue import QueueBroken
from vmlab.engine.devices.virtio.scsi_disk import CAPACITY_CHANGED, ScsiDisk
from vmlab.engine.devices.workers import Workers
from vmlab.engine.memory.ram import Ram
from vmlab.machine.errors import ResourceNotFound, VmlabError

F_INOUT: Final = 0
F_HOTPLUG: Final = 1
F_CHANGE: Final = 2

_CONTROL: Final = 0
_EVENT: Final = 1
TARGETS: Final = 256

_CONFIG: Final = struct.Struct("<IIIIIIIHHI")
_SENSE_SIZE_OFFSET: Final = 20
_CDB_SIZE_OFFSET: Final = 24
_DEFAULT_SENSE_SIZE: Final = 96
_DEFAULT_CDB_SIZE: Final = 32
_REQUEST: Final = struct.Struct("<8sQBBB")
_RESPONSE: Final = struct.Struct("<IIHBB")
_EVENT_MESSAGE: Final = struct.Struct("<I8sI")

S_OK: Final = 0
S_BAD_TARGET: Final = 3
S_INCORRECT_LUN: Final = 12
S_FUNCTION_COMPLETE: Final = 0
S_FUNCTION_REJECTED: Final = 11

_T_TMF: Final = 0
_T_AN_QUERY: Final = 1
_T_AN_SUBSCRIBE: Final = 2
_TMF_KNOWN: Final = range(8)
_TMF_RESETS: Final = frozenset({4, 5})

T_TRANSPORT_RESET: Final = 1
T_PARAM_CHANGE: Final = 3
T_EVENTS_MISSED: Final = 0x8000_0000
RESET_RESCAN: Final = 1
RESET_REMOVED: Final = 2
_MAX_EVENTS: Final = 64


@dataclass
class ScsiState:
    """What a snapshot must hold beside the disks' own state."""

    sense_size: int = _DEFAULT_SENSE_SIZE
    cdb_size: int = _DEFAULT_CDB_SIZE
    events_missed: bool = False
    events: deque[bytes] = field(default_factory=deque)
    """Events that wait for buffers of the event queue."""


def lun_of(target: int) -> bytes:
    """The address of unit 0 of a target in an event.

    Peripheral addressing (SAM-6, 4.7.7.2), as in the answer to REPORT LUNS: Linux takes bytes 2
    and 3 of an event for the number itself, where a request has 0x40 in byte 2.
    """
    return bytes((1, target, 0, 0, 0, 0, 0, 0))


class _Transfer:
    """The data of a command: behind the request's header, and behind its response."""

    def __init__(self, request: Request, place: int) -> None:
        self._request = request
        self._place = place
        self.transferred = 0

    def read(self, size: int) -> bytes:
        data = self._request.read(size)
        self.transferred += len(data)
        return data

    def write(self, data: bytes) -> int:
        done = self._request.write_at(self._place + self.transferred, data)
        self.transferred += done
        return done


class VirtioScsi(VirtioDevice):
    """The host.

    Args:
        queues: Request queues.
    """

    device_id: ClassVar[int] = 8

    def __init__(
        self, name: str, ram: Ram, workers: Workers, *, queues: int = 1, queue_size: int = 128
    ) -> None:
        self.own = ScsiState()
        self.disks: dict[int, ScsiDisk] = {}
        features = 1 << F_INOUT | 1 << F_HOTPLUG | 1 << F_CHANGE
        super().__init__(name, ram, workers, [64, 64] + [queue_size] * queues, features)

    def config(self) -> bytes:
        """struct virtio_scsi_config (5.6.4)."""
        return _CONFIG.pack(
            len(self.state.queues) - 2, 126, 0xFFFF, 128, _EVENT_MESSAGE.size,
            self.own.sense_size, self.own.cdb_size, 0, TARGETS - 1, 0,
        )  # fmt: skip

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver may choose the sizes of sense data and commands."""
        value = int.from_bytes(data, "little")
        if len(data) != 4 or not 16 <= value <= 4096:
            return
        if offset == _SENSE_SIZE_OFFSET:
            self.own.sense_size = value
        elif offset == _CDB_SIZE_OFFSET:
            self.own.cdb_size = value

    def on_reset(self) -> None:
        """Sizes are the defaults again and no event is to be told."""
        self.own = ScsiState()

    def close(self) -> None:
        """Close all disks."""
        for disk in self.disks.values():
            disk.remove()
        self.disks.clear()

    # -------------------------------------------------------------------------------- hot-plug

    def plug(self, disk: Disk, serial: str, target: int | None = None) -> int:
        """Add a disk; the target that it has become.

        Args:
            disk: Taken over, and closed when it is unplugged.
            serial: Its serial number for the guest.
            target: 0 to 255, or None for the first free one.

        Raises:
            VmlabError: the target is taken, or all are.
        """
        with self.lock:
            free = [number for number in range(TARGETS) if number not in self.disks]
            if target is None:
                target = free[0] if free else -1
            if target not in free:
                raise VmlabError(
                    f"{self.name}: there is no free target {target if target >= 0 else ''}".strip(),
                    hint=f"targets are 0 to {TARGETS - 1}, one disk each; unplug one",
                )
            self.disks[target] = ScsiDisk(disk, serial)
            if self.has(F_HOTPLUG):
                self._tell(T_TRANSPORT_RESET, target, RESET_RESCAN)
            return target

    def unplug(self, target: int) -> None:
        """Remove a disk; commands that run on it are finished first, new ones fail.

        Raises:
            ResourceNotFound: there is none.
        """
        with self.lock:
            disk = self.disks.pop(target, None)
            if disk is None:
                raise ResourceNotFound(
                    f"{self.name} has no disk at target {target}",
                    hint=f"it has {sorted(self.disks) or 'none'}",
                )
            if self.has(F_HOTPLUG):
                self._tell(T_TRANSPORT_RESET, target, RESET_REMOVED)
        disk.remove()

    def resized(self, target: int) -> None:
        """A disk has another size now."""
        with self.lock:
            self.disks[target].state.attention = CAPACITY_CHANGED
            if self.has(F_CHANGE):
                self._tell(T_PARAM_CHANGE, target, 0x2A | 0x09 << 8)

    def _tell(self, event: int, target: int, reason: int) -> None:
        if len(self.own.events) == _MAX_EVENTS:
            self.own.events_missed = True
            return
        self.own.events.append(_EVENT_MESSAGE.pack(event, lun_of(target), reason))
        self.kick(_EVENT)

    # ------------------------------------------------------------------------------- requests

    def process(self, index: int) -> None:
        """Serve one queue."""
        if index == _EVENT:
            self._send_events()
        else:
            super().process(index)

    def _send_events(self) -> None:
        while True:
            with self.lock:
                if not self.own.events and not self.own.events_missed:
                    return
                request = self.take(_EVENT)
                if request is None:
                    return
                missed, self.own.events_missed = self.own.events_missed, False
                message = (
                    self.own.events.popleft() if self.own.events else bytes(_EVENT_MESSAGE.size)
                )
                event, lun, reason = _EVENT_MESSAGE.unpack(message)
                if missed:
                    event |= T_EVENTS_MISSED
                request.write(_EVENT_MESSAGE.pack(event, lun, reason))
                request.done()

    def handle(self, request: Request) -> None:
        """One request of the control queue or of a request queue."""
        if request.index == _CONTROL:
            self._control(request)
        else:
            self._command(request)

    def _find(self, lun: bytes) -> tuple[ScsiDisk | None, int]:
        """The disk at an address, and if there is none, the response that says so."""
        with self.lock:
            disk = self.disks.get(lun[1]) if lun[0] == 1 else None
        if disk is None:
            return None, S_BAD_TARGET
        if int.from_bytes(lun[2:4], "big") & 0x3FFF:
            return None, S_INCORRECT_LUN
        return disk, S_OK

    def _command(self, request: Request) -> None:
        sense_size, cdb_size = self.own.sense_size, self.own.cdb_size
        header = request.read(_REQUEST.size + cdb_size)
        place = _RESPONSE.size + sense_size
        if len(header) < _REQUEST.size + cdb_size or request.writable < place:
            raise QueueBroken("a SCSI request without a header or a place for its response")
        lun = header[:8]
        cdb = header[_REQUEST.size :].ljust(16, b"\0")
        asked = request.left_to_read or request.writable - place
        disk, response = self._find(lun)
        status, sense = 0, b""
        transfer = _Transfer(request, place)
        if disk is not None:
            status, sense = disk.execute(cdb, transfer)
        sense = sense[:sense_size]
        residual = max(asked - transfer.transferred, 0)
        request.write_at(0, _RESPONSE.pack(len(sense), residual, 0, status, response) + sense)
        incoming = 0 if request.readable > len(header) else transfer.transferred
        request.done(place + incoming)

    def _control(self, request: Request) -> None:
        message = request.read(24)
        kind = int.from_bytes(message[:4], "little")
        if kind == _T_TMF and len(message) == 24:
            request.write(bytes((self._task_management(message),)))
        elif kind in {_T_AN_QUERY, _T_AN_SUBSCRIBE} and len(message) >= 16:
            request.write(struct.pack("<IB", 0, S_OK))  # no asynchronous notification is known
        else:
            raise QueueBroken(f"a control request of {len(message)} bytes and type {kind}")
        request.done()

    def _task_management(self, message: bytes) -> int:
        subtype = int.from_bytes(message[4:8], "little")
        disk, response = self._find(message[8:16])
        if disk is None:
            return response
        if subtype not in _TMF_KNOWN:
            return S_FUNCTION_REJECTED
        if subtype in _TMF_RESETS:
            disk.state.attention = (0x06, 0x29, 0x03)  # bus device reset function occurred
        # Commands are served to their end in the order of their queue: there is no task left
        # that could be aborted.
        return S_FUNCTION_COMPLETE

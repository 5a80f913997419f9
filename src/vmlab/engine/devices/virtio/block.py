"""The block device (virtio 1.2, 5.2) over a `Disk`: several queues, flush, discard, write-zeroes.

A request is served in pieces through memory of the host's own, so that neither a reset nor a
driver that changes its buffers can pull anything away under a system call.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final

from vmlab.engine.devices.storage.disk import Disk
from vmlab.engine.devices.virtio.device import Request, VirtioDevice
from vmlab.engine.devices.virtio.queue import QueueBroken
from vmlab.engine.devices.workers import Workers
from vmlab.engine.memory.ram import Ram

SECTOR: Final = 512
PIECE: Final = 1 << 20
"""Bytes that are read or written at once."""

F_SEG_MAX: Final = 2
F_RO: Final = 5
F_BLK_SIZE: Final = 6
F_FLUSH: Final = 9
F_CONFIG_WCE: Final = 11
F_MQ: Final = 12
F_DISCARD: Final = 13
F_WRITE_ZEROES: Final = 14

_IN: Final = 0
_OUT: Final = 1
_FLUSH: Final = 4
_GET_ID: Final = 8
_DISCARD: Final = 11
_WRITE_ZEROES: Final = 13

OK: Final = 0
IOERR: Final = 1
UNSUPPORTED: Final = 2

_HEADER: Final = struct.Struct("<IIQ")
_SEGMENT: Final = struct.Struct("<QII")
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
_WRITEBACK_OFFSET: Final = 32
_MAX_SEGMENTS: Final = 32
"""Ranges of one discard or write-zeroes request."""
_MAX_RANGE: Final = 1 << 22
"""Sectors of one such range: 2 GiB."""
_ID_BYTES: Final = 20


@dataclass
class BlockState:
    """What a snapshot must hold beside the queues."""

    writeback: bool = True


class VirtioBlock(VirtioDevice):
    """The device.

    Args:
        disk: What it reads and writes; a read-only one makes a read-only device.
        serial: What GET_ID answers; at most 20 bytes.
        queues: Request queues.
    """

    device_id: ClassVar[int] = 2

    def __init__(
        self,
        name: str,
        ram: Ram,
        workers: Workers,
        disk: Disk,
        *,
        serial: str = "",
        queues: int = 1,
        queue_size: int = 256,
    ) -> None:
        features = 1 << F_SEG_MAX | 1 << F_BLK_SIZE | 1 << F_FLUSH | 1 << F_CONFIG_WCE
        if disk.read_only:
            features |= 1 << F_RO
        else:
            features |= 1 << F_DISCARD | 1 << F_WRITE_ZEROES
        if queues > 1:
            features |= 1 << F_MQ
        self.disk = disk
        self.serial = serial.encode()[:_ID_BYTES]
        self.own = BlockState()
        self._segments = min(queue_size - 2, 254)
        super().__init__(name, ram, workers, [queue_size] * queues, features)

    def config(self) -> bytes:
        """struct virtio_blk_config (5.2.4)."""
        return _CONFIG.pack(
            self.disk.size // SECTOR,
            0, self._segments,  # size_max, seg_max
            0, 0, 0,  # geometry
            SECTOR,
            0, 0, 0, 0,  # topology
            int(self.own.writeback),
            0,
            len(self.state.queues),
            _MAX_RANGE, _MAX_SEGMENTS, self.disk.discard_alignment // SECTOR,
            _MAX_RANGE, _MAX_SEGMENTS, 1,  # write_zeroes_may_unmap
        )  # fmt: skip

    def write_config(self, offset: int, data: bytes) -> None:
        """`writeback` can be changed if CONFIG_WCE was negotiated."""
        if offset == _WRITEBACK_OFFSET and len(data) == 1 and self.has(F_CONFIG_WCE):
            # Nothing is flushed here, on a hart's thread: the next write will flush all before it.
            self.own.writeback = bool(data[0] & 1)

    def on_features(self) -> None:
        """A driver that cannot flush gets a write-through cache (5.2.5.1)."""
        self.own.writeback = self.has(F_FLUSH) or self.has(F_CONFIG_WCE)

    def on_reset(self) -> None:
        """The cache is write-back until features say otherwise."""
        self.own.writeback = True

    def resized(self) -> None:
        """The disk has another size now."""
        self.config_changed()

    def close(self) -> None:
        """Close the disk."""
        self.disk.close()

    def handle(self, request: Request) -> None:
        """One request: header, data, and a status byte at the very end."""
        header = request.read(_HEADER.size)
        if len(header) < _HEADER.size or request.writable < 1:
            raise QueueBroken("a block request without a header or a place for its status")
        kind, _, sector = _HEADER.unpack(header)
        place = request.writable - 1
        try:
            status = self._serve(request, kind, sector, place)
        except OSError:
            # EIO, ENOSPC and their kin: the guest's file system knows what to do about it.
            status = IOERR
        request.write_at(place, bytes((status,)))
        request.done(request.written + 1)

    def _serve(self, request: Request, kind: int, sector: int, room: int) -> int:
        if kind == _IN:
            return self._read(request, sector * SECTOR, room)
        if kind == _OUT:
            return self._write(request, sector * SECTOR)
        if kind == _FLUSH:
            self.disk.flush()
            return OK
        if kind == _GET_ID:
            request.write(self.serial.ljust(_ID_BYTES, b"\0")[:room])
            return OK
        if kind in {_DISCARD, _WRITE_ZEROES} and not self.disk.read_only:
            return self._ranges(request, kind)
        return UNSUPPORTED

    def _fits(self, offset: int, size: int) -> bool:
        return size % SECTOR == 0 and offset + size <= self.disk.size

    def _read(self, request: Request, offset: int, size: int) -> int:
        if not self._fits(offset, size):
            return IOERR
        while size:
            part = min(size, PIECE)
            request.write(self.disk.read(offset, part))
            offset += part
            size -= part
        return OK

    def _write(self, request: Request, offset: int) -> int:
        if self.disk.read_only or not self._fits(offset, request.left_to_read):
            return IOERR
        while data := request.read(PIECE):
            self.disk.write(offset, data)
            offset += len(data)
        if not self.own.writeback:
            self.disk.flush()
        return OK

    def _ranges(self, request: Request, kind: int) -> int:
        size = request.left_to_read
        if size == 0 or size % _SEGMENT.size or size > _SEGMENT.size * _MAX_SEGMENTS:
            return UNSUPPORTED if size > _SEGMENT.size * _MAX_SEGMENTS else IOERR
        for sector, count, flags in _SEGMENT.iter_unpack(request.read(size)):
            # 5.2.6.2: unknown flags, or "unmap" on a discard, are unsupported.
            if flags & ~1 or (kind == _DISCARD and flags):
                return UNSUPPORTED
            offset, length = sector * SECTOR, count * SECTOR
            if count > _MAX_RANGE or not self._fits(offset, length):
                return IOERR
            if kind == _DISCARD:
                self.disk.discard(offset, length)
            else:
                self.disk.write_zeroes(offset, length, unmap=bool(flags & 1))
        if not self.own.writeback:
            self.disk.flush()
        return OK

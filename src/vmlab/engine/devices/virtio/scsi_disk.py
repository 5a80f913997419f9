"""A disk that answers SCSI commands (SBC-4, SPC-5): what Linux's sd driver asks for, and no more.

It knows nothing of virtio: a command comes with where its data comes from and goes to.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from vmlab.engine.devices.storage.disk import Disk

BLOCK: Final = 512
PIECE: Final = 1 << 20

GOOD: Final = 0x00
CHECK_CONDITION: Final = 0x02

_NOT_READY: Final = 0x02
_MEDIUM_ERROR: Final = 0x03
_ILLEGAL_REQUEST: Final = 0x05
_UNIT_ATTENTION: Final = 0x06
_DATA_PROTECT: Final = 0x07

_MAX_TRANSFER: Final = 0xFFFF
"""Blocks of one read or write that initiators are asked to stay below."""
_MAX_UNMAP_BLOCKS: Final = 1 << 22
_MAX_UNMAP_RANGES: Final = 32
_MODE_CACHING: Final = 0x08
_MODE_CONTROL: Final = 0x0A
_ALL_PAGES: Final = 0x3F


class Transfer(Protocol):
    """The data of one command."""

    def read(self, size: int) -> bytes:
        """The next bytes from the initiator, or fewer if there are no more."""

    def write(self, data: bytes) -> int:
        """Bytes for the initiator; how many had room."""


class SenseError(Exception):
    """A command ends with CHECK CONDITION; key and additional codes say why (SPC-5, 4.4)."""

    def __init__(self, key: int, code: int, qualifier: int = 0) -> None:
        super().__init__(f"sense {key:#x}/{code:#04x}/{qualifier:#04x}")
        self.key = key
        self.code = code
        self.qualifier = qualifier

    def fixed(self) -> bytes:
        """Fixed-format sense data, 18 bytes."""
        return struct.pack(">BBBIBIBBBB2x", 0x70, 0, self.key, 0, 10, 0, self.code,
                           self.qualifier, 0, 0)  # fmt: skip


INVALID_OPCODE: Final = (_ILLEGAL_REQUEST, 0x20)
INVALID_FIELD: Final = (_ILLEGAL_REQUEST, 0x24)
OUT_OF_RANGE: Final = (_ILLEGAL_REQUEST, 0x21)
SHORT_PARAMETERS: Final = (_ILLEGAL_REQUEST, 0x1A)
WRITE_PROTECTED: Final = (_DATA_PROTECT, 0x27)
READ_FAILED: Final = (_MEDIUM_ERROR, 0x11)
WRITE_FAILED: Final = (_MEDIUM_ERROR, 0x0C)
NO_SPACE: Final = (_DATA_PROTECT, 0x27, 0x07)
POWER_ON: Final = (_UNIT_ATTENTION, 0x29)
CAPACITY_CHANGED: Final = (_UNIT_ATTENTION, 0x2A, 0x09)


@dataclass
class ScsiDiskState:
    """Everything that a snapshot must hold."""

    attention: tuple[int, ...] | None = POWER_ON
    write_cache: bool = True


class ScsiDisk:
    """One logical unit over a `Disk`.

    Args:
        disk: What it reads and writes; closed when the unit is removed and idle.
        serial: What the vital product data says; up to 36 characters.
    """

    def __init__(self, disk: Disk, serial: str) -> None:
        self.disk = disk
        self.serial = serial.encode("ascii", "replace")[:36]
        self.state = ScsiDiskState()
        self._lock = threading.Lock()
        self._users = 0
        self._removed = False
        self._commands: dict[int, Callable[[bytes, Transfer], None]] = {
            0x00: lambda cdb, data: None,  # TEST UNIT READY
            0x03: self._request_sense,
            0x08: self._read6,
            0x0A: self._write6,
            0x12: self._inquiry,
            0x1A: self._mode_sense,
            0x1B: lambda cdb, data: None,  # START STOP UNIT
            0x1E: lambda cdb, data: None,  # PREVENT ALLOW MEDIUM REMOVAL
            0x25: self._read_capacity10,
            0x28: self._read,
            0x2A: self._write,
            0x2F: self._verify,
            0x35: self._synchronize,
            0x41: self._write_same,
            0x42: self._unmap,
            0x5A: self._mode_sense,
            0x88: self._read,
            0x8A: self._write,
            0x8F: self._verify,
            0x91: self._synchronize,
            0x93: self._write_same,
            0x9E: self._service_action_in,
            0xA0: self._report_luns,
            0xA8: self._read,
            0xAA: self._write,
        }

    # --------------------------------------------------------------------------------- life

    def remove(self) -> None:
        """Take no more commands, and close the disk once those that run are through."""
        with self._lock:
            self._removed = True
            idle = self._users == 0
        if idle:
            self.disk.close()

    def execute(self, cdb: bytes, data: Transfer) -> tuple[int, bytes]:
        """Run one command: (status, sense data)."""
        with self._lock:
            if self._removed:
                return CHECK_CONDITION, SenseError(_NOT_READY, 0x3A).fixed()
            self._users += 1
        try:
            return self._execute(cdb, data)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._removed and self._users == 0
        if last:
            self.disk.close()

    def _execute(self, cdb: bytes, data: Transfer) -> tuple[int, bytes]:
        opcode = cdb[0]
        try:
            command = self._commands.get(opcode)
            if command is None:
                raise SenseError(*INVALID_OPCODE)
            # SAM-6, 5.14: these three do not report a unit attention.
            if self.state.attention is not None and opcode not in {0x03, 0x12, 0xA0}:
                attention, self.state.attention = self.state.attention, None
                raise SenseError(*attention)
            command(cdb, data)
        except SenseError as error:
            return CHECK_CONDITION, error.fixed()
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                return CHECK_CONDITION, SenseError(*NO_SPACE).fixed()
            reading = opcode in {0x08, 0x28, 0x88, 0xA8}
            why = READ_FAILED if reading else WRITE_FAILED
            return CHECK_CONDITION, SenseError(*why).fixed()
        return GOOD, b""

    # ------------------------------------------------------------------------------ who it is

    def _inquiry(self, cdb: bytes, data: Transfer) -> None:
        length = int.from_bytes(cdb[3:5], "big")
        if not cdb[1] & 1:
            if cdb[2]:
                raise SenseError(*INVALID_FIELD)
            # Direct access, SPC-3, 4-byte header, response format 2, HISUP; CMDQUE.
            answer = bytes((0, 0, 5, 0x12, 91 - 5, 0, 0, 0x02))
            answer += b"VMLAB   " + b"VMLAB DISK      " + b"1   "
            answer = answer.ljust(58, b"\0")
            answer += struct.pack(">HHHH", 0x00A0, 0x0460, 0x04C0, 0x0600)  # SAM-5 SPC-4 SBC-3
            data.write(answer.ljust(91, b"\0")[:length])
            return
        page = self._vital_product_data(cdb[2])
        data.write((struct.pack(">BBH", 0, cdb[2], len(page)) + page)[:length])

    def _vital_product_data(self, page: int) -> bytes:
        if page == 0x00:
            return bytes((0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2))
        if page == 0x80:
            return self.serial
        if page == 0x83:
            # One designator: T10 vendor identification, in ASCII.
            name = b"VMLAB   " + self.serial
            return bytes((0x02, 0x01, 0, len(name))) + name
        if page == 0xB0:
            return struct.pack(
                ">BBHIIIIIIIQ20x",
                1, 0, 0, _MAX_TRANSFER, 0, 0,
                _MAX_UNMAP_BLOCKS, _MAX_UNMAP_RANGES, self.disk.discard_alignment // BLOCK,
                0x8000_0000, _MAX_UNMAP_BLOCKS,
            )  # fmt: skip
        if page == 0xB1:
            return struct.pack(">H58x", 1)  # does not rotate
        if page == 0xB2:
            return bytes((0, 0xE0, 2, 0))  # UNMAP and WRITE SAME unmap; thinly provisioned
        raise SenseError(*INVALID_FIELD)

    def _report_luns(self, cdb: bytes, data: Transfer) -> None:
        length = int.from_bytes(cdb[6:10], "big")
        data.write(struct.pack(">II8x", 8, 0)[:length])

    def _request_sense(self, cdb: bytes, data: Transfer) -> None:
        attention, self.state.attention = self.state.attention, None
        data.write(SenseError(*(attention or (0, 0))).fixed()[: cdb[4]])

    def _mode_sense(self, cdb: bytes, data: Transfer) -> None:
        ten = cdb[0] == 0x5A
        length = int.from_bytes(cdb[7:9], "big") if ten else cdb[4]
        page, control = cdb[2] & 0x3F, cdb[2] >> 6
        if control == 3:
            raise SenseError(_ILLEGAL_REQUEST, 0x39)  # saved values: there are none
        pages = b""
        if page in {_MODE_CACHING, _ALL_PAGES}:
            flags = 0x04 if self.state.write_cache and control != 1 else 0
            pages += bytes((_MODE_CACHING, 18, flags)) + bytes(17)
        if page in {_MODE_CONTROL, _ALL_PAGES}:
            pages += bytes((_MODE_CONTROL, 10)) + bytes(10)
        if not pages:
            raise SenseError(*INVALID_FIELD)
        protect = 0x80 if self.disk.read_only else 0
        if ten:
            head = struct.pack(">HBBHH", len(pages) + 6, 0, protect, 0, 0)
        else:
            head = struct.pack(">BBBB", len(pages) + 3, 0, protect, 0)
        data.write((head + pages)[:length])

    def _blocks(self) -> int:
        return self.disk.size // BLOCK

    def _read_capacity10(self, cdb: bytes, data: Transfer) -> None:
        data.write(struct.pack(">II", min(self._blocks() - 1, 0xFFFF_FFFF), BLOCK))

    def _service_action_in(self, cdb: bytes, data: Transfer) -> None:
        if cdb[1] & 0x1F != 0x10:
            raise SenseError(*INVALID_FIELD)
        length = int.from_bytes(cdb[10:14], "big")
        answer = struct.pack(">QIBBH16x", self._blocks() - 1, BLOCK, 0, 0, 0x8000)
        data.write(answer[:length])

    # ----------------------------------------------------------------------------------- data

    def _range(self, cdb: bytes) -> tuple[int, int]:
        """Offset and size in bytes of what a 10-, 12- or 16-byte command is about."""
        group = cdb[0] >> 5
        if group == 4:
            block, count = struct.unpack_from(">QI", cdb, 2)
        elif group == 5:
            block, count = struct.unpack_from(">II", cdb, 2)
        else:
            block = int.from_bytes(cdb[2:6], "big")
            count = int.from_bytes(cdb[7:9], "big")
        return self._checked(block, count)

    def _checked(self, block: int, count: int) -> tuple[int, int]:
        if block + count > self._blocks():
            raise SenseError(*OUT_OF_RANGE)
        return block * BLOCK, count * BLOCK

    def _read6(self, cdb: bytes, data: Transfer) -> None:
        self._read_at(*self._checked(int.from_bytes(cdb[1:4], "big") & 0x1F_FFFF, cdb[4] or 256),
                      data)  # fmt: skip

    def _read(self, cdb: bytes, data: Transfer) -> None:
        self._read_at(*self._range(cdb), data)

    def _read_at(self, offset: int, size: int, data: Transfer) -> None:
        while size:
            part = min(size, PIECE)
            if data.write(self.disk.read(offset, part)) < part:
                return  # the initiator's buffer is full; the residual count says so
            offset += part
            size -= part

    def _may_write(self) -> None:
        if self.disk.read_only:
            raise SenseError(*WRITE_PROTECTED)

    def _write6(self, cdb: bytes, data: Transfer) -> None:
        self._write_at(*self._checked(int.from_bytes(cdb[1:4], "big") & 0x1F_FFFF, cdb[4] or 256),
                       data)  # fmt: skip

    def _write(self, cdb: bytes, data: Transfer) -> None:
        self._write_at(*self._range(cdb), data)
        if cdb[1] & 0x08:  # FUA
            self.disk.flush()

    def _write_at(self, offset: int, size: int, data: Transfer) -> None:
        self._may_write()
        while size:
            part = data.read(min(size, PIECE))
            if not part or len(part) % BLOCK:
                raise SenseError(*INVALID_FIELD)
            self.disk.write(offset, part)
            offset += len(part)
            size -= len(part)

    def _verify(self, cdb: bytes, data: Transfer) -> None:
        offset, size = self._range(cdb)
        while size:
            part = min(size, PIECE)
            found = self.disk.read(offset, part)
            if cdb[1] & 0x02 and data.read(part) != found:
                raise SenseError(0x0E, 0x1D)  # MISCOMPARE
            offset += part
            size -= part

    def _synchronize(self, cdb: bytes, data: Transfer) -> None:
        self.disk.flush()

    def _write_same(self, cdb: bytes, data: Transfer) -> None:
        self._may_write()
        offset, size = self._range(cdb)
        if size > _MAX_UNMAP_BLOCKS * BLOCK or size == 0:
            raise SenseError(*INVALID_FIELD)
        pattern = bytes(BLOCK)
        if not cdb[1] & 0x01:  # NDOB: no data, zeros are meant
            pattern = data.read(BLOCK)
            if len(pattern) < BLOCK:
                raise SenseError(*INVALID_FIELD)
        if not any(pattern):
            self.disk.write_zeroes(offset, size, unmap=bool(cdb[1] & 0x08))
            return
        while size:
            part = min(size, PIECE)
            self.disk.write(offset, pattern * (part // BLOCK))
            offset += part
            size -= part

    def _unmap(self, cdb: bytes, data: Transfer) -> None:
        self._may_write()
        length = int.from_bytes(cdb[7:9], "big")
        if length == 0:
            return
        parameters = data.read(length)
        if len(parameters) < 8:
            raise SenseError(*SHORT_PARAMETERS)
        size = int.from_bytes(parameters[2:4], "big")
        ranges = parameters[8 : 8 + size // 16 * 16]
        if len(ranges) < size // 16 * 16:
            raise SenseError(*SHORT_PARAMETERS)
        if len(ranges) > 16 * _MAX_UNMAP_RANGES:
            raise SenseError(_ILLEGAL_REQUEST, 0x26)
        wanted = [
            self._checked(block, count) for block, count in struct.iter_unpack(">QI4x", ranges)
        ]
        for offset, size in wanted:
            if size > _MAX_UNMAP_BLOCKS * BLOCK:
                raise SenseError(_ILLEGAL_REQUEST, 0x26)
            self.disk.discard(offset, size)

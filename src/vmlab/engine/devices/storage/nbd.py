"""Serves disks to other processes by NBD (the protocol's proto.md, "fixed newstyle").

One client for each socket and export. Requests are served one after another, as from a disk that
takes one command at a time. Not here: TLS, structured replies, block status.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmlab.engine.devices.channel import listen
from vmlab.engine.devices.storage.faulty import FaultyDisk

_HELLO: Final = b"NBDMAGICIHAVEOPT"
_FIXED_NEWSTYLE: Final = 1
_NO_ZEROES: Final = 2
_OPTION: Final = struct.Struct(">8sII")
_OPTION_MAGIC: Final = b"IHAVEOPT"
_OPTION_REPLY: Final = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_LONGEST_OPTION: Final = 8192
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK: Final = 1
_REP_INFO: Final = 3
_UNSUPPORTED: Final = 0x8000_0001
_INVALID: Final = 0x8000_0003
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3

_REQUEST: Final = struct.Struct(">IHHQQI")
_REQUEST_MAGIC: Final = 0x25609513
_REPLY: Final = struct.Struct(">IIQ")
_REPLY_MAGIC: Final = 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _WRITE_ZEROES = 0, 1, 2, 3, 4, 6
_FUA: Final = 1
_NO_HOLE: Final = 2
_HAS_FLAGS: Final = 1 << 0
_READ_ONLY: Final = 1 << 1
_SEND_FLUSH: Final = 1 << 2
_SEND_FUA: Final = 1 << 3
_SEND_TRIM: Final = 1 << 5
_SEND_WRITE_ZEROES: Final = 1 << 6

_SECTOR: Final = 512
_PREFERRED: Final = 4096
_LONGEST: Final = 32 << 20
"""Bytes of one request."""
_ERRORS: Final = frozenset({errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC})
"""What NBD has numbers for; the rest is an I/O error."""


class _Gone(Exception):
    """The client has left, or what it sent is not NBD."""


class NbdExport:
    """A disk at a unix socket.

    Args:
        disk: What is served.
        path: Of the socket, which must not exist.
        left: Called when the client has left, from a thread of the export's own.

    Raises:
        VmlabError: the socket cannot be made.
    """

    def __init__(self, disk: FaultyDisk, path: Path, left: Callable[[], None]) -> None:
        self._disk = disk
        self._left = left
        self._listener = listen(path)
        self._listener.setblocking(True)
        self._name = path.name

    def begin(self) -> None:
        """Let the client come."""
        threading.Thread(target=self._serve, name=f"nbd-{self._name}", daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self._listener.close()
        try:
            with connection:
                _Conversation(connection, self._disk).hold()
        except (_Gone, OSError):
            # However it left, there is nobody to tell.
            return
        finally:
            self._left()


class _Conversation:
    """One client."""

    def __init__(self, connection: socket.socket, disk: FaultyDisk) -> None:
        self._connection = connection
        self._disk = disk

    def hold(self) -> None:
        """Serve it until it leaves."""
        self._send(_HELLO + struct.pack(">H", _FIXED_NEWSTYLE | _NO_ZEROES))
        (flags,) = struct.unpack(">I", self._receive(4))
        while not self._option(bool(flags & _NO_ZEROES)):
            continue
        while self._request():
            continue

    # Before there are requests.

    def _option(self, no_zeroes: bool) -> bool:
        """Answer one option; True if requests follow."""
        magic, option, length = _OPTION.unpack(self._receive(_OPTION.size))
        if magic != _OPTION_MAGIC or length > _LONGEST_OPTION:
            raise _Gone
        data = self._receive(length)
        size, flags = self._disk.size, self._flags
        if option == _EXPORT_NAME:
            self._send(struct.pack(">QH", size, flags) + (b"" if no_zeroes else bytes(124)))
            return True
        if option == _ABORT:
            self._answer(option, _ACK)
            raise _Gone
        if option not in {_INFO, _GO}:
            self._answer(option, _UNSUPPORTED)
            return False
        if len(data) < 6 or len(data) < 6 + int.from_bytes(data[:4], "big"):
            self._answer(option, _INVALID)
            return False
        self._answer(option, _REP_INFO, struct.pack(">HQH", _INFO_EXPORT, size, flags))
        sizes = struct.pack(">HIII", _INFO_BLOCK_SIZE, _SECTOR, _PREFERRED, _LONGEST)
        self._answer(option, _REP_INFO, sizes)
        self._answer(option, _ACK)
        return bool(option == _GO)

    @property
    def _flags(self) -> int:
        flags = _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA
        if self._disk.read_only:
            return flags | _READ_ONLY
        return flags | _SEND_TRIM | _SEND_WRITE_ZEROES

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    # Requests.

    def _request(self) -> bool:
        """Serve one request; False: it was the last."""
        magic, flags, kind, handle, offset, size = _REQUEST.unpack(self._receive(_REQUEST.size))
        if magic != _REQUEST_MAGIC or (kind == _WRITE and size > _LONGEST):
            raise _Gone
        if kind == _DISCONNECT:
            return False
        data = self._receive(size) if kind == _WRITE else b""
        answer, failure = b"", 0
        try:
            answer = self._do(kind, flags, offset, size, data)
        except OSError as error:
            failure = error.errno if error.errno in _ERRORS else errno.EIO
        if self._disk.has_power:
            # Nobody answers without; the client waits for its own end.
            self._send(_REPLY.pack(_REPLY_MAGIC, failure, handle) + answer)
        return True

    def _do(self, kind: int, flags: int, offset: int, size: int, data: bytes) -> bytes:
        disk = self._disk
        if kind == _FLUSH:
            disk.flush()
            return b""
        if offset + size > disk.size or kind not in {_READ, _WRITE, _TRIM, _WRITE_ZEROES}:
            raise OSError(errno.EINVAL, "not a request that this disk can serve")
        if kind == _READ:
            if size > _LONGEST:
                raise OSError(errno.EINVAL, "too much for one request")
            return disk.read(offset, size)
        if disk.read_only:
            raise OSError(errno.EPERM, "the disk is read-only")
        if kind == _WRITE:
            disk.write(offset, data)
        elif kind == _TRIM:
            disk.discard(offset, size)
        else:
            disk.write_zeroes(offset, size, unmap=not flags & _NO_HOLE)
        if flags & _FUA:
            disk.flush()
        return b""

    def _receive(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._connection.recv(min(size, 1 << 20))
            if not part:
                raise _Gone
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _send(self, data: bytes) -> None:
        self._connection.sendall(data)

"""Files that a GDB client may read over its connection (GDB manual, appendix E.7, "File-I/O").

They are made when they are opened, and are nowhere on the host: no other path can be reached.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final

from vmlab.engine.debug.packets import LIMIT, escaped

_NO_ENTRY: Final = b"F-1,2"
_BAD_FILE: Final = b"F-1,9"
_NOT_SUPPORTED: Final = b""
_REGULAR: Final = 0o100400


class RemoteFiles:
    """A few files by name.

    Args:
        made: What makes the content of each.
    """

    def __init__(self, made: Mapping[str, Callable[[], bytes]]) -> None:
        self._made = made
        self._open: dict[int, bytes] = {}

    def answer(self, request: bytes) -> bytes:
        """The answer to what follows `vFile:`."""
        operation, _, rest = request.partition(b":")
        arguments = rest.split(b",")
        match operation:
            case b"setfs":
                return b"F0"
            case b"open":
                return self._opened(bytes.fromhex(arguments[0].decode("latin-1")).decode())
            case b"pread":
                number, size, offset = (int(part, 16) for part in arguments)
                return self._read(number, size, offset)
            case b"fstat":
                return self._status(int(arguments[0], 16))
            case b"close":
                return (
                    b"F0" if self._open.pop(int(arguments[0], 16), None) is not None else _BAD_FILE
                )
            case _:
                return _NOT_SUPPORTED

    def _opened(self, path: str) -> bytes:
        make = self._made.get(path.removeprefix("/"))
        content = make() if make is not None else b""
        if not content:
            return _NO_ENTRY
        number = max(self._open, default=2) + 1
        self._open[number] = content
        return b"F%x" % number

    def _read(self, number: int, size: int, offset: int) -> bytes:
        content = self._open.get(number)
        if content is None:
            return _BAD_FILE
        part = content[offset : offset + min(size, LIMIT // 2 - 16)]
        return b"F%x;%s" % (len(part), escaped(part))

    def _status(self, number: int) -> bytes:
        content = self._open.get(number)
        if content is None:
            return _BAD_FILE
        # struct stat of the protocol, big-endian: dev, ino, mode, nlink, uid, gid, rdev, size,
        # blksize, blocks, atime, mtime, ctime.
        size = len(content)
        status = struct.pack(
            ">7I3Q3I", 0, 0, _REGULAR, 1, 0, 0, 0, size, 4096, size // 512, 0, 0, 0
        )
        return b"F%x;%s" % (len(status), escaped(status))

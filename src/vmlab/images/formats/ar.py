"""Reading `ar` archives, the outer layer of a Debian package.

Not a general ar: no symbol tables, no thin archives. Follows ar(5) and deb(5): the common format
with names of up to 16 bytes, which may end in a slash.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vmlab.images.errors import FormatError

MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60
_HEADER_END = b"`\n"
_MEMBERS_AT_MOST = 64  # deb(5) needs three, plus the odd signature


@dataclass(frozen=True)
class ArMember:
    """One file in an archive: its name, its size in bytes, and where its contents begin."""

    name: str
    size: int
    offset: int


def members(stream: BinaryIO, *, source: str) -> Iterator[ArMember]:
    """The members of a seekable archive, in order.

    Args:
        stream: The archive; its position is changed.
        source: The archive's name, for errors.

    Raises:
        FormatError: it is not an ar archive, or is cut short.
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if stream.read(len(MAGIC)) != MAGIC:
        raise FormatError(f"{source} is not an ar archive: it does not begin with '!<arch>'")
    position = len(MAGIC)
    for _ in range(_MEMBERS_AT_MOST):
        if position >= end:
            return
        stream.seek(position)
        member = _header(stream.read(_HEADER_BYTES), position, source)
        if member.offset + member.size > end:
            raise FormatError(
                f"{source} is cut short: member {member.name!r} has {member.size} bytes, "
                f"but only {max(0, end - member.offset)} are there"
            )
        yield member
        position = member.offset + member.size + member.size % 2  # members begin at even offsets
    if position < end:
        raise FormatError(f"{source} has more than {_MEMBERS_AT_MOST} members: not a package")


def _header(header: bytes, position: int, source: str) -> ArMember:
    if len(header) != _HEADER_BYTES or header[58:60] != _HEADER_END:
        raise FormatError(f"{source} has a broken ar header at byte {position}")
    digits = header[48:58].rstrip(b" ")
    if not digits.isdigit():  # bytes.isdigit knows ASCII digits only
        raise FormatError(f"{source} has an ar member of size {digits!r} at byte {position}")
    try:
        name = header[:16].rstrip(b" ").decode("ascii")
    except UnicodeDecodeError:
        raise FormatError(f"{source} has an ar member with a broken name at {position}") from None
    return ArMember(name.removesuffix("/"), int(digits), position + _HEADER_BYTES)


class Section(io.RawIOBase):
    """A window of `size` bytes at `offset` of a seekable stream, as a stream of its own."""

    def __init__(self, stream: BinaryIO, offset: int, size: int) -> None:
        super().__init__()
        self._stream = stream
        self._position = offset
        self._end = offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed: Buffer
        count = min(len(buffer), self._end - self._position)
        if count <= 0:
            return 0
        self._stream.seek(self._position)
        data = self._stream.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

"""Writing and reading cpio archives in the `newc` format that Linux unpacks as initramfs.

Follows Documentation/driver-api/early-userspace/buffer-format.rst of Linux. The writer is
deterministic: the same entries give the same bytes, whatever machine or user writes them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vmlab.images.errors import FormatError

_MAGIC = b"070701"
_HEADER_BYTES = 110
_TRAILER = "TRAILER!!!"
_NAME_BYTES_AT_MOST = 4096  # N_ALIGN(PATH_MAX) in init/initramfs.c
_TYPES = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "character": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}
_KINDS = {bits: kind for kind, bits in _TYPES.items()}


@dataclass(frozen=True)
class CpioEntry:
    """One entry: `kind` as in tar entries, `data` a file's contents or a symlink's target."""

    path: str
    kind: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    mtime: int = 0


def write(entries: Iterable[CpioEntry], stream: BinaryIO) -> int:
    """Write an archive; returns its size in bytes.

    Inode numbers are counted from 1 and owners are root, so that only the entries matter.
    """
    position = 0
    number = 0
    for number, entry in enumerate(entries, 1):
        position += _write_entry(stream, entry, number)
    trailer = CpioEntry(_TRAILER, "file", 0)
    position += _write_entry(stream, trailer, 0, mode=0)
    padding = -position % 512  # as GNU cpio does; Linux skips it
    stream.write(b"\0" * padding)
    return position + padding


def _write_entry(
    stream: BinaryIO, entry: CpioEntry, number: int, *, mode: int | None = None
) -> int:
    name = entry.path.encode("utf-8", "surrogateescape") + b"\0"
    bits = mode if mode is not None else _TYPES[entry.kind] | entry.mode
    links = 2 if entry.kind == "directory" else 1
    major, minor = entry.device
    fields = (number, bits, 0, 0, links, entry.mtime, len(entry.data), 0, 0, major, minor,
              len(name), 0)  # fmt: skip
    header = _MAGIC + b"".join(b"%08x" % value for value in fields) + name
    header += b"\0" * (-len(header) % 4)
    stream.write(header)
    stream.write(entry.data)
    padding = -len(entry.data) % 4
    stream.write(b"\0" * padding)
    return len(header) + len(entry.data) + padding


def read(stream: BinaryIO, *, source: str, limit: int = 4 << 30) -> Iterator[CpioEntry]:
    """The entries of an archive, up to its trailer.

    Raises:
        FormatError: it is not a newc archive, is cut short, or holds more than `limit` bytes.
    """
    total = 0
    while True:
        header = stream.read(_HEADER_BYTES)
        if len(header) != _HEADER_BYTES or header[:6] not in (_MAGIC, b"070702"):
            raise FormatError(f"{source} is not a newc cpio archive: bad header {header[:12]!r}")
        fields = _numbers(header, source)
        (_, bits, _, _, _, mtime, size, _, _, major, minor, name_size, _) = fields
        if not 0 < name_size <= _NAME_BYTES_AT_MOST:
            raise FormatError(f"{source} has a cpio entry whose name has {name_size} bytes")
        name = _exactly(stream, name_size + -(_HEADER_BYTES + name_size) % 4, source)[:name_size]
        if name[-1:] != b"\0":
            raise FormatError(f"{source} has a cpio entry whose name does not end: {name[:40]!r}")
        path = name[:-1].decode("utf-8", "surrogateescape")
        if path == _TRAILER:
            return
        total += size
        if total > limit:
            raise FormatError(f"{source} holds more than {limit} bytes")
        data = _exactly(stream, size + -size % 4, source)[:size]
        kind = _KINDS.get(stat.S_IFMT(bits))
        if kind is None:
            raise FormatError(f"{source} has {path[:200]!r} of an unknown type (mode {bits:o})")
        yield CpioEntry(path, kind, stat.S_IMODE(bits), data, (major, minor), mtime)


def _numbers(header: bytes, source: str) -> list[int]:
    digits = header[6:]
    try:
        # bytes.fromhex refuses the signs, spaces and underscores that int(..., 16) allows.
        raw = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        raise FormatError(f"{source} has a cpio header that is not hexadecimal") from None
    if len(raw) != len(digits) // 2:
        raise FormatError(f"{source} has a cpio header that is not hexadecimal")
    return [int.from_bytes(raw[at : at + 4], "big") for at in range(0, len(raw), 4)]


def _exactly(stream: BinaryIO, size: int, source: str) -> bytes:
    parts = []
    missing = size
    while missing:
        part = stream.read(min(missing, 1 << 20))  # never trust a size with a buffer
        if not part:
            raise FormatError(f"{source} is cut short: {missing} bytes are missing")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)

"""A file tree in memory, which becomes the same initramfs bytes wherever it is written.

It has the merged layout of today's distributions: everything below /usr, and /bin, /sbin and
/lib are links into it, so that packages of older layouts land in the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from vmlab.images.formats import cpio
from vmlab.images.formats.cpio import CpioEntry

_LINKS = {
    "bin": "usr/bin",
    "sbin": "usr/bin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "usr/sbin": "bin",
}
_MERGED = (
    ("bin/", "usr/bin/"),
    ("sbin/", "usr/bin/"),
    ("usr/sbin/", "usr/bin/"),
    ("lib64/", "usr/lib64/"),
    ("lib/", "usr/lib/"),
)


def merged(path: str) -> str:
    """Where `path` of any layout lies in the merged one."""
    path = path.strip("/")
    for old, new in _MERGED:
        if path.startswith(old):
            return new + path.removeprefix(old)
    return path


class Tree:
    """Files, directories, links and devices by path. Parents need not be added.

    Args:
        mtime: The time that every entry gets, seconds since 1970.
    """

    def __init__(self, *, mtime: int) -> None:
        self._mtime = mtime
        self._entries: dict[str, CpioEntry] = {}
        for path, target in _LINKS.items():
            self.symlink(path, target)
        for path in ("usr/bin", "usr/lib", "usr/lib64"):
            self.directory(path)

    def __contains__(self, path: str) -> bool:
        return merged(path) in self._entries

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add or replace a file."""
        self._add(path, "file", mode, data)

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(path, "directory", mode)

    def symlink(self, path: str, target: str) -> None:
        """Add or replace a symlink; the target is kept as it is."""
        self._add(path, "symlink", 0o777, target.encode("utf-8", "surrogateescape"))

    def device(self, path: str, kind: str, mode: int, number: tuple[int, int]) -> None:
        """Add a device node: `kind` "character" or "block", `number` (major, minor)."""
        self._entries[merged(path)] = CpioEntry(
            merged(path), kind, mode, device=number, mtime=self._mtime
        )

    def _add(self, path: str, kind: str, mode: int, data: bytes = b"") -> None:
        name = merged(path)
        if name in _LINKS and kind == "directory":
            return  # a package's own /bin: the link stands for it
        self._entries[name] = CpioEntry(name, kind, mode, data, mtime=self._mtime)

    def entries(self) -> Iterator[CpioEntry]:
        """Every entry, parents before what they hold, in an order that only the paths decide."""
        complete = dict(self._entries)
        for path in self._entries:
            parent = path.rpartition("/")[0]
            while parent and parent not in complete:
                complete[parent] = CpioEntry(parent, "directory", 0o755, mtime=self._mtime)
                parent = parent.rpartition("/")[0]
        yield from sorted(complete.values(), key=lambda entry: entry.path.split("/"))

    def write(self, stream: BinaryIO) -> int:
        """Write the tree as an uncompressed initramfs; returns its size in bytes.

        Uncompressed, because an emulated CPU takes longer to decompress than to copy.
        """
        return cpio.write(self.entries(), stream)

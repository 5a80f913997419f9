"""Sparse contents: the bytes of a memory or a disk, held in pages where they are not zero.

Pages are immutable, so a copy shares all of them until one side writes (copy-on-write), and
contents can be compared and hashed. A file or other contents may lie underneath, which are read
and never written; or a file may be the contents.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import Final

PAGE: Final = 4096
"""Bytes of a page."""
_ZEROS: Final = bytes(PAGE)


class Base:
    """A raw image file underneath contents; it is opened for each read and never kept open."""

    __slots__ = ("path", "size")

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    @property
    def identity(self) -> str:
        """What tells it from other files."""
        return f"{self.path}:{self.size}"

    def page(self, index: int) -> bytes:
        """Page `index` of the file, filled up with zeros behind its end."""
        if index * PAGE >= self.size:
            return _ZEROS
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(file, PAGE, index * PAGE).ljust(PAGE, b"\0")
        finally:
            os.close(file)


class Sparse:
    """Bytes 0 to `size` of which only the pages that differ from the base are held."""

    __slots__ = ("base", "pages", "size")

    def __init__(
        self, size: int, pages: dict[int, bytes] | None = None, base: Base | Sparse | None = None
    ) -> None:
        self.size = size
        self.pages = {} if pages is None else pages
        self.base = base

    def copy(self) -> Sparse:
        """Independent contents that share all pages until one side writes."""
        return Sparse(self.size, dict(self.pages), self.base)

    def page(self, index: int) -> bytes:
        """All bytes of one page."""
        found = self.pages.get(index)
        if found is not None:
            return found
        return self.base.page(index) if self.base is not None else _ZEROS

    def put(self, index: int, page: bytes) -> None:
        """Replace one page."""
        if page == (self.base.page(index) if self.base is not None else _ZEROS):
            self.pages.pop(index, None)
        else:
            self.pages[index] = page

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`.

        Raises:
            ValueError: they are not all inside.
        """
        self.check(offset, length)
        if length == 0:
            return b""
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        run = b"".join(self.page(index) for index in range(first, last + 1))
        return run[offset - first * PAGE : offset - first * PAGE + length]

    def write(self, offset: int, data: bytes) -> None:
        """Replace the bytes from `offset`.

        Raises:
            ValueError: they are not all inside.
        """
        self.check(offset, len(data))
        for index, page in self.changed(offset, data):
            self.put(index, page)

    def changed(self, offset: int, data: bytes) -> list[tuple[int, bytes]]:
        """The pages that a write of `data` at `offset` would leave, by number."""
        pages = []
        taken = 0
        while taken < len(data):
            index, within = divmod(offset + taken, PAGE)
            part = data[taken : taken + PAGE - within]
            if len(part) == PAGE:
                pages.append((index, part))
            else:
                old = self.page(index)
                pages.append((index, old[:within] + part + old[within + len(part) :]))
            taken += len(part)
        return pages

    def resized(self, size: int) -> Sparse:
        """A copy of another size; what lies beyond is cut off."""
        kept = {index: page for index, page in self.pages.items() if index * PAGE < size}
        return Sparse(size, kept, self.base)

    def grow(self, size: int) -> None:
        """Be of another size; new bytes are zero."""
        self.size = size

    def check(self, offset: int, length: int) -> None:
        """Refuse a range that is not inside (ValueError)."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} are outside of {self.size}")

    @property
    def allocated(self) -> int:
        """Bytes that are held."""
        return len(self.pages) * PAGE

    @property
    def identity(self) -> str:
        """What tells these contents from others."""
        return self.digest().hex()

    def digest(self) -> bytes:
        """A checksum of all contents (16 bytes); zeros cost nothing."""
        base = self.base.identity if self.base is not None else ""
        total = blake2b(f"{self.size}/{base}".encode(), digest_size=16)
        for index in sorted(self.pages):
            total.update(index.to_bytes(8, "big"))
            total.update(self.pages[index])
        return total.digest()


class InPlace(Sparse):
    """The bytes of a raw image file, which are read and written where they are.

    What is copied of it lies on top of the file, and is right as long as nobody writes to that.
    """

    __slots__ = ("path",)

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(size)
        self.path = path

    def copy(self) -> Sparse:
        """What is there now, for as long as nobody writes to the file."""
        return Sparse(self.size, base=Base(self.path, self.size))

    def page(self, index: int) -> bytes:
        """All bytes of one page."""
        return Base(self.path, self.size).page(index)

    def put(self, index: int, page: bytes) -> None:
        """Write one page into the file."""
        file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(file, page[: self.size - index * PAGE], index * PAGE)
        finally:
            os.close(file)

    def grow(self, size: int) -> None:
        """Give the file another size."""
        os.truncate(self.path, size)
        self.size = size

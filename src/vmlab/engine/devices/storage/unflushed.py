"""What a disk held before it was written to, until a flush has made the new content stable.

With it a disk can lose power: what was written and not flushed is what it was before (virtio 1.2,
5.2.6.1: only after a completed flush is a write stable). The image itself always holds what the
guest sees, so that it can be copied while the machine stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Final

PAGE: Final = 4096
"""Bytes that are remembered together."""
KEPT: Final = 16 << 20
"""Bytes that are remembered in memory; what is beyond them goes to a file without a name."""
_ZEROS: Final = bytes(PAGE)
_PIECE: Final = 256
"""Pages that are read at once."""

Read = Callable[[int, int], bytes]
"""Gives so many bytes from an offset on."""


class Unflushed:
    """The former content of pages, by their numbers."""

    def __init__(self) -> None:
        self._pages: dict[int, bytes | int | None] = {}  # content, place in the file, or zeros
        self._kept = 0
        self._file: IO[bytes] | None = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def remember(self, offset: int, size: int, end: int, read: Read) -> None:
        """Remember what is in a range that is about to change, as far as that is not yet done.

        Args:
            offset: Where the range begins.
            size: Its bytes.
            end: Bytes of the disk.
            read: Reads what is there.
        """
        pages = self._pages
        last = (offset + size - 1) // PAGE
        number = offset // PAGE
        while number <= last:
            if number in pages:
                number += 1
                continue
            first = number
            while number <= last and number not in pages and number - first < _PIECE:
                number += 1
            begin = first * PAGE
            content = read(begin, min(number * PAGE, end) - begin)
            for at in range(0, len(content), PAGE):
                self._add(first + at // PAGE, content[at : at + PAGE])

    def _add(self, page: int, content: bytes) -> None:
        if content == _ZEROS[: len(content)]:
            self._pages[page] = None
        elif self._kept < KEPT:
            self._pages[page] = content
            self._kept += len(content)
        else:
            if self._file is None:
                import tempfile  # which takes a while, and few engines need

                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (kept open)
            self._file.seek(self._end)
            self._file.write(content.ljust(PAGE, b"\0"))
            self._pages[page] = self._end
            self._end += PAGE

    def contents(self, end: int) -> Iterator[tuple[int, bytes]]:
        """Offsets and what was there; a page at the end of a disk of `end` bytes is shorter."""
        for page, kept in self._pages.items():
            offset = page * PAGE
            if isinstance(kept, int):
                assert self._file is not None, "it was made for this page"
                self._file.seek(kept)
                content = self._file.read(PAGE)
            else:
                content = _ZEROS if kept is None else kept
            if offset < end:
                yield offset, content[: end - offset]

    def under(self, older: Unflushed) -> None:
        """Be what was before `older` began as well, whose content counts where both have some."""
        for page, kept in older._pages.items():
            if isinstance(kept, int):
                assert older._file is not None, "it was made for this page"
                older._file.seek(kept)
                kept = older._file.read(PAGE)
            self._pages.pop(page, None)
            self._add(page, _ZEROS if kept is None else kept)
        older.close()

    def close(self) -> None:
        """Forget everything."""
        self._pages.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

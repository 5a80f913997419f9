"""What a phase prints: all of it in files, its beginning and its end for the report.

Nothing of it is held in memory beyond those, and no guest fills the host's disk with it.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

SHOWN: Final = 32 << 10
"""Bytes of a stream's beginning, and as many of its end, that go into the report."""

MOST_KEPT: Final = 256 << 20
"""Bytes of a stream that are kept in a file."""


class _Stream:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._file: IO[bytes] | None = None

    def take(self, data: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
        self._file.write(data[: max(0, MOST_KEPT - self.size)])
        self.size += len(data)
        room = SHOWN - len(self.head)
        self.head += data[:room]
        rest = data[room:] if room < len(data) else b""
        if rest:
            self._tail.append(rest)
            self._tail_size += len(rest)
        while self._tail and self._tail_size - len(self._tail[0]) >= SHOWN:
            self._tail_size -= len(self._tail.popleft())

    @property
    def tail(self) -> bytes:
        return b"".join(self._tail)[-SHOWN:]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Printed:
    """The streams of one phase, by name; a context manager that closes their files.

    Args:
        directory: Where the files are, one for each stream that was written to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._streams: dict[str, _Stream] = {}

    def take(self, stream: str, data: bytes) -> None:
        """Take what was printed to `stream`.

        Raises:
            OSError: it cannot be written.
        """
        if stream not in self._streams:
            self._streams[stream] = _Stream(self._directory / f"{stream}.log")
        self._streams[stream].take(data)

    def shown(self, stream: str) -> tuple[str, Path | None]:
        """What the report shows of `stream`, and the file with all of it if that is not all."""
        printed = self._streams.get(stream)
        if printed is None:
            return "", None
        printed.close()
        head, tail = (
            bytes(part).decode("utf-8", "backslashreplace") for part in (printed.head, printed.tail)
        )
        left_out = printed.size - len(printed.head) - len(printed.tail)
        if not left_out:
            return head + tail, None
        return f"{head}\n[... {left_out} bytes: see the file ...]\n{tail}", printed.path

    def last_line(self, stream: str, limit: int = 300) -> str:
        """The last line of `stream` that has something in it; empty if there is none."""
        printed = self._streams.get(stream)
        if printed is None:
            return ""
        end = (bytes(printed.head) + printed.tail)[-4 * limit :]
        lines = [line.strip() for line in end.decode("utf-8", "backslashreplace").splitlines()]
        return next((line[:limit] for line in reversed(lines) if line), "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams.values():
            stream.close()

"""A disk before another one: it counts what goes through, and what fails."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from vmlab.engine.devices.storage.disk import Disk


@dataclass
class DiskCounters:
    """What went through since the disk was opened; bytes are those of operations that succeeded."""

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    failed_reads: int = 0
    failed_writes: int = 0
    failed_flushes: int = 0


class MeteredDisk:
    """The disk `below`, counted.

    Attributes:
        counters: What went through.
    """

    def __init__(self, below: Disk) -> None:
        self.below = below
        self.read_only = below.read_only
        self.discard_alignment = below.discard_alignment
        self.counters = DiskCounters()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.below.size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        counters = self.counters
        try:
            data = self.below.read(offset, size)
        except OSError:
            with self._lock:
                counters.failed_reads += 1
            raise
        with self._lock:
            counters.reads += 1
            counters.read_bytes += size
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` from `offset` on."""
        try:
            self.below.write(offset, data)
        except OSError:
            self._failed_to_write()
            raise
        self._written(len(data))

    def flush(self) -> None:
        """What was written is on stable storage when this returns."""
        counters = self.counters
        try:
            self.below.flush()
        except OSError:
            with self._lock:
                counters.failed_flushes += 1
            raise
        with self._lock:
            counters.flushes += 1

    def discard(self, offset: int, size: int) -> None:
        """The content is not needed any more; nothing is counted."""
        self.below.discard(offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Write zeros."""
        try:
            self.below.write_zeroes(offset, size, unmap=unmap)
        except OSError:
            self._failed_to_write()
            raise
        self._written(size)

    def resize(self, size: int) -> None:
        """Give the disk another size, in bytes.

        Raises:
            VmlabError: it cannot have that size.
        """
        self.below.resize(size)

    def close(self) -> None:
        """Release the file."""
        self.below.close()

    def _failed_to_write(self) -> None:
        with self._lock:
            self.counters.failed_writes += 1

    def _written(self, size: int) -> None:
        with self._lock:
            self.counters.writes += 1
            self.counters.written_bytes += size

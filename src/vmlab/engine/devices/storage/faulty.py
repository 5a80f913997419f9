"""A disk before another one that can fail, wait, lie, and lose power.

A request is struck by each fault whose trigger says so. What was written since the last completed
flush is gone after `lose_power`; until then it can be read, as from a disk with a write cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from vmlab.engine.devices.occasions import ALWAYS, Occasions, Trigger
from vmlab.engine.devices.storage.disk import Disk
from vmlab.engine.devices.storage.unflushed import Unflushed

EIO: Final = 5
_DISCARDS: Final = 256
"""Discards that wait for a flush; one is only a hint, and the oldest is forgotten."""


class DiskOperation(Enum):
    """What can be done with a disk; a write is also one of zeros, and a discard."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"


class DiskMishap(Enum):
    """What can happen to a request."""

    ERROR = "error"
    SLOW = "slow"
    TORN = "torn"


@dataclass(frozen=True)
class DiskFault:
    """What happens to requests.

    Attributes:
        mishap: What happens.
        operations: To which requests.
        errno: Of an error: what the request fails with.
        delay: Of a slow disk: seconds that a request takes longer.
        keep: Of a torn write: bytes that arrive.
        when: To which of them.
    """

    mishap: DiskMishap
    operations: list[DiskOperation] = field(default_factory=lambda: list(DiskOperation))
    errno: int = EIO
    delay: float = 0.0
    keep: int = 512
    when: Trigger = ALWAYS


class _Armed:
    """A fault at work."""

    def __init__(self, fault: DiskFault, nanoseconds: Callable[[], int]) -> None:
        self.fault = fault
        self.occasions = Occasions(fault.when, nanoseconds)
        self.cleared = threading.Event()


class FaultyDisk:
    """The disk `below`, which can be broken.

    Args:
        below: What is read and written.
        nanoseconds: The machine's time, by which faults last.
    """

    def __init__(self, below: Disk, nanoseconds: Callable[[], int]) -> None:
        self.below = below
        self.read_only = below.read_only
        self.discard_alignment = below.discard_alignment
        self._now = nanoseconds
        self._lock = threading.Lock()
        self._armed: dict[str, _Armed] = {}
        self._unflushed = Unflushed()
        self._flushing: list[Unflushed] = []
        self._discards: list[tuple[int, int]] = []
        self._dead = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.below.size

    @property
    def has_power(self) -> bool:
        """Whether it works at all."""
        return not self._dead

    # -------------------------------------------------------------------------------- faults

    def add(self, name: str, fault: DiskFault) -> None:
        """Have a fault at work from now on, instead of one that had its name."""
        self.remove(name)
        self._armed[name] = _Armed(fault, self._now)

    def remove(self, name: str) -> bool:
        """End a fault; requests that wait because of it go on. False: there is none."""
        armed = self._armed.pop(name, None)
        if armed is not None:
            armed.cleared.set()
        return armed is not None

    def corrupt(self, offset: int, size: int) -> None:
        """Invert bytes where they are, as far as the disk has them; nobody is told."""
        size = min(size, self.size - offset)
        if size > 0:
            with self._lock:
                content = self.below.read(offset, size)
                self.below.write(offset, bytes(byte ^ 0xFF for byte in content))

    def lose_power(self) -> None:
        """Lose what was not flushed; nothing works any more after that."""
        with self._lock:
            if self._dead or self.read_only:
                self._dead = True
                return
            self._dead = True
            # The oldest last: a page has to be what it was before the first of them.
            for unflushed in [self._unflushed, *reversed(self._flushing)]:
                for offset, content in unflushed.contents(self.size):
                    self.below.write(offset, content)
                unflushed.close()
            self.below.flush()

    def unflushed(self) -> int:
        """How many pages would be lost."""
        with self._lock:
            return len(self._unflushed) + sum(map(len, self._flushing))

    def _meet(self, operation: DiskOperation) -> int | None:
        """Let faults strike a request; of a torn write, the bytes that arrive.

        Raises:
            OSError: the request fails.
        """
        if self._dead:
            raise OSError(EIO, "there is no power")
        if not self._armed:
            return None
        keep = None
        failure = None
        for armed in list(self._armed.values()):
            fault = armed.fault
            if operation not in fault.operations or not armed.occasions.strikes():
                continue
            if fault.mishap is DiskMishap.ERROR:
                failure = fault.errno
            elif fault.mishap is DiskMishap.SLOW:
                armed.cleared.wait(fault.delay)
            else:
                keep = fault.keep
        if failure is not None:
            raise OSError(failure, os.strerror(failure))
        return keep

    # ------------------------------------------------------------------------------ requests

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        self._meet(DiskOperation.READ)
        return self.below.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` from `offset` on, or the beginning of it."""
        keep = self._meet(DiskOperation.WRITE)
        if keep is not None:
            data = data[:keep]
        if data:
            with self._lock:
                self._about_to_change(offset, len(data))
                self.below.write(offset, data)

    def flush(self) -> None:
        """What was written is on stable storage when this returns."""
        self._meet(DiskOperation.FLUSH)
        with self._lock:
            flushing, self._unflushed = self._unflushed, Unflushed()
            self._flushing.append(flushing)
            discards, self._discards = self._discards, []
        try:
            self.below.flush()
        except OSError:
            with self._lock:
                self._flushing.remove(flushing)
                self._unflushed.under(flushing)
            raise
        with self._lock:
            if self._dead:
                raise OSError(EIO, "there is no power")
            self._flushing.remove(flushing)
            flushing.close()
            # Only now may be forgotten what was there, and only if it was not written since.
            for offset, size in discards:
                if not len(self._unflushed) and not self._flushing:
                    self.below.discard(offset, size)

    def discard(self, offset: int, size: int) -> None:
        """The content is not needed any more; it goes with the next flush."""
        self._meet(DiskOperation.WRITE)
        with self._lock:
            self._discards = [*self._discards[1 - _DISCARDS :], (offset, size)]

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Write zeros; `unmap` allows to give the space back."""
        keep = self._meet(DiskOperation.WRITE)
        if keep is not None:
            size = min(size, keep)
        if size:
            with self._lock:
                self._about_to_change(offset, size)
                self.below.write_zeroes(offset, size, unmap=unmap)

    def _about_to_change(self, offset: int, size: int) -> None:
        """Remember what is there."""
        if self._dead:
            raise OSError(EIO, "there is no power")
        self._unflushed.remember(offset, size, self.size, self.below.read)
        # What is written is needed again.
        self._discards = [
            (begin, length)
            for begin, length in self._discards
            if begin >= offset + size or offset >= begin + length
        ]

    def resize(self, size: int) -> None:
        """Give the disk another size, in bytes.

        Raises:
            VmlabError: it cannot have that size.
        """
        with self._lock:
            self.below.resize(size)

    def close(self) -> None:
        """Release the file; what was written stays."""
        with self._lock:
            for unflushed in [self._unflushed, *self._flushing]:
                unflushed.close()
            self.below.close()

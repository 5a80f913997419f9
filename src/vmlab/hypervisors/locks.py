"""Locks that the kernel drops with the process that holds them, whatever kills it: flock(2).

A lock is a file. It may be removed by its holder, together with what it protects: whoever gets
the removed file's lock afterwards notices and has nothing.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vmlab.machine.errors import OperationFailed

__all__ = ["POLL_S", "FileLock", "busy", "locked_now"]

POLL_S: Final = 0.02
"""How often a lock that another process holds is tried."""


class FileLock:
    """A lock file held by this process alone: flock(2), on a descriptor that no child inherits."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._owner = os.getpid()
        _held.add(self)

    @classmethod
    def take(cls, path: Path, *, create: bool = True, exclusive: bool = False) -> FileLock | None:
        """Lock that file now; None if another holds it, or replaced or removed it meanwhile.

        Args:
            path: The lock file.
            create: Make it if it is missing.
            exclusive: It must not exist yet.

        Raises:
            OSError: it cannot be opened.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_CREAT if create else 0
        flags |= os.O_EXCL if exclusive else 0
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before may have removed the file, and with it what it protects.
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def write(self, text: str) -> None:
        """Say in the file who holds it."""
        assert self._descriptor is not None
        # At once, with blanks for what was longer: who reads meanwhile reads the one or the other.
        size = os.fstat(self._descriptor).st_size
        os.pwrite(self._descriptor, text.encode().ljust(size), 0)

    @property
    def held(self) -> bool:
        """Whether this process holds it; a fork of it does not."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let go of it; again does nothing."""
        if self._descriptor is not None:
            # For all who share the open file: a child between fork and exec does for a moment.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.drop()

    def drop(self) -> None:
        """Close the descriptor, and nothing else: in a fork, the lock is the parent's."""
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: set[FileLock] = set()


def _close_after_fork() -> None:
    """A fork shares the lock's open file, and would hold the lock beyond its parent's death."""
    for lock in tuple(_held):
        lock.drop()


os.register_at_fork(after_in_child=_close_after_fork)


@contextmanager
def locked_now(path: Path, what: str, timeout: float = 60.0) -> Iterator[None]:
    """Hold a lock that others hold for moments only."""
    deadline = time.monotonic() + timeout
    while (lock := FileLock.take(path)) is None:
        if time.monotonic() >= deadline:
            raise busy(path, what, timeout)
        time.sleep(POLL_S)
    try:
        lock.write(str(os.getpid()))
        yield
    finally:
        lock.release()


def busy(path: Path, what: str, timeout: float) -> OperationFailed:
    """The error for a lock that was not to be had."""
    try:
        holder = f"process {path.read_text('ascii').strip() or 'unknown'}"
    except OSError:
        holder = "another process"
    return OperationFailed(
        f"{what} is in use by {holder}, for more than {timeout:g} s",
        hint="wait for it to end, or end it",
    )

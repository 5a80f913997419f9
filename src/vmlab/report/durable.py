"""Files that survive their writer: lines appended whole, documents replaced whole.

What a process wrote is safe from its own death as soon as write(2) returned, since the page cache
belongs to the kernel; only the death of the host asks for fsync(2), which costs milliseconds.
`Sync` is how much of that the caller pays for.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

from vmlab.machine.errors import VmlabError

__all__ = ["SYNC_INTERVAL_S", "AppendFile", "Sync", "write_atomically"]

SYNC_INTERVAL_S: Final = 1.0
"""How long lines may wait for the next under `Sync.INTERVAL`, in seconds."""


class Sync(StrEnum):
    """When appended lines are forced to the disk. The writer's own death never loses any.

    `always`: each line; `interval`: plans, a file's first and last line, and at any other line
    when the last time was `SYNC_INTERVAL_S` ago; `never`: the host's death may cost everything.
    """

    ALWAYS = "always"
    INTERVAL = "interval"
    NEVER = "never"


def cannot_write(path: Path, error: OSError) -> VmlabError:
    """The error for a results file that the operating system refused to write."""
    return VmlabError(
        f"cannot write {path}: {error.strerror or error}",
        hint="results go there: free some space, or name a directory that you may write to",
    )


def _sync_directory(directory: Path) -> None:
    """Make a new name in `directory` durable; not every file system can, and then it need not."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, so that a reader sees the old contents or the new, never a part.

    Missing directories are made. The new contents are on the disk when this returns.

    Raises:
        VmlabError: The file cannot be written; the old contents, if any, are untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error
    _sync_directory(path.parent)


class AppendFile:
    """A new file that lines are appended to, by any thread of the process that made it.

    A line is one write(2) call, so a killed writer leaves at most one torn line, the last. The file
    is locked (flock(2)) as long as it is open.

    Raises:
        FileExistsError: `path` exists; a file has one writer.
        VmlabError: It cannot be created.
    """

    def __init__(self, path: Path, *, sync: Sync = Sync.INTERVAL) -> None:
        self.path = path
        self._sync = sync
        self._lock = threading.Lock()
        self._torn = False
        self._synced_at = time.monotonic()
        self._owner = os.getpid()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor: int | None = os.open(path, flags, 0o666)
        except FileExistsError:
            raise
        except OSError as error:
            raise cannot_write(path, error) from error
        # The kernel drops it with the process, whatever kills that: so others know who lives. A
        # file system without locks has nothing to say on it.
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sync_directory(path.parent)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._descriptor is None

    def append(self, line: bytes, *, durable: bool = False) -> None:
        """Append `line` (without a newline) and its end; `durable` forces it to the disk.

        `durable` is honoured unless the file's policy is `Sync.NEVER`.

        Raises:
            VmlabError: The disk is full or failed, the file is closed, or the caller is a forked
                child of the process that opened it.
        """
        with self._lock:
            if self._owner != os.getpid():
                raise VmlabError(
                    f"{self.path} belongs to process {self._owner}, not to {os.getpid()}",
                    hint="a forked worker writes its own: Recorder.join(directory, worker)",
                )
            if self._descriptor is None:
                raise VmlabError(
                    f"{self.path} is closed", hint="record results before the recorder is closed"
                )
            try:
                self._write(line + b"\n")
                self._sync_if_due(durable)
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        # After a write that failed half-way, a newline keeps the damage to that one line.
        rest = memoryview(b"\n" + data if self._torn else data)
        while rest:
            written = os.write(self._descriptor, rest)
            rest = rest[written:]
            self._torn = bool(rest)

    def _sync_if_due(self, durable: bool) -> None:
        assert self._descriptor is not None
        if self._sync is Sync.NEVER:
            return
        now = time.monotonic()
        due = now - self._synced_at >= SYNC_INTERVAL_S
        if durable or due or self._sync is Sync.ALWAYS:
            os.fsync(self._descriptor)
            self._synced_at = now

    def close(self) -> None:
        """Force what was written to the disk and close the file; a second call does nothing."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is None:
                return
            try:
                if self._sync is not Sync.NEVER and self._owner == os.getpid():
                    os.fsync(descriptor)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            finally:
                os.close(descriptor)

    def abandon(self) -> None:
        """Close the file and remove it: nothing in it is worth keeping."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)
                self.path.unlink(missing_ok=True)

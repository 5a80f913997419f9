"""The lock that makes a home's manager one, and what it says about who has it.

The kernel drops it with the process that holds it (flock(2)). Only what the holder wrote while the
lock is held is believed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmlab.hypervisors.locks import FileLock, busy
from vmlab.hypervisors.processes import ProcessIdentity
from vmlab.machine.errors import OperationFailed

__all__ = ["Holder", "end_holder", "hold", "holder"]

_NAME: Final = "service.lock"
"""Not the lock of `Manager` itself, which says nothing of who has it."""
_POLL: Final = 0.05
_PATIENCE: Final = 120.0
"""Seconds that a manager has to come to its end: it lets what it answers be answered."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The manager that runs: its process, whether nobody is to miss it, and where it answers."""

    pid: int
    start: int
    background: bool
    urls: tuple[str, ...]

    @property
    def process(self) -> ProcessIdentity | None:
        """Its process, if it is still that one."""
        found = ProcessIdentity.of(self.pid)
        return found if found is not None and found.start == self.start else None


def holder(directory: Path) -> Holder | None:
    """Who has the lock of the manager in `directory`; None if nobody has."""
    path = directory / _NAME
    with suppress(FileNotFoundError):
        lock = FileLock.take(path, create=False)
        if lock is not None:
            lock.release()
            return None
    try:
        data = json.loads(path.read_text("utf-8"))
        return Holder(
            int(data["pid"]), int(data["start"]), bool(data["background"]), tuple(data["urls"])
        )
    except (OSError, ValueError, LookupError, TypeError):
        # It is just beginning, or there is none.
        return None


class Hold:
    """The lock, held by this process."""

    def __init__(self, lock: FileLock, *, background: bool) -> None:
        self._lock = lock
        self._background = background
        self.tell(())

    def tell(self, urls: Sequence[str]) -> None:
        """Write down who this is and where it answers."""
        myself = ProcessIdentity.of(os.getpid())
        assert myself is not None
        self._lock.write(
            json.dumps(
                {
                    "pid": myself.pid,
                    "start": myself.start,
                    "background": self._background,
                    "urls": list(urls),
                }
            )
        )

    def release(self) -> None:
        """Let the next one have it; again does nothing."""
        self._lock.release()


def hold(directory: Path, *, background: bool, replace: bool = True) -> Hold:
    """Become the manager of a directory.

    Args:
        directory: The manager's.
        background: Whether this one is to leave when another wants to be it.
        replace: Whether one in the background is ended for it; else it is waited for.

    Raises:
        OperationFailed: another manager runs there.
    """
    path = directory / _NAME
    deadline = time.monotonic() + _PATIENCE
    told = False
    while (lock := FileLock.take(path)) is None:
        found = holder(directory)
        # Who only looks has the lock for a moment, while the file tells of one that is gone.
        if found is not None and not found.background and found.process is not None:
            raise OperationFailed(
                f"the manager of this home runs already: process {found.pid}, "
                f"at {', '.join(found.urls) or 'no place yet'}",
                hint="commands find it by themselves; `vmlab serve --stop` ends it",
            )
        if found is not None and replace and not told:
            told = _tell_to_end(found)
        if time.monotonic() >= deadline:
            raise busy(path, "the place of the manager", _PATIENCE)
        time.sleep(_POLL)
    return Hold(lock, background=background)


def end_holder(directory: Path) -> Holder | None:
    """End the manager of a directory, and wait until it has; returns who it was, if there was one.

    Raises:
        OperationFailed: it does not end.
    """
    found = holder(directory)
    if found is None:
        return None
    deadline = time.monotonic() + _PATIENCE
    _tell_to_end(found)
    while holder(directory) == found:
        if time.monotonic() >= deadline:
            raise OperationFailed(
                f"the manager, process {found.pid}, does not end",
                hint=f"`kill -KILL {found.pid}` loses nothing that it has acknowledged",
            )
        time.sleep(_POLL)
    return found


def _tell_to_end(found: Holder) -> bool:
    process = found.process
    if process is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
    return True

"""Writing to the disk of a store: errors that a person understands, and writes that are whole.

A file appears under its name complete or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from vmlab.images.errors import StoreError
from vmlab.images.progress import Progress, ProgressEvent, silent

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_CHUNK = 1 << 20
_SECONDS_BEFORE_TELLING = 0.2
_SECONDS_FOR_LOCK = 3600.0
_SECONDS_TO_TAKE_GUARD = 5.0


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into a `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(
                f"{path} cannot be written: {error.strerror} ({_free(path)} free)",
                hint="make room (`vmlab image prune`), or put the store elsewhere "
                "(VMLAB_IMAGE_STORE)",
            ) from error
        if error.errno in _FORBIDDEN:
            raise StoreError(
                f"{path} cannot be written: {error.strerror}",
                hint="put the store where you may write (VMLAB_IMAGE_STORE)",
            ) from error
        raise


def _free(path: Path) -> str:
    for place in (path, *path.parents):
        if place.is_dir():
            return f"{shutil.disk_usage(place).free >> 20} MiB"
    return "an unknown amount"


@contextmanager
def lock(path: Path, *, what: str, progress: Progress = silent) -> Iterator[None]:
    """Hold the lock file `path`; whoever else wants it waits, and says so.

    Raises:
        StoreError: the lock cannot be made, or is held for more than an hour.
    """
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path)
        try:
            held.acquire(timeout=_SECONDS_BEFORE_TELLING)
        except Timeout:
            step = f"waiting for another process: {what}"
            progress(ProgressEvent(step))
            try:
                held.acquire(timeout=_SECONDS_FOR_LOCK)
            except Timeout as error:
                raise StoreError(
                    f"{what}: another process has held {path} for an hour",
                    hint="find out which process it is (`fuser` on the file) and end it",
                ) from error
            progress(ProgressEvent(step, finished=True))
    try:
        yield
    finally:
        held.release()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends well, and vanishes when it does not."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        new = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            new.chmod(0o644)
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


@contextmanager
def working_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory for a build, gone when the block ends, however it ends.

    What a killed process leaves is cleared by `clear_abandoned`.
    """
    with storing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f"{prefix}.{os.getpid()}.", dir=parent))
    guard = FileLock(directory / ".alive")
    guard.acquire()
    try:
        with storing(directory):
            yield directory
    finally:
        guard.release()
        remove_tree(directory)


def clear_abandoned(parent: Path) -> list[Path]:
    """Remove the working directories whose builds are no longer alive; returns what was removed."""
    removed: list[Path] = []
    if not parent.is_dir():
        return removed
    for directory in sorted(parent.iterdir()):
        guard = FileLock(directory / ".alive")
        try:
            if time.time() - directory.stat().st_mtime < _SECONDS_TO_TAKE_GUARD:
                continue  # just made: its process may not hold its guard yet
            guard.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        guard.release()
        with suppress(StoreError):  # something is mounted there: the next one tries again
            remove_tree(directory)
            removed.append(directory)
    return removed


def remove_tree(directory: Path) -> None:
    """Remove a directory with all that it holds, also what its modes forbid to remove.

    Raises:
        StoreError: something is mounted in it, which has to stay.
    """
    mounted = _mounts_below(directory)
    if mounted:
        raise StoreError(
            f"{directory} is not removed: {mounted[0]} is mounted in it",
            hint=f"unmount it first: umount {mounted[0]}",
        )

    def allow(function: object, name: str, error: object) -> None:
        place = Path(name)
        for candidate in (place.parent, place):
            if candidate.is_dir() and not candidate.is_symlink():
                candidate.chmod(0o700)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)

    if directory.exists():
        shutil.rmtree(directory, onerror=allow)


def _mounts_below(directory: Path) -> list[str]:
    """What is mounted below a directory, proc(5) "mountinfo"; nothing where there is no /proc."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    prefix = f"{directory.resolve()}/"
    places = (
        re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        for line in lines
    )
    return [place for place in places if place.startswith(prefix)]


def sha256(path: Path, *, step: str | None = None, progress: Progress = silent) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if step is not None:
                progress(ProgressEvent(step, done, size))
    if step is not None:
        progress(ProgressEvent(step, size, size, finished=True))
    return digest.hexdigest()

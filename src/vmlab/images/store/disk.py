"""Writing to the disk of a store: errors that a person understands, and writes that are whole.

A file appears under its name complete or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
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
_GUARD = ".alive"


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
    """A file that becomes `path` when the block ends well, and vanishes when it does not.

    Processes that write the same file do so one after the other. What a killed one leaves is
    written over by the next one that wants the file.
    """
    new = path.with_name(f".new-{path.name}")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _owned(new) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
                new.replace(path)
            except BaseException:
                new.unlink(missing_ok=True)
                raise


def _owned(path: Path) -> IO[bytes]:
    """`path` opened, empty, and locked until it is closed; made if it is not there."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate()
                return file
        except FileNotFoundError:
            pass  # whoever had it has renamed it meanwhile
        file.close()


@contextmanager
def working_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory for a build, gone when the block ends, however it ends.

    What a killed process leaves is cleared by `clear_abandoned`: a directory whose guard, the
    lock file beside it, nobody holds.
    """
    with storing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        with _between_making_and_guarding(parent):
            directory = Path(tempfile.mkdtemp(prefix=f"{prefix}.{os.getpid()}.", dir=parent))
            guard = FileLock(_guard_of(directory))
            guard.acquire()
    try:
        with storing(directory):
            yield directory
    finally:
        try:
            remove_tree(directory)
            _guard_of(directory).unlink(missing_ok=True)
        finally:
            guard.release()


def clear_abandoned(parent: Path) -> list[Path]:
    """Remove the working directories whose builds are no longer alive; returns what was removed."""
    removed: list[Path] = []
    if not parent.is_dir() or not any(parent.iterdir()):
        return removed
    with _between_making_and_guarding(parent):
        for place in sorted(parent.iterdir()):
            directory = place.with_suffix("") if place.suffix == _GUARD else place
            guard = FileLock(_guard_of(directory))
            try:
                guard.acquire(timeout=0)
            except (Timeout, OSError):
                continue
            try:
                with suppress(StoreError):  # something is mounted there: the next one tries again
                    if directory.exists():
                        remove_tree(directory)
                        removed.append(directory)
                    _guard_of(directory).unlink(missing_ok=True)
            finally:
                guard.release()
    return removed


def _guard_of(directory: Path) -> Path:
    return directory.with_name(directory.name + _GUARD)


def _between_making_and_guarding(parent: Path) -> AbstractContextManager[None]:
    """So that nobody takes a directory for abandoned that is just being made."""
    return lock(parent.parent / "locks" / f"{parent.name}.lock", what="clearing leftovers")


def remove_tree(directory: Path) -> None:
    """Remove a directory with all that it holds, also what its modes forbid to remove.

    Raises:
        StoreError: something is mounted in it, which has to stay, or it is another user's.
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
            with suppress(FileNotFoundError):  # another process removes the same tree
                if candidate.is_dir() and not candidate.is_symlink():
                    candidate.chmod(0o700)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)

    if not directory.exists():
        return
    try:
        shutil.rmtree(directory, onerror=allow)
    except PermissionError as error:
        from vmlab.images.roots.confinement import remove_lent

        remove_lent(directory)  # files of the ids that an installation was lent
        if directory.exists():
            raise StoreError(
                f"{directory} cannot be removed: {error.filename or directory} is another user's",
                hint="remove it as the user who made it, or as root",
            ) from error


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

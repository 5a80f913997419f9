"""Names among a manager's exports that are there for a command alone.

For an import a command lends the manager of its home a file: a second name, which lasts as long as
the command, which holds a lock (flock(2)) on the file. The kernel drops that with the process,
whatever kills it, and the next manager removes names that nobody holds. The lock is on the file and
not on its name, so whoever else has the file is asked to wait for nothing.

An archive that is taken away as soon as it is there, or was brought for one import, has a passing
name. Whoever is to remove it may be on another host, and be killed: a manager that begins removes
those that are older than a week.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Final

__all__ = ["forget_lent", "forget_passing", "is_lent", "lent", "passing_name"]

_LOG: Final = logging.getLogger(__name__)
_NAME: Final = re.compile(r"import-[0-9a-f]{16}")
_PASSING: Final = re.compile(r"once-[0-9a-f]{16}")
_PASSING_SECONDS: Final = 7 * 86400.0


def is_lent(name: str) -> bool:
    """Whether that is such a name, which no archive of the manager's has."""
    return _NAME.fullmatch(name) is not None


@contextmanager
def lent(file: Path, directory: Path, *, copying: Callable[[], object]) -> Iterator[str]:
    """Lend a file while the block lasts; what is entered is its name in `directory`.

    Args:
        file: What is lent.
        directory: The manager's exports; made if it is missing.
        copying: Called before it is copied, which it is where a file has one name only: on another
            file system, or if it is somebody else's.

    Raises:
        OSError: it is no file that can be read, or there is no room for a copy.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    name = directory / f"import-{secrets.token_hex(8)}"
    with file.open("rb") as source:
        # Before it has the name: a manager that begins now would remove one that nobody holds.
        fcntl.flock(source, fcntl.LOCK_SH)
        try:
            with ExitStack() as stack:
                if not _linked(file, name):
                    copying()
                    copy = stack.enter_context(_held(name))
                    shutil.copyfileobj(source, copy)
                    copy.flush()
                yield name.name
        finally:
            name.unlink(missing_ok=True)


def _linked(file: Path, name: Path) -> bool:
    try:
        os.link(file.resolve(strict=True), name)
    except OSError:
        return False
    return True


@contextmanager
def _held(name: Path) -> Iterator[IO[bytes]]:
    """A new file that is locked."""
    while True:
        with name.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return


def forget_lent(directory: Path, wanted: Collection[str]) -> None:
    """Remove the names of files that nobody lends any more.

    Args:
        directory: The manager's exports.
        wanted: Names that an import has yet to read.
    """
    for path in directory.iterdir():
        if not is_lent(path.name) or path.name in wanted or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except BlockingIOError:
            # Its command is there, and about to ask for the import.
            continue
        except OSError as error:
            _LOG.warning("%s, which nobody lends any more, is not removed: %s", path, error)


def passing_name() -> str:
    """A new name for an archive that is removed a week after it was written."""
    return f"once-{secrets.token_hex(8)}"


def forget_passing(directory: Path, wanted: Collection[str]) -> None:
    """Remove the archives of passing names that nobody has taken away.

    Args:
        directory: The manager's exports.
        wanted: Names that an import has yet to read.
    """
    written_before = time.time() - _PASSING_SECONDS
    for path in directory.iterdir():
        if _PASSING.fullmatch(path.name) is None or path.name in wanted or not path.is_file():
            continue
        try:
            if path.stat().st_mtime < written_before:
                path.unlink()
        except OSError as error:
            _LOG.warning("%s, which nobody has taken away, is not removed: %s", path, error)

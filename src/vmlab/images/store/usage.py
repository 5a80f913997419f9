"""How much the store holds, and making room in it: what was used longest ago goes first.

Fetched files go before images, since a warm store without network needs its images only.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmlab.images.errors import StoreError
from vmlab.images.image import MANIFEST
from vmlab.images.store.blobs import BlobCache
from vmlab.images.store.disk import clear_abandoned, remove_tree

# An image that another process has just asked for is not taken away under it.
_SECONDS_OF_GRACE = 3600.0
_PARTIAL_SECONDS = 7 * 24 * 3600.0


@dataclass
class Freed:
    """What was removed: bytes, and the names of images and files."""

    size: int = 0
    images: list[str] = field(default_factory=list)
    files: int = 0


@contextmanager
def unused(directory: Path) -> Iterator[bool]:
    """Whether no process uses the image in `directory`; none can hold it while the block runs.

    Used is an image that is held (`Image.hold`), and one whose files a program has locked: QEMU
    does so with every disk that it has open, also underneath an overlay.
    """
    try:
        file = (directory / MANIFEST).open("rb")
    except FileNotFoundError:
        yield True  # not an image yet, or no more
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not any(_locked(path) for path in directory.iterdir() if path.name != MANIFEST)


# struct flock of Linux on 64-bit machines: type, whence, start, length, pid; fcntl_locking(2).
_FLOCK = struct.Struct("hh4xqqi4x")


def _locked(path: Path) -> bool:
    """Whether any program has a record lock on the file, of any kind and anywhere in it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        with path.open("rb") as file:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:
        return False
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def disk_usage(directory: Path) -> int:
    """Bytes that a directory's files take on disk: holes in sparse files count nothing.

    A disk that several images share counts in each of them for its part.
    """
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            total += status.st_blocks * 512 // max(status.st_nlink if path.is_file() else 1, 1)
    return total


def prune(
    root: Path,
    blobs: BlobCache,
    *,
    limit: int,
    keep: frozenset[str] = frozenset(),
    grace_seconds: float = _SECONDS_OF_GRACE,
) -> Freed:
    """Remove leftovers of killed builds, then what was used longest ago, down to `limit` bytes.

    Args:
        root: The store's directory.
        blobs: Its fetched files.
        limit: Bytes that may remain.
        keep: Digests of images that stay (imported ones: nothing could bring them back).
        grace_seconds: What was used within this time stays as well.
    """
    freed = Freed()
    now = time.time()
    clear_leftovers(root)
    files = blobs.sizes()
    images = _images(root)
    total = sum(size for _, size, _ in files) + sum(size for _, size, _ in images)
    for path, size, used in sorted(files, key=lambda item: item[2]):
        stale = path.parent.name == "partial" and now - used > _PARTIAL_SECONDS
        if stale or (total > limit and now - used >= grace_seconds):
            path.unlink(missing_ok=True)
            total -= size
            freed.size += size
            freed.files += 1
    for directory, size, used in sorted(images, key=lambda item: item[2]):
        if total <= limit:
            break
        if directory.name in keep or now - used < grace_seconds:
            continue
        if remove_image(directory):
            total -= size
            freed.size += size
            freed.images.append(directory.name)
    return freed


def clear_leftovers(root: Path) -> None:
    """Remove what killed processes left: directories of builds, and images half removed."""
    clear_abandoned(root / "work")
    for gone in (root / "images").glob(".gone-*"):
        with suppress(StoreError):  # something is mounted there
            remove_tree(gone)


def remove_image(directory: Path) -> bool:
    """Remove an image's directory; False if a process holds it."""
    with unused(directory) as free:
        if not free:
            return False
        gone = directory.with_name(f".gone-{directory.name}")
        remove_tree(gone)
        directory.rename(gone)
    remove_tree(gone)
    return True


def _images(root: Path) -> list[tuple[Path, int, float]]:
    found = []
    for directory in (root / "images").glob("[!.]*"):
        try:
            used = (directory / MANIFEST).stat().st_mtime
        except FileNotFoundError:
            used = 0.0  # what a killed process left
        found.append((directory, disk_usage(directory), used))
    return found

"""The files among the store's disks, what they are, and how much room there is.

Formats by their first bytes: qcow2's header is in QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from vmlab.manager.observer.seen import SeenFile, SeenVolume

__all__ = ["QUARANTINE", "disk_files", "volumes"]

QUARANTINE: Final = "quarantine"
"""Directory, beside the disks, of files that were moved aside."""

_DISK: Final = re.compile(r"([0-9a-f]{32})\.(raw|qcow2)(\.part)?")
_QCOW2: Final = b"QFI\xfb"
_SIZE_AT: Final = 24
"""Offset of the virtual size in qcow2's header, 8 bytes, big-endian."""


def disk_files(directory: Path) -> list[SeenFile]:
    """All files in the directory of disks; hidden ones are somebody's half-written ones."""
    try:
        with os.scandir(directory) as entries:
            found = sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:
        return []
    seen = (_file(directory / name) for name in found)
    return [file for file in seen if file is not None]


def _file(path: Path) -> SeenFile | None:
    """What is in that file; None if it has just been removed."""
    match = _DISK.fullmatch(path.name)
    try:
        facts = path.lstat()
        changed = datetime.fromtimestamp(max(facts.st_mtime, facts.st_ctime), UTC)
        if match is not None and match[3] is not None:
            size, problem = None, "it is half made"
        else:
            size, problem = _disk_size(path, match[2] if match else "")
    except FileNotFoundError:
        return None
    except OSError as error:
        return SeenFile(
            path, match[1] if match else None, None, datetime.now(UTC), error.strerror or str(error)
        )
    return SeenFile(path, match[1] if match else None, size, changed, problem)


def _disk_size(path: Path, format_: str) -> tuple[int | None, str]:
    """The size of the disk in that file, or why it is none."""
    with path.open("rb") as file:
        head = file.read(_SIZE_AT + 8)
        if format_ == "qcow2":
            if len(head) < _SIZE_AT + 8 or not head.startswith(_QCOW2):
                return None, "it does not begin as a qcow2 file does"
            return int(struct.unpack_from(">Q", head, _SIZE_AT)[0]), ""
        return os.fstat(file.fileno()).st_size, ""


def volumes(directories: Iterable[Path]) -> list[SeenVolume]:
    """The file systems of those directories, each one once, by the first directory on it."""
    seen: dict[int, SeenVolume] = {}
    for directory in directories:
        try:
            device = directory.stat().st_dev
            facts = os.statvfs(directory)
        except OSError:
            continue  # not made yet: nothing can run out of room there
        size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
        seen.setdefault(device, SeenVolume(directory, size, free))
    return list(seen.values())

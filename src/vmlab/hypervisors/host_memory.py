"""How much memory machines can have on this host: what it has free, and what a cgroup leaves.

/proc/meminfo (proc(5)); the limits of the process's cgroup and of those above it: memory.max and
memory.current of version 2 (Linux's cgroup-v2.rst), memory.limit_in_bytes and
memory.usage_in_bytes of version 1 (cgroup-v1/memory.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

__all__ = ["HostMemory", "host_memory"]

_NO_LIMIT: Final = 1 << 60
"""Version 1 writes no limit as the largest multiple of a page, near 2^63."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in bytes: the host's, what is free for use, and the cgroup's limit.

    `available` is the least of what the host and each cgroup have left; `limit` is None, and
    `limited_by` empty, where no cgroup sets one.
    """

    total: int
    available: int
    limit: int | None = None
    limited_by: str = ""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """What there is now.

    Args:
        root: Where the host's files are.
    """
    total, available = _meminfo(root)
    limit: int | None = None
    limited_by = ""
    for directory, maximum, used in _cgroups(root):
        if limit is None or maximum < limit:
            limit, limited_by = maximum, str(directory)
        available = min(available, max(0, maximum - used))
    return HostMemory(total, available, limit, limited_by)


def _meminfo(root: Path) -> tuple[int, int]:
    """Total and available memory of the host, bytes."""
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        fields = {
            name: int(value.split()[0]) << 10
            for name, _, value in (line.partition(":") for line in lines)
        }
        return fields["MemTotal"], fields["MemAvailable"]
    except (OSError, ValueError, LookupError):
        # Not Linux.
        memory = psutil.virtual_memory()
        return memory.total, memory.available


def _cgroups(root: Path) -> Iterator[tuple[Path, int, int]]:
    """The cgroups with a limit that this process is in: directory, limit and use in bytes."""
    mounts = _cgroup_mounts(root)
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            kind, names = "cgroup2", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            kind, names = "cgroup", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        if (mount := mounts.get(kind)) is None:
            continue
        for directory in _upwards(mount, path):
            maximum, used = (_number(directory / name) for name in names)
            if maximum is not None and maximum < _NO_LIMIT:
                yield directory, maximum, used or 0


def _cgroup_mounts(root: Path) -> dict[str, Path]:
    """Where the hierarchies with memory are mounted: "cgroup2", and "cgroup" for version 1."""
    mounts: dict[str, Path] = {}
    try:
        lines = (root / "proc/self/mountinfo").read_text("utf-8").splitlines()
    except OSError:
        return mounts
    for line in lines:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            mounts.setdefault(kind, root / before.split(" ")[4].lstrip("/"))
    return mounts


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The directory of a cgroup and those above it, as far as they can be seen."""
    directory = mount / path.lstrip("/")
    # In a container the path may be the host's, of which only the top is mounted.
    while directory != mount:
        yield directory
        directory = directory.parent
    yield mount


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or without a file."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None

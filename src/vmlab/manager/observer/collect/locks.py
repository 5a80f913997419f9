"""Lock files of the manager and its machines, and who holds them: proc_locks(5), flock(2)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.process_identity import ProcessIdentity
from vmlab.hypervisors.records import LOCK
from vmlab.manager.observer.seen import SeenLock

__all__ = ["locks_of"]


def locks_of(owners: Iterable[Owner], manager: Iterable[Path]) -> list[SeenLock] | None:
    """The locks of stores' machines, and those of the manager's own with the given paths.

    None where the kernel does not tell who holds locks (there is no /proc/locks).
    """
    holders = _holders()
    if holders is None:
        return None
    paths: list[tuple[Path, str | None]] = [(path, None) for path in manager]
    for owner in owners:
        try:
            for hypervisor in sorted((owner.directory / "machines").iterdir()):
                paths += [(one / LOCK, one.name) for one in sorted(hypervisor.iterdir())]
        except OSError:
            continue  # no machine was made yet
    seen = (_lock(path, machine, holders) for path, machine in paths)
    return [lock for lock in seen if lock is not None]


def _lock(path: Path, machine: str | None, holders: dict[tuple[int, int], int]) -> SeenLock | None:
    try:
        facts = path.stat()
        text = path.read_text("ascii", "replace").strip()
    except OSError:
        return None  # it went with what it protects
    holder = holders.get((facts.st_dev, facts.st_ino))
    named = int(text) if text.isdigit() and len(text) < 10 else None
    return SeenLock(
        path=path,
        machine=machine,
        holder=holder,
        named=named,
        alive=named is not None and ProcessIdentity.of(named) is not None,
        ours=holder == os.getpid(),
    )


def _holders() -> dict[tuple[int, int], int] | None:
    """By device and inode, the process that holds a flock; None where nobody tells.

    A line is "1: FLOCK  ADVISORY  WRITE 708 08:01:3948 0 EOF"; those that wait have "->" in them.
    """
    try:
        lines = Path("/proc/locks").read_text("ascii").splitlines()
    except OSError:
        return None
    found: dict[tuple[int, int], int] = {}
    for line in lines:
        words = line.split()
        if len(words) < 6 or words[1] != "FLOCK":
            continue
        try:
            major, minor, inode = words[5].split(":")
            device = os.makedev(int(major, 16), int(minor, 16))
            found[device, int(inode)] = int(words[4])
        except ValueError:
            continue  # a kind of line that this kernel writes otherwise
    return found

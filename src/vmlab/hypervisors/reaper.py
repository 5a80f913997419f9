"""The reaper: finds the runs whose process is gone and removes what they left.

A run is dead when its lock is free, however it died; one whose process merely stands still holds
it. Stores and their machines are none of the reaper's. Any number of reapers may run at once:
each dead run is cleared by the one that gets its lock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vmlab.hypervisors.leftovers import ReapItem, clear_run
from vmlab.hypervisors.locks import FileLock
from vmlab.hypervisors.ownership import Home
from vmlab.hypervisors.records import FILE_NAME, LOCK

__all__ = ["ReapItem", "ReapReport", "reap_dead_runs"]


@dataclass(frozen=True, slots=True)
class ReapReport:
    """What a reaper found and did in one home.

    `dead` are the ids of the runs that were cleared (with `dry_run`: that would be), `live` those
    of the runs that were left alone: they run, or another reaper is clearing them.
    """

    home: Path
    dry_run: bool
    dead: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    items: tuple[ReapItem, ...] = ()

    @property
    def failed(self) -> tuple[ReapItem, ...]:
        """What could not be removed; the next reaper tries again."""
        return tuple(item for item in self.items if item.error is not None)


def reap_dead_runs(home: Home, *, dry_run: bool = False) -> ReapReport:
    """Clear what dead runs left in `home`; takes a millisecond where there are none.

    Args:
        home: Where to look.
        dry_run: Only tell what would be done.
    """
    dead: list[str] = []
    live: list[str] = []
    items: list[ReapItem] = []
    with os.scandir(home.runs) as entries:
        found = sorted(
            entry.name
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and FILE_NAME.fullmatch(entry.name)
        )
    for run in found:
        directory = home.runs / run
        try:
            lock = FileLock.take(directory / LOCK)
        except FileNotFoundError:
            continue  # another reaper was faster
        except OSError as error:
            dead.append(run)
            items.append(ReapItem(run, "directory", "remove", str(directory), error=error.strerror))
            continue
        if lock is None:
            live.append(run)
            continue
        try:
            dead.append(run)
            items += clear_run(directory, dry_run=dry_run)
        finally:
            lock.release()
    return ReapReport(home.directory, dry_run, tuple(dead), tuple(live), tuple(items))

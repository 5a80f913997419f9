"""The runs that a directory of runs holds: told in a line each, and thrown away when they are old.

A run that has not ended is held by its journal's lock (flock(2)), however it is written, and is
never thrown away; neither is the one that `latest` leads to. What is no run is not touched.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmlab.machine.errors import VmlabError
from vmlab.machine.places import reports_directory
from vmlab.report.journal import MAIN, journal_path
from vmlab.report.model import Outcome
from vmlab.report.place import LATEST, is_run

__all__ = ["RunSummary", "is_alive", "run_directories", "summarize", "throw_away"]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run in a line.

    Attributes:
        name: Of its directory.
        directory: Where it is.
        outcome: Of the whole run; empty if it cannot be read.
        tool: What ran it, with its version.
        started: When it began; None if it cannot be read.
        took: Seconds that it took; None if it did not end.
        tests: How many tests it has.
        counts: Tests by outcome, those that there are none of, too.
        problem: Why it cannot be read; empty if it can be.
    """

    name: str
    directory: Path
    outcome: str = ""
    tool: str = ""
    started: datetime | None = None
    took: float | None = None
    tests: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    problem: str = ""


def run_directories(place: Path | None = None) -> Iterator[Path]:
    """The directories in `place`, the newest first: their names begin with the time.

    Args:
        place: A directory of runs; the user's own if left out.

    Raises:
        VmlabError: It cannot be read.
    """
    place = place or reports_directory()
    try:
        found = sorted(place.iterdir(), reverse=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise VmlabError(
            f"{place} cannot be read: {error.strerror}", hint="name a directory of runs"
        ) from error
    yield from (path for path in found if path.is_dir() and not path.is_symlink())


def summarize(directory: Path) -> RunSummary:
    """A run in a line; one that cannot be read says why."""
    from vmlab.report.json_report import read_run

    try:
        run = read_run(directory)
    except (OSError, VmlabError) as error:
        return RunSummary(directory.name, directory, problem=str(error))
    totals = run.totals
    return RunSummary(
        name=directory.name,
        directory=directory,
        outcome=run.outcome.value,
        tool=f"{run.tool} {run.version}",
        started=run.started,
        took=run.duration_s,
        tests=totals.tests,
        counts={outcome.value: totals[outcome] for outcome in Outcome},
    )


def is_alive(directory: Path) -> bool:
    """Whether somebody still writes that run."""
    try:
        with journal_path(directory, MAIN).open("rb") as journal:
            fcntl.flock(journal, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        # It may not be read, or is on a file system without locks: only its report can tell.
        return summarize(directory).took is None
    return False


def throw_away(
    place: Path | None = None,
    *,
    keep: int,
    older: timedelta | None = None,
    dry_run: bool = False,
) -> list[Path]:
    """Remove old runs with all their files.

    Args:
        place: A directory of runs; the user's own if left out.
        keep: How many of the newest stay, whatever their age.
        older: Those that began longer ago go; all but the kept ones if left out.
        dry_run: Tell what would go, and remove nothing.

    Returns:
        What is gone, or would be.

    Raises:
        VmlabError: A run cannot be removed; those told before are gone.
    """
    place = place or reports_directory()
    latest = (place / LATEST).resolve()
    gone = []
    runs = [path for path in run_directories(place) if is_run(path)]
    for path in runs[keep:]:
        if path.resolve() == latest or is_alive(path):
            continue
        if older is not None and datetime.now(UTC) - _begun(path) <= older:
            continue
        if not dry_run:
            _remove(path)
        gone.append(path)
    return gone


def _begun(directory: Path) -> datetime:
    """When a run began; when its directory was changed, if nobody can tell."""
    told = summarize(directory).started
    return told or datetime.fromtimestamp(directory.stat().st_mtime, UTC)


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except OSError as error:
        raise VmlabError(
            f"{directory} cannot be removed: {error.strerror}",
            hint="look whose it is, and remove it by hand",
        ) from error

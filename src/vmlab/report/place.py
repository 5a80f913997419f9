"""Where reports are, when nobody says which: each run's in a directory of its own, and the last.

`reports/RUN/report.json` in the user's state directory; `latest` beside the
runs leads to the one that ended last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmlab.machine.errors import VmlabError
from vmlab.machine.places import reports_directory
from vmlab.report.journal import REPORT, has_journal

__all__ = ["LATEST", "find_report", "is_run"]

LATEST: Final = "latest"


def find_report(path: Path | None = None) -> Path:
    """The run that `path` means, as `read_run` takes it.

    Args:
        path: A report, a run's directory, or a directory of runs, whose last is meant (the last
            that ended, or if none did, the last); the user's own directory of runs, if None.

    Raises:
        VmlabError: Nothing is said, and there has been no run.
    """
    if path is None:
        latest = reports_directory() / LATEST
        if not latest.exists():
            raise VmlabError(
                f"there is no report yet in {latest.parent}",
                hint="name a run's directory or its report.json; `vmlab test` makes one",
            )
        return latest
    if is_run(path) or not path.is_dir():
        return path
    if (path / LATEST).exists():
        return path / LATEST
    # A run that was killed never became the latest; their names sort by time.
    return max((each for each in path.iterdir() if is_run(each)), default=path)


def is_run(path: Path) -> bool:
    """Whether a run is in this very directory, as far as it may be looked into."""
    try:
        return (path / REPORT).exists() or has_journal(path)
    except PermissionError:
        return False

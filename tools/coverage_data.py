"""Data files of coverage whose process was killed while it wrote them.

Tests kill processes, at any moment, and each process writes its file as it ends. coverage may stop
at such a file and lose all others with it, so that what no reader could use is taken out before.
A file has the hash of its data in its name once its process has finished it (coverage.sqldata,
CoverageData.write): one that is finished and cannot be read is a real loss, and is never taken out.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
from coverage.data import CoverageData
from coverage.exceptions import CoverageException
from coverage.sqldata import filename_match

PATIENCE = 60.0
"""Seconds that a process which is writing has to finish its file."""


def fault(path: Path) -> str | None:
    """Why coverage could not use a data file; None where it can use all of it."""
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as database:
            # coverage reads a part of it first and the rest when it has begun to combine.
            ((answer, *_), *_) = database.execute("PRAGMA integrity_check(1)").fetchall()
        if answer != "ok":
            return str(answer).splitlines()[-1]
        data = CoverageData(str(path), read_only=True)
        try:
            data.read()
        finally:
            data.close(force=True)
    except (sqlite3.Error, CoverageException) as error:
        return str(error)
    return None


def data_files(base: Path, *, finished: bool) -> list[Path]:
    """The files beside `base`, such as .coverage, that processes have finished, or have not."""
    found = []
    for path in sorted(base.parent.glob(f"{base.name}.*")):
        match = filename_match(path.name)
        if match is not None and (match["hash"] is not None) == finished:
            found.append(path)
    return found


def take_out_unfinished(base: Path, said: Callable[[str], None]) -> None:
    """Remove the files that were never finished and cannot be read; says which they were.

    A process that is writing its file is waited for.
    """
    deadline = time.monotonic() + PATIENCE
    for path in data_files(base, finished=False):
        while path.exists() and _is_written(path) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not path.exists():
            continue
        reason = fault(path)
        if reason is not None:
            size = path.stat().st_size
            path.unlink()
            said(f"left out {path.name} ({size} bytes), which was never finished: {reason}")


def lost(base: Path) -> list[str]:
    """One sentence for each file that was finished and cannot be read."""
    reasons = [(path, fault(path)) for path in data_files(base, finished=True)]
    return [f"{path.name} was finished and cannot be read: {reason}"
            for path, reason in reasons if reason is not None]  # fmt: skip


def _is_written(path: Path) -> bool:
    """Whether the process that a file is named after still lives."""
    match = filename_match(path.name)
    assert match is not None
    try:
        return psutil.Process(int(match["pid"])).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

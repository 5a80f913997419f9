"""Directories of runs: what is in them, and what may be thrown away."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from vmlab.machine.errors import VmlabError
from vmlab.report import Recorder
from vmlab.report.place import find_report
from vmlab.report.shelf import is_alive, run_directories, summarize, throw_away

NAMES = ("20260101T000000Z-a", "20260201T000000Z-b", "20260301T000000Z-c", "20260401T000000Z-d")


def _record(directory: Path, outcome: str = "pass") -> Path:
    with Recorder.create(directory, tool="t", version="1") as recorder:
        recorder.start("s", "boots").finish(outcome)
        recorder.plan("s", ["never"])
    return directory


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Four runs, a directory that is none, and a file."""
    for name in NAMES:
        _record(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "20250101T000000Z-mine.txt").write_text("mine")
    return tmp_path


def _names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_the_newest_comes_first(place: Path) -> None:
    (place / "latest").symlink_to(NAMES[0])
    assert [path.name for path in run_directories(place)] == ["notes", *reversed(NAMES)]
    assert list(run_directories(place / "nothing")) == []
    with pytest.raises(VmlabError, match="cannot be read"):
        list(run_directories(place / "20250101T000000Z-mine.txt"))


def test_a_run_is_told_in_a_line(place: Path) -> None:
    told = summarize(_record(place / "run", "fail"))
    assert (told.outcome, told.tool, told.tests, told.problem) == ("fail", "t 1", 2, "")
    assert told.counts["fail"] == told.counts["pending"] == 1
    assert told.counts["pass"] == 0
    assert told.took is not None
    none = summarize(place / "notes")
    assert (none.name, none.started, none.tests) == ("notes", None, 0)
    assert "notes" in none.problem


def test_the_newest_stay_and_what_is_no_run(place: Path) -> None:
    assert [path.name for path in throw_away(place, keep=2, dry_run=True)] == [NAMES[1], NAMES[0]]
    assert set(NAMES) < _names(place)
    assert [path.name for path in throw_away(place, keep=2)] == [NAMES[1], NAMES[0]]
    assert _names(place) == {*NAMES[2:], "notes", "20250101T000000Z-mine.txt"}
    assert throw_away(place, keep=2) == []


def test_the_last_that_ended_stays(place: Path) -> None:
    (place / "latest").symlink_to(NAMES[0])
    assert [path.name for path in throw_away(place, keep=1)] == [NAMES[2], NAMES[1]]
    assert (place / "latest" / "report.json").exists()


def test_only_what_is_old_enough_goes(place: Path) -> None:
    assert throw_away(place, keep=1, older=timedelta(hours=1)) == []
    journal = place / NAMES[0] / "journal" / "main.jsonl"
    report = place / NAMES[0] / "report.json"
    year = re.compile(r"20\d\d-(?=\d\d-\d\d)")
    for path in (journal, report):
        path.write_text(year.sub("2001-", path.read_text()))
    assert [path.name for path in throw_away(place, keep=1, older=timedelta(hours=1))] == [NAMES[0]]


def test_a_run_that_has_not_ended_stays(place: Path) -> None:
    alive = place / "20250101T000000Z-alive"
    with Recorder.create(alive, tool="t"):
        assert is_alive(alive)
        assert alive not in throw_away(place, keep=4)
        assert alive.is_dir()
    assert not is_alive(alive)
    assert throw_away(place, keep=4) == [alive]
    assert not is_alive(place / "notes")


def test_without_locks_a_run_without_an_end_stays(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    killed = place / "20250101T000000Z-killed"
    with Recorder.create(killed, tool="t"):
        assert is_alive(killed)
        assert throw_away(place, keep=3) == [place / NAMES[0]]
    assert throw_away(place, keep=3) == [killed]


def test_what_may_not_be_looked_into_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.stat

    def refused(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{place / NAMES[0]}/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert throw_away(place, keep=2) == [place / NAMES[1]]
    assert find_report(place) == place / NAMES[3]

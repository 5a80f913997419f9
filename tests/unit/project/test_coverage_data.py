"""What a process that was killed left of its coverage stops nothing, and a real loss is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import coverage_data
import pytest
from coverage import Coverage
from coverage.data import CoverageData
from coverage.exceptions import DataError
from coverage.sqldata import NHASH

PAGE = 4096
HASH = f".H{'a' * NHASH}h"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / ".coverage"


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def written(base: Path, pid: int, hash_: str = "") -> Path:
    """A data file of some size, as a process leaves it."""
    path = base.with_name(f"{base.name}.host.pid{pid}.X{'r' * 6}x{hash_}")
    data = CoverageData(str(path))
    lines = [(line, line + 1) for line in range(400)]
    data.add_arcs({f"/source/{name}.py": lines for name in range(10)})
    data.write()
    data.close(force=True)
    return path


def holed(path: Path) -> Path:
    """The same without its second half, as when pages were written in another order."""
    whole = path.read_bytes()
    kept = len(whole) // PAGE // 2 * PAGE
    path.write_bytes(whole[:kept] + bytes(len(whole) - kept))
    return path


def combine(base: Path) -> set[str]:
    collected = Coverage(data_file=str(base), config_file=False)
    collected.combine()
    return collected.get_data().measured_files()


def test_what_is_taken_out_would_have_stopped_coverage(base: Path, dead: int) -> None:
    holed(written(base, dead))
    with pytest.raises(DataError, match="malformed"):
        combine(base)


def test_every_state_that_a_kill_leaves_is_taken_out_or_used(base: Path, dead: int) -> None:
    path = written(base, dead)
    whole = path.read_bytes()
    for pages in range(0, len(whole) // PAGE):
        for rest in (b"", bytes(len(whole) - pages * PAGE)):
            path.write_bytes(whole[: pages * PAGE] + rest)
            said: list[str] = []
            coverage_data.take_out_unfinished(base, said.append)
            assert path.exists() != bool(said)
            assert combine(base) in (set(), {f"/source/{name}.py" for name in range(10)})
            assert not path.exists()
            base.unlink(missing_ok=True)


def test_what_was_taken_out_is_told_and_the_others_count(base: Path, dead: int) -> None:
    path = holed(written(base, dead))
    other = base.with_name(f"{base.name}.host.pid{dead}.X{'o' * 6}x{HASH}")
    written(base, dead + 1, HASH).rename(other)
    whole = written(base, os.getppid())
    whole.rename(unfinished := base.with_name(f"{base.name}.host.pid{dead}.X{'u' * 6}x"))
    said: list[str] = []
    coverage_data.take_out_unfinished(base, said.append)
    assert len(said) == 1
    assert path.name in said[0] and "never finished" in said[0]
    assert not path.exists() and other.exists() and unfinished.exists()
    assert coverage_data.lost(base) == []


def test_a_finished_file_that_cannot_be_read_is_a_loss(base: Path, dead: int) -> None:
    path = holed(written(base, dead, HASH))
    said: list[str] = []
    coverage_data.take_out_unfinished(base, said.append)
    assert said == [] and path.exists()
    (told,) = coverage_data.lost(base)
    assert path.name in told


@pytest.fixture
def writer(base: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose file is being written, until it is told to end."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_that_is_writing_is_waited_for(
    base: Path, writer: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = holed(written(base, writer.pid))
    finished = path.with_name(path.name + HASH)
    waits = []

    def finish(seconds: float) -> None:
        waits.append(seconds)
        written(base.with_name("other"), 1).rename(finished)
        path.unlink()

    clock = SimpleNamespace(sleep=finish, monotonic=time.monotonic)
    monkeypatch.setattr(coverage_data, "time", clock)
    said: list[str] = []
    coverage_data.take_out_unfinished(base, said.append)
    assert len(waits) == 1 and said == []
    assert finished.exists()

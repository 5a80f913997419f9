"""Runs that are killed, with real processes: nothing is left after the next command."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vmlab.hypervisors.leftovers import marked, mounts_below
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.reaper import reap_dead_runs

# A run, doing what the test says; it tells its id and waits to be killed.
PRELUDE = """
import asyncio, os, subprocess, sys, time
from pathlib import Path
from vmlab.hypervisors.ownership import Home, Run, Store
from vmlab.hypervisors.processes import start, spawn
home = Home.open(Path(sys.argv[1]))
run = Run.begin(home)
"""
FINALE = """
print(run.id, run.owner.runtime, flush=True)
sys.stdin.read()
"""
# Forks twice, as a daemon does: neither parent nor session tells whose it is.
DAEMON = (
    "import os, sys, time\n"
    "if os.fork(): sys.exit()\n"
    "os.setsid()\n"
    "if os.fork(): sys.exit()\n"
    "open(sys.argv[1], 'w').close() if sys.argv[1:] else None\n"
    "time.sleep(300)\n"
)
START_DAEMON = """
ready = run.directory / "ready"
start([sys.executable, "-c", sys.argv[2], ready], owner=run.owner, machine="m1")
while not ready.exists(): time.sleep(0.01)
"""


class DoomedRun:
    """A process with a run of its own."""

    def __init__(self, home: Home, what: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + what + FINALE, home.directory, DAEMON],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line, "the run did not begin"
        self.id = line[0]
        self.runtime = Path(line[1])
        self.directory = home.runs / self.id

    def processes(self) -> list[psutil.Process]:
        """All that say that they are this run's."""
        found = []
        for process, variables in marked():
            # Any of them may end just now.
            with suppress(psutil.NoSuchProcess):
                if variables.get("VMLAB_RUN") == self.id:
                    found.append(psutil.Process(process.pid))
        return found

    def wait_for(self, number: int) -> list[psutil.Process]:
        """Its processes, once there are so many."""
        deadline = time.monotonic() + 100
        while len(found := self.processes()) != number:
            assert time.monotonic() < deadline, f"{len(found)} processes, not {number}"
            time.sleep(0.02)
        return found

    def kill(self) -> None:
        """As the OOM killer would."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def home() -> Iterator[Home]:
    directory = Path(tempfile.mkdtemp(prefix="vmlab-i-"))
    # A long one, so that runs have a directory of sockets elsewhere.
    yield Home.open(directory / ("home" * 15))
    assert mounts_below(directory) == []
    shutil.rmtree(directory)


@pytest.fixture
def doomed(home: Home) -> Iterator[Callable[[str], DoomedRun]]:
    runs: list[DoomedRun] = []

    def begin(what: str) -> DoomedRun:
        runs.append(DoomedRun(home, what))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
    reap_dead_runs(home)


def assert_nothing_left(home: Home, run: DoomedRun) -> None:
    assert run.processes() == []
    assert not run.directory.exists()
    assert not run.runtime.exists()
    assert list(home.runs.iterdir()) == []


def test_children_die_with_their_run_before_any_reaper(
    home: Home, doomed: Callable[[str], DoomedRun]
) -> None:
    run = doomed('for n in range(3): start(["sleep", "300"], owner=run.owner, machine=f"m{n}")\n')
    children = run.wait_for(3)
    run.kill()
    gone, alive = psutil.wait_procs(children, timeout=100)
    assert alive == []
    assert len(gone) == 3
    report = reap_dead_runs(home)
    assert report.dead == (run.id,)
    assert [item.kind for item in report.items] == ["directory", "directory"]
    assert_nothing_left(home, run)


def test_a_stopped_child_dies_with_its_run(home: Home, doomed: Callable[[str], DoomedRun]) -> None:
    run = doomed('start(["sleep", "300"], owner=run.owner, machine="m1")\n')
    [child] = run.wait_for(1)
    child.suspend()
    run.kill()
    reap_dead_runs(home)
    psutil.wait_procs([child], timeout=100)
    assert_nothing_left(home, run)


def test_a_daemon_of_a_dead_run_is_found(home: Home, doomed: Callable[[str], DoomedRun]) -> None:
    run = doomed(START_DAEMON)
    [daemon] = run.wait_for(1)
    run.kill()
    time.sleep(0.2)
    assert daemon.is_running(), "it was to survive the parent-death signal"
    report = reap_dead_runs(home)
    assert [item.pid for item in report.items if item.kind == "process"] == [daemon.pid]
    assert_nothing_left(home, run)


def test_a_process_that_was_not_yet_recorded_is_found(
    home: Home, doomed: Callable[[str], DoomedRun]
) -> None:
    run = doomed(
        START_DAEMON
        + 'for path in (run.directory / "processes").iterdir(): path.unlink(missing_ok=True)\n'
        '(run.directory / "run.json").unlink()\n'
    )
    [daemon] = run.wait_for(1)
    run.kill()
    report = reap_dead_runs(home)
    assert [item.pid for item in report.items if item.kind == "process"] == [daemon.pid]
    assert run.processes() == []
    assert not run.directory.exists()
    run.runtime.rmdir()  # without run.json nobody knows of it


def test_sockets_of_a_dead_run_go(home: Home, doomed: Callable[[str], DoomedRun]) -> None:
    run = doomed(
        "import socket\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(str(run.owner.socket('qmp.sock')))\n"
    )
    assert (run.runtime / "qmp.sock").exists()
    run.kill()
    report = reap_dead_runs(home)
    assert [item.subject for item in report.items if item.kind == "socket"] == [
        str(run.runtime / "qmp.sock")
    ]
    assert_nothing_left(home, run)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_mounts_of_a_dead_run_go(home: Home, doomed: Callable[[str], DoomedRun]) -> None:
    run = doomed(
        "(run.directory / 'share').mkdir()\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', run.directory / 'share'], check=True)\n"
        "(run.directory / 'share' / 'file').touch()\n"
    )
    assert len(mounts_below(run.directory)) == 1
    run.kill()
    report = reap_dead_runs(home)
    assert [item.subject for item in report.items if item.kind == "mount"] == [
        str(run.directory / "share")
    ]
    assert_nothing_left(home, run)


def test_a_run_that_stands_still_is_left_alone(
    home: Home, doomed: Callable[[str], DoomedRun]
) -> None:
    run = doomed('start(["sleep", "300"], owner=run.owner, machine="m1")\n')
    [child] = run.wait_for(1)
    run.process.send_signal(signal.SIGSTOP)
    report = reap_dead_runs(home)
    assert report.live == (run.id,)
    assert report.items == ()
    assert child.is_running()
    assert run.runtime.exists()
    run.process.send_signal(signal.SIGCONT)
    run.kill()
    reap_dead_runs(home)
    assert_nothing_left(home, run)


def test_the_next_run_clears_up_and_many_may_begin_at_once(
    home: Home, doomed: Callable[[str], DoomedRun]
) -> None:
    runs = [doomed(f"(run.directory / 'file{n}').touch()\n") for n in range(3)]
    for run in runs:
        run.kill()
    code = PRELUDE + "print(len(list(home.runs.iterdir())))\nrun.close()\n"
    beginners = [
        subprocess.Popen(
            [sys.executable, "-c", code, home.directory], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for beginner in beginners:
        out, _ = beginner.communicate(timeout=120)
        assert beginner.returncode == 0
        assert int(out) >= 1
    for run in runs:
        assert_nothing_left(home, run)


def test_a_live_run_is_not_touched_by_the_clearing_of_a_dead_one(
    home: Home, doomed: Callable[[str], DoomedRun]
) -> None:
    dead = doomed('start(["sleep", "300"], owner=run.owner, machine="m1")\n')
    live = doomed('start(["sleep", "300"], owner=run.owner, machine="m1")\n')
    [child] = live.wait_for(1)
    dead.kill()
    assert reap_dead_runs(home).live == (live.id,)
    assert child.is_running()
    assert live.directory.exists()
    assert live.runtime.exists()


def test_a_run_killed_at_any_moment_leaves_nothing(home: Home) -> None:
    chances = random.Random(20)
    runtimes = Path(os.environ["XDG_RUNTIME_DIR"])
    before = set(runtimes.iterdir())
    code = PRELUDE + (
        "import itertools\n"
        "for n in itertools.count():\n"
        "    argv = [sys.executable, '-S', '-c', sys.argv[2]] if n % 3 == 0 else ['sleep', '300']\n"
        "    start(argv, owner=run.owner, machine=f'm{n}')\n"
        "    (run.directory / f'file{n}').touch()\n"
    )
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, home.directory, DAEMON])
        time.sleep(0.15 + chances.random() * 0.4)
        process.kill()
        process.wait()
        names = {path.name for path in home.runs.iterdir()}
        deadline = time.monotonic() + 100
        # A child that was forked but has not executed its program yet holds the run's lock for
        # that moment: the run still counts as alive.
        while (report := reap_dead_runs(home)).live:
            assert time.monotonic() < deadline, report
            time.sleep(0.01)
        assert report.failed == ()
        assert list(home.runs.iterdir()) == []
        # What the kernel has just been told to kill may take its time.
        while left := [who for who, marks in marked() if marks.get("VMLAB_RUN") in names]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
    assert set(runtimes.iterdir()) == before


def test_clean_is_a_command(home: Home, doomed: Callable[[str], DoomedRun]) -> None:
    run = doomed('start(["sleep", "300"], owner=run.owner, machine="m1")\n')
    with Run.begin(home) as mine:
        run.kill()
        code = "import sys; from vmlab.cli.clean import clean; sys.exit(clean(as_json=True))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"VMLAB_HOME": str(home.directory)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        told = json.loads(done.stdout)
        assert told["dead"] == [run.id]
        assert told["live"] == [mine.id]
    assert_nothing_left(home, run)

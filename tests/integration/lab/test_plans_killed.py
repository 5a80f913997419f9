"""`vmlab test` ended in the midst of a run, by Ctrl-C and by SIGKILL at random moments.

What was found until then is readable, the rest is pending, and nothing is left after the next
command.
"""

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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.report import Outcome, Run, read_run

pytestmark = [pytest.mark.boots, pytest.mark.timeout(900)]

_PATIENCE = 300.0
_ENTRIES = 50
"""A few less than the journal of a whole run has."""

PLAN = """
shares = [{ source = ".", target = "/src" }]

[[phases]]
name = "one"
run = "printf '1..2\\\\nok 1 - a\\\\nok 2 - b\\\\n' >/tmp/r.tap; sleep 1"
results = ["/tmp/r.tap"]

[[phases]]
name = "two"
run = "sleep 1"
"""
LONG = "\n[[phases]]\nname = 'three'\nrun = 'sleep 500'\n"
TESTS = """
def test_first(vm):
    vm.succeed("sleep 1")

def test_two(vms):
    a, b = vms("a", "b")
    a.wait_until_succeeds("ping -c 1 b", timeout=300)
"""


class Project:
    """Tests with machines, and a home of their own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.home = place / "home"
        (place / "plan.vmlab.toml").write_text(PLAN)
        (place / "test_machines.py").write_text(TESTS)
        (place / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
        self.environment = {
            **os.environ,
            "VMLAB_HOME": str(self.home),
            "VMLAB_IMAGE_STORE": str(IMAGE_STORE),
            "TMPDIR": str(place / "tmp"),
        }
        (place / "tmp").mkdir()

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "vmlab", "test", "--vm-hypervisor", "qemu"),
                *("--vm-image", "debian-12-amd64-tiny", "--vm-report", "reports", *words),
            ],
            cwd=self.place, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def clean(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vmlab", "clean", "--json"],
            env=self.environment, capture_output=True, text=True, check=False, timeout=_PATIENCE,
        )  # fmt: skip

    def entries(self) -> list[dict[str, object]]:
        """What the journals of the run say, whole lines only."""
        lines = []
        journals = [path for report in self.reports() for path in report.glob("journal/*.jsonl")]
        for path in journals:
            lines += [line for line in path.read_bytes().split(b"\n")[:-1] if line]
        return [json.loads(line) for line in lines]

    def reports(self) -> list[Path]:
        found = (self.place / "reports").glob("*/journal")
        return [path.parent for path in found if not path.parent.is_symlink()]

    def processes(self) -> list[psutil.Process]:
        """What runs for it."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                ours = process.environ().get("VMLAB_HOME") == str(self.home)
            except psutil.Error:
                continue
            if ours or any(str(self.home) in word for word in words):
                found.append(process)
        return found

    def wait_for_entries(self, count: int, process: subprocess.Popen[bytes]) -> None:
        """Until the journals have so many entries, or it has ended."""
        deadline = time.monotonic() + _PATIENCE
        while len(self.entries()) < count and process.poll() is None:
            assert time.monotonic() < deadline, "the run does not go on"
            time.sleep(0.05)

    def expect_nothing_left(self) -> None:
        """Of machines, of their files, and of runs."""
        _, alive = psutil.wait_procs(self.processes(), timeout=60)
        assert not alive
        runs = self.home / "runs"
        assert not runs.is_dir() or list(runs.iterdir()) == []


@pytest.fixture
def project() -> Iterator[Project]:
    need("qemu-system-x86_64")
    place = Path(tempfile.mkdtemp(prefix="vmlab-k-"))
    yield Project(place)
    shutil.rmtree(place)


def run_of(project: Project) -> Run | None:
    """The run as it can be read; None where it was ended before there was anything."""
    reports = project.reports()
    assert len(reports) <= 1
    return read_run(reports[0]) if reports and project.entries() else None


def expect_all_that_was_found(run: Run, before: list[dict[str, object]]) -> None:
    """What had ended when `before` was read has ended in the report, and nothing is missing."""
    planned = {
        (entry["suite"], name)
        for entry in before
        if entry["event"] == "plan"
        for name in entry["tests"]  # type: ignore[attr-defined]  # a list, as the journal has it
    }
    tests = {(test.suite, test.name): test for test in run.tests()}
    assert planned <= set(tests)
    begun = {entry["n"]: (entry["suite"], entry["name"]) for entry in before
             if entry["event"] == "start"}  # fmt: skip
    ended = {begun[entry["n"]]: entry["outcome"] for entry in before if entry["event"] == "finish"}
    for name, outcome in ended.items():
        assert tests[name].outcome == outcome  # type: ignore[index]  # a pair of texts
    for name, test in tests.items():
        if name not in ended:
            assert test.outcome in {Outcome.PENDING, Outcome.PASS}


def killed_at_a_random_moment(project: Project, seed: int) -> None:
    chance = random.Random(seed)
    words = ["-n2"] if chance.random() < 0.25 else []
    after, delay = chance.randrange(_ENTRIES), chance.uniform(0, 2)
    whole = chance.random() < 0.5
    process = project.begin(*words)
    project.wait_for_entries(after, process)
    # No synchronisation: the moment is meant to be any.
    time.sleep(delay)
    before = project.entries() if not words else []
    if process.poll() is None:
        children = psutil.Process(process.pid).children()
        if whole or not children:
            process.kill()
        else:
            # It may have ended just now.
            with suppress(psutil.NoSuchProcess):
                children[0].kill()
    process.communicate(timeout=_PATIENCE)
    story = f"seed {seed}: killed {'vmlab' if whole else 'pytest'} after {after}+{delay:.2f} s"
    cleaned = project.clean()
    assert cleaned.returncode == 0, (story, cleaned.stderr)
    project.expect_nothing_left()
    again = json.loads(project.clean().stdout)
    assert again["items"] == [], story
    run = run_of(project)
    if run is not None:
        expect_all_that_was_found(run, before)
        if run.finished is None:
            assert run.outcome is not Outcome.PASS, story


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_that_is_killed_leaves_results_and_nothing_else(project: Project, seed: int) -> None:
    killed_at_a_random_moment(project, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 120))
def test_twenty_runs_that_are_killed_leave_results_and_nothing_else(
    project: Project, seed: int
) -> None:
    killed_at_a_random_moment(project, seed)


def test_ctrl_c_clears_up_and_leaves_a_report(project: Project) -> None:
    (project.place / "plan.vmlab.toml").write_text(PLAN + LONG)
    process = project.begin("plan.vmlab.toml")
    while process.poll() is None and not any(
        entry["event"] == "phase" and entry["phase"]["name"] == "one"  # type: ignore[index]
        for entry in project.entries()
    ):
        time.sleep(0.05)
    # Whoever tidies up meanwhile does not touch a run that lives.
    cleaned = json.loads(project.clean().stdout)
    assert cleaned["items"] == []
    assert len(cleaned["live"]) == 1
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 130, out
    assert b"interrupted: what was found until then is in" in out
    # By itself, without another command.
    project.expect_nothing_left()
    run = run_of(project)
    assert run is not None
    (test, *_) = run.tests()
    assert test.outcome is Outcome.PENDING
    assert "one" in [phase.name for phase in test.attempts[0].phases]
    assert (project.reports()[0] / "report.json").is_file()

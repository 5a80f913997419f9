"""kill -9 of a manager amid mixed work: nothing acknowledged is lost, doubled or leaked.

How long the next manager took until all that it found was settled is measured by the soak alone,
which writes the figures to the directory that VMLAB_RESULTS names.
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.figures import note
from tests.needs import need

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home, Store

PROGRAM = Path(__file__).with_name("restless.py")
WAIT = 280.0
"""Seconds that a manager may take to say something; nothing depends on how long it does."""
SETTLED_WITHIN = 30.0
"""Seconds from the start of the next manager's process until nothing is under way any more."""
# Read before the tests get an environment of their own.
PROFILE = """
extends = "performance"
[latency]
create = 0.01
start = 0.03
stop = 0.02
kill = 0.005
delete = 0.01
disk = 0.005
snapshot = 0.02
restore = 0.02
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vmlab-t-") as name:
        yield Path(name)
        # Machines and networks live on without a manager, which is what they are for.
        if (Path(name) / "home").exists():
            for process in processes.adopt(
                Store.open(Home.open(Path(name) / "home"), "manager").owner
            ):
                process.kill()
                asyncio.run(process.wait(60))


@contextmanager
def simulate(folder: Path, profile: Path) -> Iterator[Path]:
    """A simulated hypervisor in a process of its own; its socket."""
    socket = folder / "s"
    command = [sys.executable, "-m", "vmlab", "simulate", "--clock", "wall"]
    options = ["--socket", str(socket), "--profile", str(profile), "--seed", "1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline(), f"it did not begin, and ended with {server.wait(60)}"
            yield socket
        finally:
            server.terminate()
            server.wait(60)


class Restless:
    """The program of restless.py, and what it says."""

    def __init__(self, home: Path, options: dict[str, str], seed: int, count: int) -> None:
        self.acks = home.with_name("acks")
        self.errors = home.with_name("errors")
        self.began = time.monotonic()
        arguments = [str(home), json.dumps(options), str(self.acks), str(seed), str(count)]
        with self.errors.open("a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ack ") and line.endswith("\n"):
                with self.acks.open("a", encoding="ascii") as acks:
                    acks.write(line.removeprefix("ack "))
            self._lines.put(line.strip())
        self._lines.put(None)

    def until(self, *words: str) -> list[str]:
        """What it says until it says one of these, which is the last."""
        said = []
        while True:
            try:
                line = self._lines.get(timeout=WAIT)
            except queue.Empty:
                raise AssertionError(
                    f"it said {said[-20:]} and then, within {WAIT:g} s, none of {words}: "
                    + self.errors.read_text("utf-8")[-4000:]
                ) from None
            if line is None:
                raise AssertionError(f"it ended: {self.errors.read_text('utf-8')[-4000:]}")
            said.append(line)
            if line.split(" ")[0] in words:
                return said

    def kill(self) -> None:
        """kill -9, and wait until all that it said is read."""
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """Wait for its end."""
        self.process.wait(WAIT)
        self._reader.join(WAIT)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Story:
    """What became of a manager's life of many deaths: seconds of each restart, and operations."""

    seed: int
    settled: list[float] = field(default_factory=list)
    acknowledged: int = 0

    def note(self, title: str) -> None:
        """Say how soon all was settled, and have it be soon enough."""
        longest, median = max(self.settled), statistics.median(self.settled)
        figures = {
            "seed": self.seed,
            "kills": len(self.settled),
            "operations": self.acknowledged,
            "settled seconds": {"median": round(median, 2), "most": round(longest, 2)},
        }
        print(title, json.dumps(figures))
        note("manager-crashes.json", title, figures)
        assert longest <= SETTLED_WITHIN, self.settled


def story(folder: Path, options: dict[str, str], points: int, seed: int) -> Story:
    """Kill a manager at random points of its work, and have the next one settle all."""
    luck, told = random.Random(seed), Story(seed)
    home = folder / "home"
    for point in range(points + 1):
        last = point == points
        # Points are counted in what it acknowledged and a moment beyond, not in time alone: a
        # busy host would else be killed before it did anything.
        restless = Restless(home, options, seed * 1000 + point, 40 if last else 100_000)
        try:
            assert restless.until("settled") == ["settled"]
            if point:
                told.settled.append(time.monotonic() - restless.began)
            said = restless.until("whole")
            assert said == ["whole"], f"seed {seed}, point {point}: {said}"
            if last:
                restless.until("worked")
                restless.end()
            else:
                for _ in range(luck.randint(0, 25)):
                    restless.until("ack")
                threading.Event().wait(luck.uniform(0, 0.1))
                restless.kill()
        finally:
            if restless.process.poll() is None:
                restless.kill()
    final = Restless(home, options, 0, 0)
    assert final.until("worked") == ["settled", "whole", "worked"]
    final.end()
    told.acknowledged = len(final.acks.read_text("ascii").split())
    return told


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["in its own process", "in the manager's"])
def test_a_manager_that_is_killed_loses_doubles_and_leaks_nothing(folder: Path, where: str) -> None:
    profile = folder / "profile.toml"
    profile.write_text(PROFILE, encoding="utf-8")
    seed = random.randrange(1 << 16)
    if where == "in the manager's":
        options = {"clock": "wall", "profile": str(profile), "seed": "1"}
        assert story(folder, options, 4, seed).acknowledged
    else:
        with simulate(folder, profile) as socket:
            assert story(folder, {"socket": str(socket)}, 6, seed).acknowledged


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_manager_that_is_killed_at_two_hundred_points(folder: Path) -> None:
    profile = folder / "profile.toml"
    profile.write_text(PROFILE, encoding="utf-8")
    seed = random.randrange(1 << 16)
    with simulate(folder, profile) as socket:
        told = story(folder, {"socket": str(socket)}, 200, seed)
    assert told.acknowledged > 1000
    told.note("simulated")


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_manager_of_qemus_machines_that_is_killed_at_twenty_points(folder: Path) -> None:
    need("qemu-system-x86_64")
    seed = random.randrange(1 << 16)
    told = story(folder, {"hypervisor": "qemu"}, 20, seed)
    assert told.acknowledged > 20
    told.note("qemu")

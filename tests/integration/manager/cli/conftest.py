"""vmlab as a person types it, with a home and a manager in the background of the tests' own."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from vmlab.cli.main import main
from vmlab.hypervisors.ownership import Home
from vmlab.manager.client.address import directory_of
from vmlab.manager.service.holding import Holder, holder

PATIENCE = 240.0
"""Seconds that anything has to come: hosts may be slow."""

SPEC = """
name = "any"
architecture = "riscv64"
memory = "64M"

[[disks]]
name = "root"
size = "16M"
"""


@dataclass
class Said:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it said with --json."""
        return json.loads(self.out)


class Person:
    """Types commands, in a home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.spec = home / "machine.toml"
        self.environment = {
            "VMLAB_HOME": str(home),
            "VMLAB_LINGER_SECONDS": "600",
            "VMLAB_HOSTS": json.dumps(
                [
                    {"name": "simulated", "hypervisor": "simulated"},
                    {
                        "name": "slow",
                        "hypervisor": "simulated",
                        "options": {"clock": "wall", "profile": str(home / "slow.toml")},
                    },
                ]
            ),
        }

    def says(self, *words: str) -> Said:
        """A command in this process, whatever comes of it."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main(list(words))
        return Said(status, out.getvalue(), err.getvalue())

    def runs(self, *words: str) -> Said:
        """A command in a process of its own, whatever comes of it: for what forks, or serves."""
        child = self.begins(*words)
        out, err = child.communicate(timeout=PATIENCE)
        return Said(child.returncode, out.decode(), err.decode())

    def does(self, *words: str) -> str:
        """A command that works; what it printed."""
        said = self.says(*words)
        assert said.status == 0, said
        return said.out.strip()

    def begins(self, *words: str, **given: Any) -> subprocess.Popen[bytes]:
        """A command in a process of its own."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [sys.executable, "-m", "vmlab", *words],
            env={**os.environ, **self.environment},
            **(streams | given),
        )

    @property
    def manager(self) -> Holder | None:
        """Who the manager of the home is now."""
        return holder(directory_of(Home.open(self.home)))

    def kill_manager(self) -> None:
        """kill -9 it."""
        found = self.manager
        assert found is not None
        process = psutil.Process(found.pid)
        os.kill(found.pid, signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            process.wait(PATIENCE)


def _person(environment: pytest.MonkeyPatch) -> Iterator[Person]:
    # Not pytest's tmp_path, whose name is long: a socket's path may have 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="vmh-"))
    person = Person(home)
    person.spec.write_text(SPEC)
    (home / "slow.toml").write_text(
        'extends = "standard"\nname = "slow"\n[latency]\nstart = 3600\n'
    )
    for name, value in person.environment.items():
        environment.setenv(name, value)
    try:
        yield person
    finally:
        stopped = person.says("serve", "--stop")
        assert stopped.status == 0, stopped
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def person() -> Iterator[Person]:
    """Somebody whose manager serves all tests of a file."""
    with pytest.MonkeyPatch.context() as environment:
        yield from _person(environment)


@pytest.fixture
def newcomer() -> Iterator[Person]:
    """Somebody who has never had a manager."""
    with pytest.MonkeyPatch.context() as environment:
        yield from _person(environment)


@pytest.fixture
def machine(person: Person) -> Iterator[Callable[..., str]]:
    """Makes machines on the simulated hypervisor; they are deleted afterwards."""
    made: list[str] = []

    def make(name: str, *words: str, host: str = "simulated") -> str:
        person.does("create", name, "--spec", str(person.spec), "-H", host, *words)
        made.append(name)
        return name

    yield make
    left = set(person.does("list", "--quiet").split())
    for name in made:
        if name in left:
            person.does("delete", "--force", name)

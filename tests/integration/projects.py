"""A project of a user's with tests in real guests, and pytest run in it as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
from tests.store import IMAGE_STORE

from vmlab.report import Run, Test, read_run


class Project:
    """A directory with tests, and a home of its own for their machines."""

    def __init__(self, base: Path) -> None:
        self.path = base / "project"
        self.path.mkdir()
        (self.path / "pytest.ini").write_text("[pytest]\n")
        self.home = base / "home"
        self.reports = base / "reports"
        self.environment = {
            **os.environ,
            "VMLAB_HOME": str(self.home),
            "VMLAB_IMAGE_STORE": str(IMAGE_STORE),
        }

    def write(self, text: str) -> None:
        """Write the file of tests."""
        (self.path / "test_it.py").write_text(textwrap.dedent(text), encoding="utf-8")

    def start(self, *words: str, **given: Any) -> subprocess.Popen[bytes]:
        """Start pytest."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | given
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        command += ["--vm-report", str(self.reports), *words]
        return subprocess.Popen(command, cwd=self.path, env=self.environment, **streams)

    def run(self, *words: str) -> str:
        """Run pytest to its end; what it said."""
        with self.start(*words, stderr=subprocess.STDOUT) as runner:
            said, _ = runner.communicate(timeout=1700)
        return said.decode(errors="replace")

    def report(self) -> Run:
        """The report of the last run that ended."""
        return read_run(self.reports / "latest")

    def tests(self) -> dict[str, Test]:
        """The tests of that report, by name."""
        return {test.name: test for test in self.report().tests()}

    def left(self) -> list[psutil.Process]:
        """What still runs with this home when what has been killed has had its time to end."""
        _, alive = psutil.wait_procs(self.processes(), timeout=60)
        return alive

    def processes(self) -> list[psutil.Process]:
        """What runs with this home, pytest itself not counted."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "cwd"])
            if any(str(self.home) in word for word in process.info["cmdline"] or ())
            or str(self.home) in (process.info["cwd"] or "")
        ]

"""A project of a user's, whose tests ask for simulated machines."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# Before any run in this process: pytester forgets what is imported while one is under way.
import vmlab.hypervisors.simulated
import vmlab.lab.demonstration
import vmlab.pytest_plugin.factories
import vmlab.pytest_plugin.machine_run
import vmlab.pytest_plugin.sitting  # noqa: F401
from vmlab.report import Run, Test, read_run

SIMULATED = ("--vm-hypervisor", "simulated")


class Project:
    """A directory with tests, and pytest run in it."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        self.reports = pytester.path / "reports"
        # Another plugin of this environment's warns of errors of collection, and here a warning is
        # an error.
        others = ("-p", "no:cacheprovider", "-p", "no:schemathesis")
        self._own = (*others, "--vm-report", str(self.reports))

    def write(self, **files: str) -> None:
        """Write test files, by name without suffix."""
        for name, text in files.items():
            (self.path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")

    def run(self, *words: str, on: tuple[str, ...] = SIMULATED) -> pytest.RunResult:
        """Run pytest in this process."""
        return self.pytester.runpytest_inprocess(*self._own, *on, *words)

    def command(self, *words: str, on: tuple[str, ...] = SIMULATED) -> list[str]:
        """What runs pytest in a process of its own."""
        return [sys.executable, "-m", "pytest", *self._own, *on, *words]

    def run_apart(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run pytest in a process of its own."""
        return subprocess.run(
            self.command(*words), cwd=self.path, capture_output=True, text=True, check=False,
            timeout=300,
        )  # fmt: skip

    def report(self) -> Run:
        """The report of the last run that ended."""
        return read_run(self.reports / "latest")

    def tests(self) -> dict[str, Test]:
        """The tests of that report by the name of their function."""
        return {test.name.partition("[")[0]: test for test in self.report().tests()}

    def outcomes(self) -> dict[str, str]:
        """How they ended."""
        return {name: test.outcome.value for name, test in self.tests().items()}


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    return Project(pytester)


@pytest.fixture
def written(project: Project) -> Callable[[str], Project]:
    """A project with one file of tests."""

    def write(text: str) -> Project:
        project.write(test_it=text)
        return project

    return write


def only(folder: Path) -> Path:
    """The one entry of a directory, `latest` not counted."""
    (found,) = (entry for entry in folder.iterdir() if not entry.is_symlink())
    return found

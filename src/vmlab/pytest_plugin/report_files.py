"""A pytest run's report: begun by the process that owns the run, and written out at its end.

`latest` beside the run's directory leads to the last one that ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from vmlab.machine.errors import VmlabError
from vmlab.pytest_plugin.wire import PLUGIN
from vmlab.report import Recorder, Run, find_writer, write
from vmlab.report.place import LATEST

TOOL: Final = "pytest"
KEPT: Final = "kept"
"""The source of messages about machines that stay."""
_FORMATS: Final = {"junit": "report.xml", "html": "report.html"}
"""What is written beside `report.json`."""


def split(nodeid: str) -> tuple[str, str]:
    """Suite and name of a test: its file, and the rest of its id."""
    file, _, name = nodeid.partition("::")
    return file, name or file


class RunReport:
    """The report of a run that this process owns."""

    def __init__(self, recorder: Recorder, seed: int) -> None:
        self.recorder = recorder
        self.seed = seed
        self.run: Run | None = None
        self._written: list[Path] = []
        self._trouble: list[str] = []

    @classmethod
    def begin(cls, config: pytest.Config, directory: Path, seed: int) -> RunReport:
        """Begin it; what is recorded from now on is on the disk at once.

        Raises:
            VmlabError: the directory cannot be written.
        """
        words = [str(word) for word in config.invocation_params.args]
        if config.getoption("vm_seed") is None:
            words.append(f"--vm-seed={seed}")
        labels = {"rootdir": str(config.rootpath)}
        recorder = Recorder.create(
            directory, tool=TOOL, version=pytest.__version__, run_id=directory.name, seed=seed,
            command=[*_started_by(config), *words], labels=labels,
        )  # fmt: skip
        return cls(recorder, seed)

    def plan(self, tests: Iterable[tuple[str, str | None]]) -> None:
        """Record tests as pending: ids of pytest's, each with its hypervisor."""
        plan(self.recorder, tests)

    def worker_died(self, nodeid: str, reason: str) -> None:
        """A worker's death is the error of the test that it was at."""
        suite, name = split(nodeid)
        hypervisor = next(
            (
                test.hypervisor
                for test in self.recorder.snapshot().tests()
                if (test.suite, test.name) == (suite, name)
            ),
            None,
        )
        with self.recorder.start(suite, name, hypervisor=hypervisor) as attempt:
            attempt.finish("error", reason=reason)

    def end(self) -> None:
        """Write the report in every format that there is."""
        self.run = self.recorder.close()
        if self.run is None:
            return
        directory = self.recorder.directory
        self._written = [directory / "report.json"]
        for form, name in _FORMATS.items():
            try:
                find_writer(Path(name), form)
                write(self.run, directory / name, form)
            except VmlabError as error:
                self._trouble.append(f"{name}: {error}")
            else:
                self._written.append(directory / name)
        with suppress(OSError):  # a file system without links has the run's own directory
            link = directory.parent / f".{LATEST}-{directory.name}"
            link.symlink_to(directory.name)
            link.replace(directory.parent / LATEST)

    def tell(self, terminal: pytest.TerminalReporter) -> None:
        """Say where it is, and what makes the same happen again."""
        if self.run is None:
            return
        terminal.write_sep("-", "vmlab")
        for path in self._written:
            terminal.write_line(f"report: {path}")
        for trouble in self._trouble:
            terminal.write_line(f"not written: {trouble}", yellow=True)
        for message in self.run.messages:
            if message.source == KEPT:
                terminal.write_line(f"kept: {message.text}")
        terminal.write_line(f"seed: {self.seed} (again: --vm-seed={self.seed})")


def _started_by(config: pytest.Config) -> list[str]:
    """The command that the run was started with, without its arguments."""
    return ["vmlab", "test"] if config.pluginmanager.has_plugin(PLUGIN) else ["pytest"]


def plan(recorder: Recorder, tests: Iterable[tuple[str, str | None]]) -> None:
    """Record tests as pending: ids of pytest's, each with its hypervisor; in their order."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for nodeid, hypervisor in tests:
        suite, name = split(nodeid)
        groups.setdefault((suite, hypervisor), []).append(name)
    for (suite, hypervisor), names in groups.items():
        recorder.plan(suite, names, hypervisor=hypervisor)

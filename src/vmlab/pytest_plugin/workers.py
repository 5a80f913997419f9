"""pytest-xdist: the controller owns the run's report and what its workers share.

The controller collects nothing, so it does not know whether any test asks for a machine; it tells
each worker where the report will be, and begins it when a worker has begun to write there. Workers
have to be on this host, as `-n` starts them.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from vmlab.pytest_plugin.options import settings_of

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Run
    from vmlab.pytest_plugin.report_files import RunReport
    from vmlab.pytest_plugin.saying import Listener

DIRECTORY: Final = "vmlab_report"
SEED: Final = "vmlab_seed"
CONTROLLER: Final = "vmlab_controller"
"""What a worker is told: the run's directory, its seed, and the pid of who tells it."""

SHARED: Final = "shared"
"""The file in the run's directory that says where workers find what they share."""


class Worker:
    """In a worker: what the controller told it."""

    def __init__(self, config: pytest.Config) -> None:
        told: dict[str, Any] = config.workerinput  # type: ignore[attr-defined]  # xdist's
        self.name = str(told["workerid"])
        self.directory = Path(told[DIRECTORY])
        self.seed = int(told[SEED])
        self._controller = int(told[CONTROLLER])

    def die_with_controller(self) -> None:
        """Have the kernel kill this process, and so its machines, when the controller dies.

        By itself a worker that loses its controller goes on with its test for 5 to 15 seconds.
        """
        from vmlab.hypervisors.processes import die_with_parent

        # Where a program stands between the two, that one may end at any time.
        if os.getppid() == self._controller:
            die_with_parent(self._controller)

    def shared(self) -> Path | None:
        """The directory that all workers of the run share; None where the run began too late."""
        try:
            return Path((self.directory / SHARED).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


class Controller:
    """In the controller."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._report: RunReport | None = None
        self._run: Run | None = None
        self._listener: Listener | None = None
        self._directory: Path | None = None
        self._seed = 0

    @property
    def directory(self) -> Path | None:
        """The run's directory; None until its report has begun."""
        return self._directory if self._report is not None else None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker, also one that replaces another, where the report will be."""
        from vmlab.pytest_plugin import report_place

        if self._directory is None:
            settings = settings_of(self._config)
            self._directory = report_place.new_directory(settings)
            self._seed = report_place.new_seed(settings)
        node.workerinput[DIRECTORY] = str(self._directory)
        node.workerinput[SEED] = self._seed
        node.workerinput[CONTROLLER] = os.getpid()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Any) -> None:
        """Begin the run, if this worker has found tests with machines; none has begun yet."""
        self._begin()

    def _begin(self) -> None:
        directory = self._directory
        if self._report is not None or directory is None or not (directory / "journal").is_dir():
            return
        from vmlab.hypervisors.ownership import Run
        from vmlab.pytest_plugin.report_files import RunReport
        from vmlab.pytest_plugin.saying import PIPE, Listener, tell

        self._run = Run.begin()
        shared = self._run.directory / "shared"
        shared.mkdir()
        self._listener = Listener(self._run.directory / PIPE, partial(tell, self._config))
        (directory / SHARED).write_text(str(shared), encoding="utf-8")
        self._report = RunReport.begin(self._config, directory, self._seed)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any, sched: Any) -> None:
        """A worker died of a test: that is the test's error."""
        if self._report is not None:
            self._report.worker_died(crashitem, str(report.longrepr))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Every worker has ended."""
        # A test may have asked for a machine that nobody knew of when it was collected.
        self._begin()
        if self._directory is not None:
            (self._directory / SHARED).unlink(missing_ok=True)
        if self._report is not None:
            self._report.end()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._run is not None:
            self._run.close()
            self._run = None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where the report is."""
        if self._report is not None:
            self._report.tell(terminalreporter)


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is one of pytest-xdist's workers."""
    return hasattr(config, "workerinput")

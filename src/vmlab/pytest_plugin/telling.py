"""Tells `vmlab test` what pytest does: a line of JSON for each event, on a descriptor of its.

Loaded by `vmlab test` alone (PYTEST_PLUGINS), in the process that it has started; without a
descriptor where pytest has the terminal to itself, and then nothing is told. What befalls machines
is not told here: that is in the journals of the run's report, which `vmlab test` follows.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import pytest

from vmlab.pytest_plugin.wire import DESCRIPTOR, NAME, PLUGINS_BEFORE


def pytest_configure(config: pytest.Config) -> None:
    """Begin to tell, if this is the process that is meant, and hide that from those it starts."""
    told = os.environ.pop(DESCRIPTOR, None)
    before = os.environ.pop(PLUGINS_BEFORE, None)
    if before:
        os.environ["PYTEST_PLUGINS"] = before
    elif before is not None:
        os.environ.pop("PYTEST_PLUGINS", None)
    if told is not None and not hasattr(config, "workerinput"):
        os.set_inheritable(int(told), False)
        config.pluginmanager.register(Telling(config, int(told)), NAME)


class Telling:
    """The hooks that tell."""

    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self._config = config
        self._descriptor = descriptor
        self._directory: str | None = None
        self._collected = 0
        self._lock = threading.Lock()

    def tell(self, event: str, **facts: Any) -> None:
        """Tell of an event, from any thread."""
        line = json.dumps({"event": event, **facts}).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                # Nobody listens any more; the tests are of use without.
                return

    def _tell_directory(self) -> None:
        for name in ("vmlab-run", "vmlab-workers"):
            plugin = self._config.pluginmanager.get_plugin(name)
            directory = getattr(plugin, "directory", None)
            if directory is not None and self._directory is None:
                self._directory = str(directory)
                self.tell("report", directory=self._directory)

    def _tell_collected(self, number: int) -> None:
        if number > self._collected:
            self._collected = number
            self.tell("collected", tests=number)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many tests there are, and where the report will be."""
        self._tell_collected(len(session.items))
        self._tell_directory()

    @pytest.hookimpl(optionalhook=True, trylast=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Any) -> None:
        """The same where workers collect."""
        self._tell_collected(len(ids))
        self._tell_directory()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected."""
        if report.failed:
            self.tell("wrong", id=report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.tell("begin", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A part of a test, or a test that ran in a guest, has ended."""
        self.tell(
            "part",
            id=report.nodeid,
            when=report.when,
            outcome=report.outcome,
            duration_s=report.duration,
            xfail=hasattr(report, "wasxfail"),
            died=bool(getattr(report, "vm_died", False)),
            guest_test=getattr(report, "guest_test", None),
        )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test has ended."""
        self.tell("end", id=nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        """A worker died in the midst of a test."""
        self.tell("end", id=crashitem)

"""pytest runs the suite: the plugin that gives it the cases, and the call that starts it.

The suite itself is `test_conformance`. pytest is run in a configuration of its own: no ini file,
conftest, plugin or option of the directory it happens to be started in has a say.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from vmlab.conformance.session import Case, Session, Settings
from vmlab.machine.errors import VmlabError
from vmlab.report import Recorder, Run

TOOL: Final = "vmlab conformance"
SESSION: Final = pytest.StashKey[Session]()

_MEDDLING: Final = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")


class CasesPlugin:
    """Gives `test_conformance` the cases of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.trouble: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        """Let the suite find the session."""
        config.stash[SESSION] = self.session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what went wrong before a case could run."""
        if report.failed:
            self.trouble.append(str(report.longrepr))


def session_of(config: pytest.Config) -> Session:
    """The session of this run; that of the simulated hypervisor where pytest was started plainly.

    `pytest --pyargs vmlab.conformance` is such a start.
    """
    if SESSION not in config.stash:
        config.stash[SESSION] = Session(Settings(("simulated",)))
    return config.stash[SESSION]


def cases_of(config: pytest.Config) -> Sequence[Case]:
    """The cases of this run."""
    return session_of(config).cases


def run_suite(session: Session, directory: Path, command: Sequence[str]) -> Run:
    """Let pytest run the session's cases, recorded in `directory`, and end the run.

    Args:
        session: What to run.
        directory: The run's, for its journal and report; made if it is not there.
        command: The arguments that run it again.

    Raises:
        VmlabError: pytest itself could not do its work.
        KeyboardInterrupt: it was ended by the user; what was found so far is recorded.
    """
    with Recorder.create(
        directory, tool=TOOL, seed=session.settings.seed, command=command
    ) as recorder:
        session.plan(recorder)
        plugin = CasesPlugin(session)
        with _alone(directory.parent) as ini:
            status = pytest.main(
                [
                    "--pyargs",
                    "vmlab.conformance.test_conformance",
                    *("-c", str(ini), "--rootdir", str(ini.parent), "--noconftest"),
                    *("-p", "no:cacheprovider", "-p", "no:terminal", "--capture=no"),
                ],
                plugins=[plugin],
            )
        session.conclude()
        run = recorder.close()
    if status is pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if run is None or status not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        raise VmlabError(
            f"pytest could not run the suite ({pytest.ExitCode(status).name}): "
            + " ".join(plugin.trouble),
            hint="is pytest installed as vmlab's extra `test` asks for it?",
        )
    return run


@contextmanager
def _alone(place: Path) -> Iterator[Path]:
    """An empty ini file in `place`, and an environment that does not change how pytest works."""
    kept = {name: os.environ.pop(name) for name in _MEDDLING if name in os.environ}
    autoload = os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        with tempfile.TemporaryDirectory(prefix="pytest-", dir=place) as folder:
            ini = Path(folder) / "pytest.ini"
            ini.write_text("[pytest]\n", encoding="utf-8")
            yield ini
    finally:
        os.environ.update(kept)
        if autoload is None:
            del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        else:
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = autoload

"""Writes results down as they happen, so that no death of any process loses one.

Not a test runner. Each process that finds results has one `Recorder`: the run's owner makes it
with `Recorder.create`, its workers (pytest-xdist's, say) with `Recorder.join`. Every call is in
the journal (`journal.py`) when it returns. `Recorder.close` of the owner merges all journals into
`report.json`; after a `kill -9` `read_run` does the same with what there is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vmlab import __version__
from vmlab.machine.errors import VmlabError
from vmlab.report.attempt import AttemptRecorder
from vmlab.report.durable import AppendFile, Sync, write_atomically
from vmlab.report.host import host_facts
from vmlab.report.journal import (
    MAIN,
    REPORT,
    has_journal,
    journal_path,
    read_journals,
)
from vmlab.report.journal_writer import Clock, JournalWriter, made, plain
from vmlab.report.json_report import render
from vmlab.report.model import (
    Artifact,
    Message,
    Outcome,
    Run,
    Severity,
    Test,
)

__all__ = ["Recorder"]

_WORKER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def new_run_id(now: datetime) -> str:
    """An id that sorts by time and that no other run has."""
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


class Recorder:
    """One process's journal of a run; safe for any number of threads.

    A context manager: leaving it closes it. Every method raises VmlabError where the journal
    cannot be written, where a value cannot stand in a report, and after `close`.
    """

    def __init__(self, journal: JournalWriter, *, owns_run: bool) -> None:
        """Not for callers: `create` and `join` make recorders."""
        self.directory = journal.directory
        self.worker = journal.worker
        self._journal = journal
        self._owns_run = owns_run

    @classmethod
    def create(
        cls,
        directory: Path | str,
        *,
        tool: str,
        version: str | None = None,
        run_id: str | None = None,
        seed: int | None = None,
        command: Sequence[str] = (),
        environment: Mapping[str, str | int | float | bool | None] | None = None,
        labels: Mapping[str, str] | None = None,
        sync: Sync = Sync.INTERVAL,
        clock: Clock | None = None,
    ) -> Self:
        """Begin a run in `directory`, which is made and may hold other files but no other run.

        Args:
            directory: The run's directory: journals, artifacts and `report.json` go there.
            tool: What runs, as "vmlab conformance".
            version: The tool's version; vmlab's own if None.
            run_id: Letters, digits, ".", "_", "-"; made up (sortable by time) if None.
            seed: What all of the run's randomness comes from.
            command: The arguments that run it again, program first.
            environment: Facts beside those of `host_facts`, or instead of them.
            labels: Free texts by name.
            sync: How much of fsync(2) to pay for; see `Sync`.
            clock: The host's, if None.

        Raises:
            VmlabError: `directory` holds a run already or cannot be written.
        """
        clock = clock or Clock()
        now = clock.now()
        facts = {
            "id": run_id if run_id is not None else new_run_id(now),
            "tool": tool,
            "version": version if version is not None else __version__,
            "seed": seed,
            "command": tuple(command),
            "environment": {**host_facts(), **(environment or {})},
            "labels": dict(labels or {}),
        }
        run = made(Run, **facts, started=now)
        path = Path(directory)
        if has_journal(path) or (path / REPORT).exists():
            raise _taken(path)
        try:
            file = AppendFile(journal_path(path, MAIN), sync=sync)
        except FileExistsError as error:
            raise _taken(path) from error
        journal = JournalWriter(path, file, worker=MAIN, clock=clock, run=plain(run))
        return cls(journal, owns_run=True)

    @classmethod
    def join(
        cls,
        directory: Path | str,
        worker: str,
        *,
        sync: Sync = Sync.INTERVAL,
        clock: Clock | None = None,
    ) -> Self:
        """Record as `worker` ("gw0") of the run in `directory`, in a journal of its own.

        A name that was used before (a worker that was started again) gets a number appended.
        """
        if _WORKER.fullmatch(worker) is None or worker == MAIN:
            raise VmlabError(
                f"{worker!r} cannot name a worker",
                hint=f"use letters, digits, '-' and '_', at most 64, and not {MAIN!r}",
            )
        path = Path(directory)
        clock = clock or Clock()
        name, used = worker, 1
        while True:
            try:
                file = AppendFile(journal_path(path, name), sync=sync)
            except FileExistsError:
                used += 1
                name = f"{worker}-{used}"
            else:
                journal = JournalWriter(path, file, worker=name, clock=clock, run=None)
                return cls(journal, owns_run=False)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._journal.closed

    def plan(
        self,
        suite: str,
        tests: Iterable[str],
        *,
        hypervisor: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Record that `tests` will run: each is pending until it ends. Planning twice is fine."""
        common = {"suite": suite, "hypervisor": hypervisor, "labels": dict(labels or {})}
        planned = [made(Test, name=name, **common) for name in tests]
        if planned:
            facts = planned[0].model_dump(include={"suite", "hypervisor", "labels"})
            names = [test.name for test in planned]
            self._journal.write("plan", {**facts, "tests": names}, durable=True)

    def start(
        self,
        suite: str,
        name: str,
        *,
        hypervisor: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AttemptRecorder:
        """Record that an attempt at a test begins, planned or not; it is pending until it ends.

        Several attempts, of one test or of several, may be under way at once.
        """
        test = made(Test, suite=suite, name=name, hypervisor=hypervisor, labels=dict(labels or {}))
        return AttemptRecorder(self._journal, test)

    def skip(
        self,
        suite: str,
        name: str,
        reason: str,
        *,
        hypervisor: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Record that a test does not run, and why."""
        self.start(suite, name, hypervisor=hypervisor, labels=labels).finish(
            Outcome.SKIP, reason=reason
        )

    def message(
        self,
        text: str | bytes,
        *,
        severity: Severity = Severity.INFO,
        details: str | bytes = "",
        source: str | None = None,
    ) -> None:
        """Record something about the run as a whole."""
        message = made(Message, text=text, severity=severity, details=details, source=source)
        self._journal.part(None, message)

    def attach(
        self, name: str, content: bytes | bytearray | str | Path, *, media_type: str | None = None
    ) -> Artifact:
        """Keep a file as evidence about the run as a whole; see `AttemptRecorder.attach`."""
        return self._journal.attach(None, name, content, media_type)

    def snapshot(self) -> Run:
        """The run as all its journals tell it at this moment."""
        return read_journals(self.directory)

    def close(self) -> Run | None:
        """End this process's part; the run's owner ends the run and writes `report.json`.

        The owner closes last: what a worker records later is in its journal, not in the report.
        An attempt that is still under way stays pending in it. A second call does nothing.

        Returns:
            The finished run for its owner; None for a worker, and for a second call.
        """
        if self.closed:
            return None
        self._journal.close()
        if not self._owns_run:
            return None
        run = read_journals(self.directory)
        write_atomically(self.directory / REPORT, render(run))
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _taken(directory: Path) -> VmlabError:
    return VmlabError(
        f"{directory} holds a run already",
        hint="give each run a directory of its own; its workers use Recorder.join",
    )

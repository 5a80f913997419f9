"""One attempt at a test, recorded while it is under way.

Every call is in the journal when it returns, so that the death of the guest, of the test or of
this process leaves all that was known until then.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from vmlab.machine.errors import VmlabError
from vmlab.report.escape import escape_surrogates
from vmlab.report.journal_writer import JournalWriter, made, plain
from vmlab.report.model import (
    Artifact,
    Check,
    Direction,
    FaultRecord,
    MachineRecord,
    Mark,
    Message,
    Metric,
    Outcome,
    Output,
    Phase,
    Severity,
    Test,
)
from vmlab.report.parts import Part

__all__ = ["OUTPUT_LIMIT", "AttemptRecorder"]

OUTPUT_LIMIT: Final = 256 * 1024
"""Characters of one stream that go into the report; all of it belongs into an artifact."""


class AttemptRecorder:
    """One attempt at a test, while it is under way.

    A context manager: leaving it by an exception records an error with the traceback (the
    exception goes on), leaving it without having called `finish` records what the checks say.
    """

    def __init__(self, journal: JournalWriter, test: Test) -> None:
        """Not for callers: `Recorder.start` makes these."""
        self.suite = test.suite
        self.name = test.name
        self.hypervisor = test.hypervisor
        self._journal = journal
        self._number = journal.serial()
        self._began = journal.clock.monotonic()
        self._lock = threading.RLock()
        self._worst: Outcome | None = None  # of its checks; None while there are none
        self._written: dict[str, int] = {}
        self._machines: set[str] = set()
        self._faults: dict[tuple[str, str], FaultRecord] = {}  # in effect, by id and machine
        self._outcome: Outcome | None = None
        journal.write(
            "start",
            {
                "n": self._number,
                "suite": test.suite,
                "name": test.name,
                "hypervisor": test.hypervisor,
                "labels": test.labels,
                "at": journal.clock.now(),
                "monotonic": self._began,
            },
        )

    @property
    def outcome(self) -> Outcome:
        """How it ended; pending until then."""
        return self._outcome or Outcome.PENDING

    @property
    def finished(self) -> bool:
        """Whether `finish` was called."""
        return self._outcome is not None

    def _part(self, part: Part) -> None:
        with self._lock:
            self._refuse_if_finished()
            self._journal.part(self._number, part)

    def _refuse_if_finished(self) -> None:
        if self._outcome is not None:
            raise VmlabError(
                f"test {self.name!r} of suite {self.suite!r} has ended already: "
                f"{self._outcome.value}",
                hint="record checks, metrics and files before finish()",
            )

    def ran_on(self, hypervisor: str) -> None:
        """Record the hypervisor, where it was not known when the attempt began."""
        self._refuse_if_finished()
        named = made(Test, suite=self.suite, name=self.name, hypervisor=hypervisor).hypervisor
        self._journal.write("hypervisor", {"n": self._number, "hypervisor": named})
        self.hypervisor = named

    def check(
        self,
        name: str,
        outcome: Outcome | bool,
        message: str | bytes = "",
        *,
        expected: object = None,
        actual: object = None,
    ) -> bool:
        """Record one thing that was verified.

        Args:
            name: What was verified, as "state after pause".
            outcome: True for pass, False for fail, or any outcome.
            message: What it means, for people.
            expected: What should have been; texts stay as they are, other values as `repr`.
            actual: What was.

        Returns:
            Whether nothing is wrong with it.
        """
        if isinstance(outcome, bool):
            outcome = Outcome.PASS if outcome else Outcome.FAIL
        check = made(
            Check,
            name=name,
            outcome=outcome,
            message=message,
            expected=_words(expected),
            actual=_words(actual),
        )
        if check.outcome is Outcome.PENDING:
            raise VmlabError(
                f"check {name!r} of test {self.name!r} cannot be pending",
                hint="record it when its outcome is known",
            )
        with self._lock:
            self._part(check)
            known = [] if self._worst is None else [self._worst]
            self._worst = Outcome.worst([*known, check.outcome])
        return check.outcome.ok

    def metric(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        direction: Direction = Direction.NONE,
    ) -> None:
        """Record a measured number, with the time since the attempt began."""
        at_s = self._journal.since(self._began)
        self._part(made(Metric, name=name, value=value, unit=unit, direction=direction, at_s=at_s))

    def message(
        self,
        text: str | bytes,
        *,
        severity: Severity = Severity.INFO,
        details: str | bytes = "",
        source: str | None = None,
    ) -> None:
        """Record something worth telling; severity ERROR is for why it failed."""
        self._part(made(Message, text=text, severity=severity, details=details, source=source))

    def output(self, stream: str, text: str | bytes) -> None:
        """Record what was written to `stream` ("stdout", "stderr", "console").

        May be called again for more. Beyond `OUTPUT_LIMIT` characters of a stream only the first
        and last part of `text` are kept, and the report says how much is missing.
        """
        whole = str(escape_surrogates(text))
        with self._lock:
            written = self._written.get(stream, 0)
            kept, omitted = _cut(whole, OUTPUT_LIMIT - written)
            self._part(made(Output, stream=stream, text=kept, omitted=omitted))
            self._written[stream] = written + len(whole) - omitted

    def attach(
        self, name: str, content: bytes | bytearray | str | Path, *, media_type: str | None = None
    ) -> Artifact:
        """Keep a file as evidence.

        Args:
            name: What it is, as "console.log"; need not be unique.
            content: Bytes, text (written as UTF-8), or a file to copy.
            media_type: By the name's suffix, if None.
        """
        self._refuse_if_finished()
        return self._journal.attach(self._number, name, content, media_type)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the attempt began: what `at_s` and `started_s` count in."""
        return self._journal.since(self._began)

    def phase(
        self,
        name: str,
        outcome: Outcome | Literal["pass", "fail", "error", "skip", "xfail", "pending"],
        *,
        duration_s: float | None = None,
        started_s: float | None = None,
        message: str | bytes = "",
    ) -> None:
        """Record one step of the test; it does not decide how the attempt ends.

        Args:
            name: As "boot", "build", "run".
            outcome: How it ended. One that was recorded as pending is replaced when it is
                recorded again, so that a death in its midst shows which step it was.
            duration_s: Seconds that it took; None while it is pending.
            started_s: When it began, in seconds since the attempt did; by `duration_s` before
                now, if None.
            message: Why it ended so.
        """
        if started_s is None:
            started_s = self.elapsed_s - (duration_s or 0.0)
        self._part(
            made(
                Phase,
                name=name,
                outcome=outcome,
                started_s=started_s,
                duration_s=duration_s,
                message=message,
            )
        )

    def machine(
        self,
        name: str,
        *,
        hypervisor: str,
        accelerator: str = "",
        architecture: str = "",
        image: str | None = None,
        spec: Mapping[str, object] | None = None,
    ) -> None:
        """Record a machine that the test uses; called again, what is stated then counts.

        Args:
            name: Unique among the attempt's machines.
            hypervisor: The back end that it runs on.
            accelerator: Who executes the guest, as "kvm" or "tcg".
            architecture: The guest's.
            image: What it boots.
            spec: What it was made from; what JSON cannot hold becomes text.
        """
        record = made(
            MachineRecord,
            name=name,
            hypervisor=hypervisor,
            accelerator=accelerator,
            architecture=architecture,
            image=image,
            spec=spec or {},
        )
        with self._lock:
            self._part(record)
            self._machines.add(record.name)

    def mark(
        self,
        machine: str,
        kind: str,
        text: str | bytes = "",
        *,
        at_s: float | None = None,
        duration_s: float | None = None,
    ) -> None:
        """Record what happened to a machine, for its timeline.

        Args:
            machine: One that `machine` recorded.
            kind: As "boot", "panic", "snapshot"; marks of one kind are drawn alike.
            text: More about it.
            at_s: When it began, in seconds since the attempt did, negative for before; by
                `duration_s` before now, if None.
            duration_s: Seconds that it took; None for a moment.

        Raises:
            VmlabError: `machine` was not recorded, or the attempt has ended.
        """
        if at_s is None:
            at_s = self.elapsed_s - (duration_s or 0.0)
        mark = made(Mark, at_s=at_s, kind=kind, text=text, duration_s=duration_s)
        machine = str(escape_surrogates(machine))
        with self._lock:
            self._refuse_if_finished()
            if machine not in self._machines:
                known = ", ".join(map(repr, sorted(self._machines))) or "none yet"
                raise VmlabError(
                    f"test {self.name!r} has no machine {machine!r} that {kind!r} could happen to",
                    hint=f"record it with machine() first; recorded are: {known}",
                )
            facts = {"n": self._number, "machine": machine, "mark": plain(mark)}
            self._journal.write("mark", facts)

    def fault(
        self,
        id: str,
        kind: str,
        machine: str,
        *,
        parameters: Mapping[str, object] | None = None,
        at_s: float | None = None,
        refused: str | bytes = "",
    ) -> None:
        """Record a fault that was injected into a machine, or why it was not.

        Args:
            id: The fault's name in its schedule; one that is injected again is recorded again.
            kind: As "disk-error"; see `vmlab.machine.faults`.
            machine: Which machine.
            parameters: The fault's own; what JSON cannot hold becomes text.
            at_s: When, in seconds since the attempt began; now, if None.
            refused: Why it was not injected; empty if it was.
        """
        record = made(
            FaultRecord,
            id=id,
            kind=kind,
            machine=machine,
            at_s=self.elapsed_s if at_s is None else at_s,
            parameters=parameters or {},
            refused=refused,
        )
        with self._lock:
            self._part(record)
            if not record.refused:
                self._faults[record.id, record.machine] = record

    def fault_cleared(self, id: str, machine: str, *, at_s: float | None = None) -> None:
        """Record that a fault is over.

        Raises:
            VmlabError: It was not recorded as injected, or is over already.
        """
        at_s = self.elapsed_s if at_s is None else at_s
        key = str(escape_surrogates(id)), str(escape_surrogates(machine))
        with self._lock:
            self._refuse_if_finished()
            if key not in self._faults:
                raise VmlabError(
                    f"fault {id!r} of machine {machine!r} cannot end: it is not in effect",
                    hint="record it with fault() when it is injected",
                )
            over = made(FaultRecord, **{**self._faults[key].model_dump(), "cleared_s": at_s})
            facts = {"fault": over.id, "machine": over.machine, "at_s": over.cleared_s}
            self._journal.write("cleared", {"n": self._number, **facts})
            del self._faults[key]

    def finish(
        self,
        outcome: Outcome | Literal["pass", "fail", "error", "skip", "xfail"] | None = None,
        *,
        reason: str | bytes | None = None,
        details: str | bytes = "",
    ) -> Outcome:
        """Record how it ended.

        Args:
            outcome: What the checks say, if None (pass without any). A "pass" that a check
                contradicts is recorded as what that check says.
            reason: Why it was skipped, failed or was in error.
            details: More about it, such as a traceback.

        Returns:
            The outcome that was recorded.

        Raises:
            VmlabError: It has ended already, or the outcome is pending.
        """
        with self._lock:
            self._refuse_if_finished()
            ended = self._concluded(None if outcome is None else Outcome(outcome))
            skip_reason = None
            if ended is Outcome.SKIP:
                skip_reason = str(escape_surrogates(reason or _no_skip_reason(outcome)))
            elif reason:
                severity = Severity.INFO if ended.ok else Severity.ERROR
                self.message(reason, severity=severity, details=details)
            self._journal.write(
                "finish",
                {
                    "n": self._number,
                    "outcome": ended.value,
                    "skip_reason": skip_reason,
                    "at": self._journal.clock.now(),
                    "duration_s": self._journal.since(self._began),
                },
            )
            self._outcome = ended
        return ended

    def _concluded(self, stated: Outcome | None) -> Outcome:
        if stated is Outcome.PENDING:
            raise VmlabError(
                f"test {self.name!r} cannot end as pending",
                hint="pending is what it was before; give the outcome that was found",
            )
        if self._worst is None:
            return stated or Outcome.PASS
        if stated is Outcome.PASS and not self._worst.ok:
            return self._worst
        return stated or self._worst

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.finished:
            return
        if error is None:
            self.finish()
        else:
            self.finish(
                Outcome.ERROR,
                reason=f"{type(error).__name__}: {error}",
                details="".join(traceback.format_exception(error)),
            )


def _no_skip_reason(outcome: Outcome | str | None) -> str:
    return "all of its checks were skipped" if outcome is None else "no reason was given"


def _words(value: object) -> str | None:
    """`value` as text for people; None stays None, which means that it was not stated."""
    text = escape_surrogates(value)
    return text if text is None or isinstance(text, str) else repr(text)


def _cut(text: str, room: int) -> tuple[str, int]:
    """The first and last part of `text` that fit into `room`, and how many characters do not."""
    omitted = len(text) - room
    if omitted <= 0:
        return text, 0
    head, tail = room - room // 2, room // 2
    if room == 0:
        return "", omitted
    mark = f"\n[... {omitted} characters left out ...]\n"
    return text[:head] + mark + text[len(text) - tail :], omitted

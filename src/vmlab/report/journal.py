"""The journal of a run: its layout on disk, and reading it back into a `Run`.

A run's directory holds `journal/NAME.jsonl`, one for each process that records, `artifacts/`, and
after the run `report.json`. A journal is JSON Lines (UTF-8, here ASCII; one object per line):

    open       worker, clock; from the process that owns the run also the run's facts
    plan       tests that will run: each is pending from here on
    start      an attempt at a test, numbered within the journal (`n`)
    hypervisor, check, metric, message, artifact, output, phase, machine, fault
               what became known, of `n` or of the run
    mark       what happened to a `machine` of `n`
    cleared    the end of `fault` of `machine` of `n`
    finish     the attempt's outcome
    close      the run's end

Whatever a crash left of it is read: an attempt without `finish` is pending, and a line that is
damaged anywhere but at the very end is left out and reported in the run's messages.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from vmlab.machine.errors import VmlabError
from vmlab.report.model import (
    Artifact,
    Attempt,
    FaultRecord,
    MachineRecord,
    Mark,
    Message,
    Outcome,
    Output,
    Phase,
    Run,
    Severity,
    Suite,
    Test,
)
from vmlab.report.parts import PARTS, Part

__all__ = ["ARTIFACTS", "JOURNALS", "REPORT", "has_journal", "journal_path", "read_journals"]

VERSION: Final = "vmlab.journal/1"
JOURNALS: Final = "journal"
ARTIFACTS: Final = "artifacts"
REPORT: Final = "report.json"
MAIN: Final = "main"
"""The worker name of the process that owns the run."""

_SUFFIX: Final = ".jsonl"


def journal_path(directory: Path, worker: str) -> Path:
    """Where `worker` writes its journal of the run in `directory`."""
    return directory / JOURNALS / f"{worker}{_SUFFIX}"


def has_journal(directory: Path) -> bool:
    """Whether `directory` holds the journal of a run."""
    return journal_path(directory, MAIN).exists()


@dataclass
class _Attempt:
    """An attempt as its journal tells it so far; `test` identifies what it is an attempt at."""

    test: Test
    worker: str
    clock: str
    started: datetime
    monotonic: float
    end: Attempt | None = None
    machines: dict[str, MachineRecord] = field(default_factory=dict)
    marks: defaultdict[str, list[Mark]] = field(default_factory=lambda: defaultdict(list))
    parts: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def model(self) -> Attempt:
        end = self.end or Attempt(outcome=Outcome.PENDING)
        return Attempt(
            outcome=end.outcome,
            started=self.started,
            finished=end.finished,
            duration_s=end.duration_s,
            worker=self.worker,
            skip_reason=end.skip_reason,
            checks=tuple(self.parts["check"]),
            messages=tuple(self.parts["message"]),
            metrics=tuple(self.parts["metric"]),
            artifacts=tuple(self.parts["artifact"]),
            output=tuple(_joined(self.parts["output"])),
            phases=tuple(self.parts["phase"]),
            machines=tuple(
                machine.model_copy(update={"timeline": _by_time(self.marks[name])})
                for name, machine in self.machines.items()
            ),
            faults=tuple(self.parts["fault"]),
        )

    def add(self, kind: str, part: Part) -> None:
        """Take what became known; a phase that ends and a machine told again are one each."""
        if isinstance(part, MachineRecord):
            # Said again when more is known: what is stated now counts, the rest stays.
            before = self.machines.get(part.name, part)
            stated = {name: getattr(part, name) for name in part.model_fields_set}
            self.machines[part.name] = before.model_copy(update=stated)
            return
        parts = self.parts[kind]
        if isinstance(part, Phase):
            for position, phase in enumerate(parts):
                if phase.name == part.name and phase.outcome is Outcome.PENDING:
                    parts[position] = part
                    return
        parts.append(part)

    def mark(self, machine: str, mark: Mark) -> None:
        """Take what happened to a machine that the journal has told of."""
        if machine not in self.machines:
            raise ValueError(f"tells of machine {machine!r}, which is not known")
        self.marks[machine].append(mark)

    def clear(self, fault: str, machine: str, at_s: float) -> None:
        """Take the end of the fault's last injection."""
        faults: list[FaultRecord] = self.parts["fault"]
        for position in range(len(faults) - 1, -1, -1):
            found = faults[position]
            if (found.id, found.machine) == (fault, machine) and not found.refused:
                stated = {**found.model_dump(), "cleared_s": at_s}
                faults[position] = FaultRecord.model_validate(stated)
                return
        raise ValueError(f"tells of the end of fault {fault!r}, which did not begin")


@dataclass
class _Story:
    """What all journals of a run tell together; `run` and `end` are what its owner wrote."""

    run: Run | None = None
    end: Run | None = None
    planned: list[Test] = field(default_factory=list)
    attempts: list[_Attempt] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)


def _by_time(marks: list[Mark]) -> tuple[Mark, ...]:
    return tuple(sorted(marks, key=lambda mark: mark.at_s))


def _joined(chunks: list[Output]) -> list[Output]:
    """One `Output` for each stream, in order of appearance."""
    streams: dict[str, list[Output]] = {}
    for chunk in chunks:
        streams.setdefault(chunk.stream, []).append(chunk)
    return [
        Output(
            stream=stream,
            text="".join(chunk.text for chunk in parts),
            omitted=sum(chunk.omitted for chunk in parts),
        )
        for stream, parts in streams.items()
    ]


class _Reader:
    """Reads one journal into the story."""

    def __init__(self, story: _Story) -> None:
        self.story = story
        self.worker = ""
        self.clock = ""
        self.attempts: dict[int, _Attempt] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Add what `event` tells; a malformed one raises KeyError, TypeError or ValueError."""
        match event["event"]:
            case "open":
                self._open(event)
            case "plan":
                self.story.planned.extend([_test(event, name) for name in event["tests"]])
            case "start":
                begun = Attempt(outcome=Outcome.PENDING, started=event["at"])
                assert begun.started is not None
                attempt = _Attempt(
                    test=_test(event, event["name"]),
                    worker=self.worker,
                    clock=self.clock,
                    started=begun.started,
                    monotonic=float(event["monotonic"]),
                )
                self.attempts[event["n"]] = attempt
                self.story.attempts.append(attempt)
            case "hypervisor":
                attempt = self._under_way(event)
                attempt.test = _test({**attempt.test.model_dump(), **event}, attempt.test.name)
            case "mark":
                mark = Mark.model_validate(event["mark"], extra="ignore")
                self._under_way(event).mark(event["machine"], mark)
            case "cleared":
                self._under_way(event).clear(event["fault"], event["machine"], event["at_s"])
            case "finish":
                attempt = self._under_way(event)
                attempt.end = Attempt(
                    outcome=event["outcome"],
                    finished=event["at"],
                    duration_s=event["duration_s"],
                    skip_reason=event["skip_reason"],
                    checks=tuple(attempt.parts["check"]),
                )
            case "close":
                if self.worker == MAIN and self.story.run is not None:
                    end = {"finished": event["at"], "duration_s": event["duration_s"]}
                    self.story.end = Run.model_validate({**dict(self.story.run), **end})
            case kind:
                self._part(kind, event)

    def _open(self, event: dict[str, Any]) -> None:
        if event["journal"] != VERSION:
            raise ValueError(f"is of format {event['journal']!r}, not {VERSION!r}")
        self.worker, self.clock = str(event["worker"]), str(event["clock"])
        if event["run"] is not None:
            run = Run.model_validate({**event["run"], "started": event["at"]}, extra="ignore")
            if self.story.run is not None:
                raise ValueError(f"is of run {run.id!r}, not {self.story.run.id!r}")
            self.story.run = run

    def _under_way(self, event: dict[str, Any]) -> _Attempt:
        attempt = self.attempts[event["n"]]
        if attempt.end is not None:
            raise ValueError(f"tells more of attempt {event['n']}, which has ended")
        return attempt

    def _part(self, kind: str, event: dict[str, Any]) -> None:
        part = PARTS[kind].model_validate(event[kind], extra="ignore")
        if event["n"] is not None:
            self._under_way(event).add(kind, part)
        elif isinstance(part, Message):
            self.story.messages.append(part)
        elif isinstance(part, Artifact):
            self.story.artifacts.append(part)
        else:
            raise ValueError(f"a run has no {kind} of its own")


def _test(event: dict[str, Any], name: str) -> Test:
    return Test(
        suite=event["suite"], name=name, hypervisor=event["hypervisor"], labels=event["labels"]
    )


def _natural(path: Path) -> tuple[bool, list[tuple[int, str]]]:
    """Sort key: the run's owner first, then by name with gw2 before gw10."""
    pieces = re.findall(r"\d+|\D+", path.stem)
    return path.stem != MAIN, [(int(p), "") if p.isdigit() else (-1, p) for p in pieces]


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Each line of a journal with its number and whether it is complete."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VmlabError(
            f"cannot read the journal {path}: {error.strerror or error}",
            hint="it holds a run's results: check its permissions and its disk",
        ) from error
    lines = data.split(b"\n")
    last = len(lines)
    for number, line in enumerate(lines, start=1):
        if line:
            yield number, line, number < last


def _read_one(path: Path, story: _Story) -> None:
    reader = _Reader(story)
    for number, line, complete in _lines(path):
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise TypeError("is not an object")
            reader.take(event)
        except (KeyError, TypeError, ValueError) as error:
            if not complete:
                continue  # torn by the writer's death, as expected: it was never said
            why = str(error).splitlines()[0]
            story.messages.append(
                Message(
                    text=f"journal {path.name}, line {number} is damaged and was left out",
                    severity=Severity.WARNING,
                    details=f"{type(error).__name__}: {why}",
                    source="journal",
                )
            )


def _in_order(attempts: list[_Attempt]) -> list[_Attempt]:
    """The attempts at one test, in the order in which they began.

    Processes of one boot of one host share a monotonic clock; else the time of day has to do.
    Python's sort is stable, so equal times keep the order of the journals.
    """
    if len({attempt.clock for attempt in attempts}) == 1:
        return sorted(attempts, key=lambda attempt: attempt.monotonic)
    return sorted(attempts, key=lambda attempt: attempt.started)


@dataclass
class _Slot:
    """A test's place in the report."""

    hypervisor: str | None
    labels: dict[str, str] = field(default_factory=dict)
    attempts: list[_Attempt] = field(default_factory=list)


class _Places:
    """The tests of a run, in order of first mention, and what belongs to which."""

    def __init__(self) -> None:
        self._slots: dict[str, dict[str, list[_Slot]]] = {}

    def of(self, test: Test) -> _Slot:
        """The slot of `test`: a hypervisor not known yet is the only one that becomes known."""
        slots = self._slots.setdefault(test.suite, {}).setdefault(test.name, [])
        for slot in slots:
            if slot.hypervisor == test.hypervisor:
                break
        else:
            if test.hypervisor is None and len(slots) == 1:
                slot = slots[0]
            elif unknown := [slot for slot in slots if slot.hypervisor is None]:
                slot = unknown[0]
                slot.hypervisor = test.hypervisor
            else:
                slot = _Slot(test.hypervisor)
                slots.append(slot)
        slot.labels.update(test.labels)
        return slot

    def suites(self) -> Iterator[Suite]:
        """The suites with their tests."""
        for suite, tests in self._slots.items():
            yield Suite(
                name=suite,
                tests=tuple(
                    Test(
                        suite=suite,
                        name=name,
                        hypervisor=slot.hypervisor,
                        labels=slot.labels,
                        attempts=tuple(attempt.model() for attempt in _in_order(slot.attempts)),
                    )
                    for name, slots in tests.items()
                    for slot in slots
                ),
            )


def read_journals(directory: Path) -> Run:
    """The run that the journals in `directory` tell of, finished or not.

    Journals are merged in a stable order, whatever the order in which they were written: the
    run's owner first, then the workers by name. A test stands where it is first mentioned, all
    plans before all attempts.

    Raises:
        VmlabError: `directory` holds no journal, or none that says which run it is.
    """
    story = _Story()
    for path in sorted((directory / JOURNALS).glob(f"*{_SUFFIX}"), key=_natural):
        _read_one(path, story)
    if story.run is None:
        raise VmlabError(
            f"no run is recorded in {directory}",
            hint="name the directory of a run, or its report.json",
        )
    places = _Places()
    for planned in story.planned:
        places.of(planned)
    for attempt in story.attempts:
        places.of(attempt.test).attempts.append(attempt)
    run = story.end or story.run
    return run.model_copy(
        update={
            "messages": (*story.messages, *_clock_remarks(story)),
            "artifacts": tuple(story.artifacts),
            "suites": tuple(places.suites()),
        }
    )


def _clock_remarks(story: _Story) -> Iterator[Message]:
    """A remark where the host's time of day went backwards while the run ran."""
    spans = [(attempt.started, attempt.end and attempt.end.finished) for attempt in story.attempts]
    if story.end is not None:
        spans.append((story.end.started, story.end.finished))
    back = max(
        ((started - finished).total_seconds() for started, finished in spans if finished),
        default=0.0,
    )
    if back > 0:
        yield Message(
            text=f"the host's clock went back by {back:g} s or more during the run; "
            "durations are from its monotonic clock and not affected",
            severity=Severity.WARNING,
            source="clock",
        )

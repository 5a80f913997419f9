"""What happens in a run of `vmlab test`, put together from pytest's events and from the journals.

A model of the present moment: who shows it, and how, is not known here.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_PYTEST_S: Final = {"setup", "call", "teardown"}
"""Phases of every test of pytest's, which are no news."""
_BOOTS: Final = {"boot", "template"}
"""Marks of a machine that has booted: a test's own, and one that machines are forked from."""
_MOST_READ: Final = 1 << 20


@dataclass
class MachineNow:
    """A machine of a test that runs."""

    name: str
    hypervisor: str
    image: str
    doing: str = "starting"


@dataclass
class TestNow:
    """A test that runs: since when, in which phase, and its machines by name."""

    __test__ = False

    id: str
    since: float
    outcome: str = "pass"
    seconds: float = 0.0
    phase: str = ""
    machines: dict[str, MachineNow] = field(default_factory=dict)


@dataclass
class WorkNow:
    """Work on an image: its step in words, how much of what is done, of how much if it is known."""

    step: str
    done: int
    total: int | None
    unit: str


@dataclass(frozen=True)
class News:
    """Something worth a line: about which test, of which kind, and in words."""

    kind: str
    test: str
    text: str


class Story:
    """The run so far.

    Args:
        tell: Told of everything that is worth a line, when it happens.
        clock: Seconds of a monotonic clock.
    """

    def __init__(
        self, tell: Callable[[News], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.planned = 0
        self.outcomes: Counter[str] = Counter()
        self.running: dict[str, TestNow] = {}
        self.work: dict[str, WorkNow] = {}
        self.wrong: list[str] = []
        self.directory: Path | None = None
        self.boots = 0
        self.machines = 0
        self._tell = tell
        self._clock = clock
        self._follower: Follower | None = None
        self._attempts: dict[tuple[str, int], str] = {}

    @property
    def done(self) -> int:
        """How many of pytest's tests have ended; those in guests are not counted."""
        return self.outcomes.total()

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event of pytest's."""
        id_ = str(event.get("id", ""))
        match event.get("event"):
            case "collected":
                self.planned = int(event["tests"])
                plural = "" if self.planned == 1 else "s"
                self._tell(News("collected", "", f"{self.planned} test{plural}"))
            case "report":
                self.directory = Path(event["directory"])
                self._follower = Follower(self.directory / "journal")
            case "wrong":
                self.wrong.append(id_)
                self._tell(News("error", id_, "cannot be collected"))
            case "begin":
                self.running[id_] = TestNow(id_, self._clock())
                self._tell(News("begin", id_, ""))
            case "part":
                self._part(id_, event)
            case "said":
                self._tell(News("note", "", str(event["text"])))
            case "progress":
                self._progress(event)
            case "end" if id_ in self.running:
                ended = self.running.pop(id_)
                self.outcomes[ended.outcome] += 1
                self._tell(News(ended.outcome, id_, f"{self._clock() - ended.since:.1f} s"))

    def _progress(self, event: Mapping[str, Any]) -> None:
        step, total, unit = str(event["step"]), event["total"], str(event["unit"])
        if event["finished"]:
            self.work.pop(step, None)
            return
        if step not in self.work:
            size = f" ({total / (1 << 20):.1f} MiB)" if total and unit == "bytes" else ""
            self._tell(News("image", "", f"{step}{size}"))
        self.work[step] = WorkNow(step, int(event["done"]), total, unit)

    def _part(self, id_: str, event: Mapping[str, Any]) -> None:
        outcome = outcome_of(event)
        if event.get("guest_test"):
            self._tell(News(outcome, f"{id_}::{event['guest_test']}", "in the guest"))
            return
        test = self.running.get(id_)
        if test is not None:
            test.outcome = min(test.outcome, outcome, key=_severity)

    def turn(self) -> None:
        """Look at what the journals tell of machines and phases."""
        if self._follower is None:
            return
        for journal, entry in self._follower.entries():
            key = (journal, int(entry.get("n") or 0))
            if entry.get("event") == "start":
                self._attempts[key] = f"{entry.get('suite')}::{entry.get('name')}"
            elif key in self._attempts:
                self._entry(self._attempts[key], entry)

    def _entry(self, id_: str, entry: Mapping[str, Any]) -> None:
        test = self.running.get(id_)
        match entry.get("event"):
            case "machine":
                self._machine(id_, test, entry["machine"])
            case "mark":
                self._mark(id_, test, str(entry["machine"]), entry["mark"])
            case "phase" if entry["phase"]["name"] not in _PYTEST_S:
                self._phase(id_, test, entry["phase"])
            case "fault":
                fault = entry["fault"]
                what = f"refused: {fault['refused']}" if fault.get("refused") else fault["machine"]
                self._tell(News("fault", id_, f"{fault['kind']}: {what}"))

    def _machine(self, id_: str, test: TestNow | None, facts: Mapping[str, Any]) -> None:
        machine = MachineNow(facts["name"], facts["hypervisor"], facts.get("image") or "")
        if test is not None:
            if machine.name in test.machines:
                return  # more is known of it now; it is no other one
            test.machines[machine.name] = machine
        self.machines += 1
        image = f", {machine.image}" if machine.image else ""
        self._tell(News("machine", id_, f"{machine.name} on {machine.hypervisor}{image}"))

    def _mark(self, id_: str, test: TestNow | None, machine: str, mark: Mapping[str, Any]) -> None:
        kind, seconds = mark["kind"], mark.get("duration_s")
        if test is not None and machine in test.machines:
            test.machines[machine].doing = kind
        self.boots += kind in _BOOTS
        took = f" {seconds:.1f} s" if seconds is not None else ""
        about = f": {mark['text']}" if mark.get("text") else ""
        self._tell(News("mark", id_, f"{machine} {kind}{took}{about}"))

    def _phase(self, id_: str, test: TestNow | None, phase: Mapping[str, Any]) -> None:
        if phase["outcome"] == "pending":
            if test is not None:
                test.phase = phase["name"]
            self._tell(News("phase", id_, f"{phase['name']} begins"))
            return
        if test is not None:
            test.phase = ""
        message = f" ({phase['message'].splitlines()[0]})" if phase.get("message") else ""
        took = "" if phase["outcome"] == "skip" else f" {phase.get('duration_s') or 0:.1f} s"
        self._tell(News("phase", id_, f"{phase['name']} {phase['outcome']}{took}{message}"))


def outcome_of(event: Mapping[str, Any]) -> str:
    """The outcome of a part of a test, by the report's names."""
    if event["outcome"] == "skipped":
        return "xfail" if event.get("xfail") else "skip"
    if event["outcome"] == "passed":
        return "pass"
    return "fail" if event.get("when") == "call" and not event.get("died") else "error"


def _severity(outcome: str) -> int:
    # Skipped as a whole beats the parts of pytest's around it, which pass.
    return ("error", "fail", "skip", "xfail", "pass").index(outcome)


class Follower:
    """Reads journals as they grow, whole lines only.

    Args:
        directory: Where they are; it may not be there yet.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}

    def entries(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What is new: the journal's name and the entry, in the order of each journal."""
        try:
            paths = sorted(self._directory.glob("*.jsonl"))
        except OSError:
            return
        for path in paths:
            yield from self._new(path)

    def _new(self, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
        while True:
            try:
                with path.open("rb") as file:
                    file.seek(self._read.get(path, 0))
                    data = piece = file.read(_MOST_READ)
                    while piece and b"\n" not in piece:
                        piece = file.read(_MOST_READ)
                        data += piece
            except OSError:
                return
            whole, newline, _ = data.rpartition(b"\n")
            if not newline:
                return
            self._read[path] = self._read.get(path, 0) + len(whole) + 1
            for line in whole.split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    # A line that was torn by a full disk; the report says so.
                    continue
                if isinstance(entry, dict):
                    yield path.stem, entry

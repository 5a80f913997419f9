"""The parts of a result: outcomes, checks, messages, metrics, phases, machines, faults, files.

Plain records, each journalled by itself as soon as it is known; `model.py` builds attempts, tests,
suites and runs of them. Within an attempt times are seconds since it began, by a monotonic clock;
what happened to a machine before the attempt has a negative one.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    StringConstraints,
)

from vmlab.report.escape import escape_surrogates

__all__ = [
    "PARTS",
    "Artifact",
    "Check",
    "Direction",
    "FaultRecord",
    "MachineRecord",
    "Mark",
    "Message",
    "Metric",
    "Moment",
    "Name",
    "Outcome",
    "Output",
    "Part",
    "Phase",
    "Record",
    "Seconds",
    "Severity",
    "Text",
    "describe",
    "describe_fault",
    "describe_machine",
    "describe_phase",
]


class Outcome(StrEnum):
    """How a check, an attempt, a test, a suite or a run ended.

    The outcome of a whole is its worst part's, in this order of precedence:

    1. `error`: the test could not do its work (a machine died, a fixture broke);
    2. `fail`: the test did its work and found a fault;
    3. `pending`: it was planned or begun and has not ended;
    4. `pass`;
    5. `xfail`: it failed as it was declared to; an unexpected success of such a test is a `fail`
       where the declaration is strict and a `pass` where it is not;
    6. `skip`: it did not run, for a stated reason.

    So one skipped test does not spoil a passed suite, and a suite that skipped everything has
    not passed: it is `skip`. The whole of nothing is `skip` too.
    """

    ERROR = "error"
    FAIL = "fail"
    PENDING = "pending"
    PASS = "pass"
    XFAIL = "xfail"
    SKIP = "skip"

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: neither a failure nor something that never ended."""
        return self not in (Outcome.ERROR, Outcome.FAIL, Outcome.PENDING)

    @staticmethod
    def worst(outcomes: Iterable[Outcome]) -> Outcome:
        """The outcome of a whole with these parts; `skip` where there are none."""
        return min(outcomes, key=_PRECEDENCE.__getitem__, default=Outcome.SKIP)


_PRECEDENCE: Final = {outcome: rank for rank, outcome in enumerate(Outcome)}


class Direction(StrEnum):
    """Which way a metric gets better."""

    LOWER = "lower"
    HIGHER = "higher"
    NONE = "none"


class Severity(StrEnum):
    """What a message is: the cause of an error or failure, a warning, or a remark."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


def _relative_path(path: str) -> str:
    parts = path.split("/")
    if PurePosixPath(path).is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise ValueError("must be relative to the report and stay beside it, as 'artifacts/x.log'")
    if "\\" in path or ":" in parts[0] or not path.isprintable():
        raise ValueError("must use '/' and have no drive, backslash or control character")
    return path


def _data(value: object) -> object:
    """`value` as JSON can hold it; what has no JSON form becomes the text that prints it."""
    match value:
        case enum.Enum():
            return _data(value.value)
        case None | bool():
            return value
        case float():
            return float(value) if math.isfinite(value) else str(value)
        case int():
            return int(value)
        case str() | bytes() | bytearray():
            return escape_surrogates(value)
        case Mapping():
            return {str(escape_surrogates(str(key))): _data(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_data(each) for each in value]
        case _:
            return escape_surrogates(str(value))


Text = Annotated[str, BeforeValidator(escape_surrogates)]
"""Text; bytes and undecodable characters are taken and written out as `\\xNN`."""

Name = Annotated[Text, StringConstraints(min_length=1)]
Moment = Annotated[AwareDatetime, AfterValidator(_utc)]
Seconds = Annotated[FiniteFloat, Field(ge=0)]
Offset = Annotated[
    FiniteFloat, Field(description="In seconds since the attempt began; negative for before.")
]
Data = Annotated[dict[str, JsonValue], BeforeValidator(_data)]
RelativePath = Annotated[Name, AfterValidator(_relative_path)]


class Record(BaseModel):
    """What travels: frozen, and strict about fields that it does not have."""

    # Built when it is first used: most commands that import this write no report.
    model_config = ConfigDict(
        defer_build=True,
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class Message(Record):
    """Something worth telling about an attempt or a run; `details` may hold a traceback."""

    text: Text
    severity: Severity = Severity.INFO
    details: Text = ""
    source: Text | None = Field(default=None, description="Where it comes from, as 'console'.")


class Check(Record):
    """One thing that a test verified. `expected` and `actual` are texts for people."""

    name: Name
    outcome: Outcome
    message: Text = ""
    expected: Text | None = None
    actual: Text | None = None


class Metric(Record):
    """One measured number; several of one name are samples of the same thing."""

    name: Name
    value: FiniteFloat
    unit: Text = Field(default="", description="As 's', 'bytes', '%'; empty for a plain count.")
    direction: Direction = Direction.NONE
    at_s: Seconds | None = Field(
        default=None, description="When it was measured, in seconds since the attempt began."
    )


class Artifact(Record):
    """A file that the run left as evidence."""

    name: Name
    path: RelativePath = Field(description="Relative to the report's directory, with '/'.")
    media_type: Name = "application/octet-stream"
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0, description="In bytes.")]


class Output(Record):
    """What was written to one stream ('stdout', 'stderr', 'console') during an attempt."""

    stream: Name
    text: Text
    omitted: Annotated[int, Field(ge=0, description="Characters left out of `text`.")] = 0


class Phase(Record):
    """One step of a test (boot, build, run); one that is pending was begun and has not ended."""

    name: Name
    outcome: Outcome
    started_s: Offset
    duration_s: Seconds | None = None
    message: Text = ""


class Mark(Record):
    """Something that happened to a machine: "boot", "panic", "fault", "snapshot", "stopped"."""

    at_s: Offset
    kind: Name = Field(description="One word or two; marks of one kind are drawn alike.")
    text: Text = ""
    duration_s: Seconds | None = Field(default=None, description="Null for a moment.")


class MachineRecord(Record):
    """A machine that an attempt used, and what happened to it, in order of time."""

    name: Name
    hypervisor: Name
    accelerator: Text = Field(default="", description="As 'kvm', 'tcg', 'jit'; empty: unknown.")
    architecture: Text = ""
    image: Text | None = None
    spec: Data = Field(default_factory=dict, description="What the machine was made from.")
    timeline: tuple[Mark, ...] = ()


class FaultRecord(Record):
    """A fault that was injected into a machine, or refused."""

    id: Name
    kind: Name
    machine: Name
    at_s: Offset
    cleared_s: FiniteFloat | None = Field(
        default=None, description="As at_s; null where it was not cleared, or does not last."
    )
    parameters: Data = Field(default_factory=dict)
    refused: Text = Field(default="", description="Why it was not injected; empty if it was.")


Part = Check | Metric | Message | Artifact | Output | Phase | MachineRecord | FaultRecord

PARTS: Final[Mapping[str, type[Part]]] = {
    "check": Check,
    "metric": Metric,
    "message": Message,
    "artifact": Artifact,
    "output": Output,
    "phase": Phase,
    "machine": MachineRecord,
    "fault": FaultRecord,
}
"""What an attempt is told of, by the name that journals and errors use."""


def describe(check: Check) -> str:
    """A check as one sentence: its message, and what was expected and found."""
    words = check.message or f"check {check.name!r}: {check.outcome.value}"
    if check.expected is not None or check.actual is not None:
        words += f" (expected {check.expected}, got {check.actual})"
    return words


def describe_phase(phase: Phase) -> str:
    """A phase in a line, as "build: fail, 1.50 s, exit status 2"."""
    spent = "" if phase.duration_s is None else f", {phase.duration_s:.2f} s"
    first_line = phase.message.strip().partition("\n")[0]
    why = f", {first_line}" if first_line else ""
    return f"{phase.name}: {phase.outcome.value}{spent}{why}"


def describe_machine(machine: MachineRecord) -> str:
    """A machine in a line, as "web: qemu, kvm, x86_64, debian-12"."""
    facts = (machine.hypervisor, machine.accelerator, machine.architecture, machine.image)
    return f"{machine.name}: {', '.join(fact for fact in facts if fact)}"


def describe_fault(fault: FaultRecord) -> str:
    """A fault in a line, as "cut: power-cut on web at 1.50 s, cleared at 2.00 s"."""
    if fault.refused:
        return f"{fault.id}: {fault.kind} on {fault.machine} refused: {fault.refused}"
    over = "" if fault.cleared_s is None else f", cleared at {fault.cleared_s:.2f} s"
    return f"{fault.id}: {fault.kind} on {fault.machine} at {fault.at_s:.2f} s{over}"

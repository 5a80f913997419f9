"""The result model: what a run of tests found, as data that cannot contradict itself.

Not a test runner and not a journal: `recorder.py` writes results as they happen, `journal.py`
reads them back into this model, the writers render it. A document names its version
(`vmlab.report/1`); fields may be added within a version, so a reader ignores those that it does
not know, while code that builds a record is told about a misspelt one.

Everything that can be computed (outcomes of tests, suites and runs, totals) is computed; a
document that states something else is refused. Times of day are UTC and may run backwards, as
host clocks do; durations come from a monotonic clock and never do.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ModelWrapValidatorHandler,
    StringConstraints,
    computed_field,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from vmlab.report.escape import escape_surrogates

__all__ = [
    "SCHEMA",
    "Artifact",
    "Attempt",
    "Check",
    "Direction",
    "Message",
    "Metric",
    "Outcome",
    "Output",
    "Run",
    "Severity",
    "Suite",
    "Test",
    "Totals",
    "schema",
]

SCHEMA: Final = "vmlab.report/1"
"""The name and version of the document format."""


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


Text = Annotated[str, BeforeValidator(escape_surrogates)]
"""Text; bytes and undecodable characters are taken and written out as `\\xNN`."""

Name = Annotated[Text, StringConstraints(min_length=1)]
Moment = Annotated[AwareDatetime, AfterValidator(_utc)]
Seconds = Annotated[FiniteFloat, Field(ge=0)]
RelativePath = Annotated[Name, AfterValidator(_relative_path)]


class _Record(BaseModel):
    # Built when it is first used: most commands that import this write no report.
    model_config = ConfigDict(
        defer_build=True,
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class _Computing(_Record):
    """A record with computed fields, which it takes back only if they are true."""

    @model_validator(mode="wrap")
    @classmethod
    def _verify_claims(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        computed = cls.model_computed_fields
        claimed = {key: value for key, value in data.items() if key in computed}
        record = handler({key: value for key, value in data.items() if key not in computed})
        if claimed:
            true = record.model_dump(mode="json", include=set(claimed))
            for key, value in claimed.items():
                stated = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
                if isinstance(stated, dict):  # a later vmlab may count more than this one
                    stated = {count: stated.get(count) for count in true[key]}
                if stated != true[key]:
                    raise ValueError(f"states {key} = {stated!r}, but its tests say {true[key]!r}")
        return record


class Message(_Record):
    """Something worth telling about an attempt or a run; `details` may hold a traceback."""

    text: Text
    severity: Severity = Severity.INFO
    details: Text = ""
    source: Text | None = Field(default=None, description="Where it comes from, as 'console'.")


class Check(_Record):
    """One thing that a test verified. `expected` and `actual` are texts for people."""

    name: Name
    outcome: Outcome
    message: Text = ""
    expected: Text | None = None
    actual: Text | None = None


class Metric(_Record):
    """One measured number; several of one name are samples of the same thing."""

    name: Name
    value: FiniteFloat
    unit: Text = Field(default="", description="As 's', 'bytes', '%'; empty for a plain count.")
    direction: Direction = Direction.NONE
    at_s: Seconds | None = Field(
        default=None, description="When it was measured, in seconds since the attempt began."
    )


class Artifact(_Record):
    """A file that the run left as evidence."""

    name: Name
    path: RelativePath = Field(description="Relative to the report's directory, with '/'.")
    media_type: Name = "application/octet-stream"
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0, description="In bytes.")]


class Output(_Record):
    """What was written to one stream ('stdout', 'stderr', 'console') during an attempt."""

    stream: Name
    text: Text
    omitted: Annotated[int, Field(ge=0, description="Characters left out of `text`.")] = 0


class Attempt(_Record):
    """One execution of a test. A pending one was begun and has not ended, or its runner died."""

    outcome: Outcome
    started: Moment | None = None
    finished: Moment | None = None
    duration_s: Seconds | None = None
    worker: Text | None = Field(default=None, description="The worker process that ran it.")
    skip_reason: Text | None = None
    checks: tuple[Check, ...] = ()
    messages: tuple[Message, ...] = ()
    metrics: tuple[Metric, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    output: tuple[Output, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.outcome is Outcome.SKIP and not self.skip_reason:
            raise ValueError("a skipped test needs a skip_reason")
        if self.outcome is not Outcome.SKIP and self.skip_reason is not None:
            raise ValueError(f"has a skip_reason, but its outcome is {self.outcome.value!r}")
        if self.outcome is Outcome.PENDING and (self.finished or self.duration_s is not None):
            raise ValueError("is pending, but has a finish time or a duration")
        if self.outcome is Outcome.PASS:
            for check in self.checks:
                if not check.outcome.ok:
                    raise ValueError(
                        f"passed, but its check {check.name!r} is {check.outcome.value!r}"
                    )
        return self

    @property
    def reason(self) -> str:
        """Why it ended as it did, in a line or so; empty where there is nothing to say."""
        if self.skip_reason is not None:
            return self.skip_reason
        for message in self.messages:
            if message.severity is Severity.ERROR:
                return message.text
        wrong = next((describe(c) for c in self.checks if not c.outcome.ok), "")
        if self.outcome is Outcome.PENDING:
            return f"begun, never finished; {wrong}" if wrong else "begun, never finished"
        return wrong


def describe(check: Check) -> str:
    """A check as one sentence: its message, and what was expected and found."""
    words = check.message or f"check {check.name!r}: {check.outcome.value}"
    if check.expected is not None or check.actual is not None:
        words += f" (expected {check.expected}, got {check.actual})"
    return words


class Test(_Computing):
    """A test and every attempt at it, first to last; one never begun has no attempts.

    It is identified by suite, name and hypervisor, so that the same test run on several
    hypervisors is several tests. Its outcome is the last attempt's.
    """

    __test__: ClassVar[bool] = False  # not a class of tests, whatever pytest thinks of its name

    suite: Name
    name: Name
    hypervisor: Name | None = Field(default=None, description="The back end that it ran on.")
    labels: dict[Text, Text] = Field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()

    @computed_field(description="The last attempt's outcome; pending where there is none.")  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def outcome(self) -> Outcome:
        """The last attempt's outcome; pending where there is none."""
        return self.attempts[-1].outcome if self.attempts else Outcome.PENDING

    @property
    def id(self) -> str:
        """`suite::name`, with the hypervisor in brackets unless the name says it already."""
        return f"{self.suite}::{self.title}"

    @property
    def title(self) -> str:
        """The name, with the hypervisor in brackets unless the name ends with it already."""
        tag = f"[{self.hypervisor}]"
        return self.name if self.hypervisor is None or self.name.endswith(tag) else self.name + tag

    @property
    def last(self) -> Attempt | None:
        """The attempt that counts; None where the test was never begun."""
        return self.attempts[-1] if self.attempts else None

    @property
    def flaky(self) -> bool:
        """Whether attempts at it ended differently."""
        return len({attempt.outcome for attempt in self.attempts}) > 1

    @property
    def duration_s(self) -> float | None:
        """Seconds spent in all attempts that ended; None where none did."""
        known = [attempt.duration_s for attempt in self.attempts if attempt.duration_s is not None]
        return sum(known) if known else None

    @property
    def reason(self) -> str:
        """Why it ended as it did; empty where there is nothing to say."""
        if self.last is None:
            return "planned, never begun"
        return self.last.reason

    @property
    def skip_reason(self) -> str | None:
        """Why it was skipped; None where it was not."""
        return self.last.skip_reason if self.last else None

    @property
    def checks(self) -> tuple[Check, ...]:
        """The last attempt's checks."""
        return self.last.checks if self.last else ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The last attempt's messages."""
        return self.last.messages if self.last else ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The last attempt's metrics."""
        return self.last.metrics if self.last else ()

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts of all attempts."""
        return tuple(artifact for attempt in self.attempts for artifact in attempt.artifacts)

    @property
    def output(self) -> tuple[Output, ...]:
        """The last attempt's captured output."""
        return self.last.output if self.last else ()


class Totals(_Record):
    """How many tests ended how."""

    tests: int
    passed: int = Field(alias="pass")
    failed: int = Field(alias="fail")
    errors: int = Field(alias="error")
    skipped: int = Field(alias="skip")
    xfailed: int = Field(alias="xfail")
    pending: int

    @classmethod
    def of(cls, tests: Iterable[Test]) -> Self:
        """Count `tests` by outcome."""
        counted = Counter(test.outcome for test in tests)
        return cls(
            tests=counted.total(),
            passed=counted[Outcome.PASS],
            failed=counted[Outcome.FAIL],
            errors=counted[Outcome.ERROR],
            skipped=counted[Outcome.SKIP],
            xfailed=counted[Outcome.XFAIL],
            pending=counted[Outcome.PENDING],
        )

    def __getitem__(self, outcome: Outcome) -> int:
        return {
            Outcome.PASS: self.passed,
            Outcome.FAIL: self.failed,
            Outcome.ERROR: self.errors,
            Outcome.SKIP: self.skipped,
            Outcome.XFAIL: self.xfailed,
            Outcome.PENDING: self.pending,
        }[outcome]


class Suite(_Computing):
    """Tests that belong together, in the order in which they were planned or begun."""

    name: Name
    labels: dict[Text, Text] = Field(default_factory=dict)
    tests: tuple[Test, ...] = ()

    @model_validator(mode="after")
    def _owns_its_tests(self) -> Self:
        seen: set[tuple[str, str | None]] = set()
        for test in self.tests:
            if test.suite != self.name:
                raise ValueError(
                    f"suite {self.name!r} holds test {test.name!r} of suite {test.suite!r}"
                )
            if (test.name, test.hypervisor) in seen:
                raise ValueError(
                    f"suite {self.name!r} has {test.title!r} twice: "
                    "a test that ran again has several attempts"
                )
            seen.add((test.name, test.hypervisor))
        return self

    @computed_field(description="Computed from the tests.")  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def totals(self) -> Totals:
        """How many of its tests ended how."""
        return Totals.of(self.tests)

    @computed_field(description="The worst of its tests' outcomes.")  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def outcome(self) -> Outcome:
        """The worst of its tests' outcomes; `skip` where it has none."""
        return Outcome.worst(test.outcome for test in self.tests)

    @property
    def duration_s(self) -> float:
        """Seconds spent in its tests; with parallel workers more than passed on the clock."""
        return sum(test.duration_s or 0.0 for test in self.tests)

    @property
    def started(self) -> datetime | None:
        """When its first attempt began, as far as the host's clock knew; None without any."""
        return min(
            (
                attempt.started
                for test in self.tests
                for attempt in test.attempts
                if attempt.started is not None
            ),
            default=None,
        )


class Run(_Computing):
    """One run of a tool over its suites: the whole document."""

    schema_: Literal["vmlab.report/1"] = Field(
        default=SCHEMA, alias="schema", description="Name and version of this format."
    )
    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    tool: Name = Field(description="What ran, as 'vmlab conformance'.")
    version: Name = Field(description="The tool's version.")
    started: Moment
    finished: Moment | None = Field(default=None, description="Null while it runs or if it died.")
    duration_s: Seconds | None = None
    seed: int | None = Field(default=None, description="All of the run's randomness comes from it.")
    command: tuple[Text, ...] = Field(default=(), description="The arguments that run it again.")
    environment: dict[Text, Text | int | FiniteFloat | bool | None] = Field(
        default_factory=dict, description="Facts about the host."
    )
    labels: dict[Text, Text] = Field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    suites: tuple[Suite, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        twice = [name for name, n in Counter(suite.name for suite in self.suites).items() if n > 1]
        if twice:
            raise ValueError(f"has more than one suite named {twice[0]!r}")
        if self.finished is None and self.duration_s is not None:
            raise ValueError("has a duration, but never finished")
        return self

    @computed_field(description="Computed from the tests.")  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def totals(self) -> Totals:
        """How many of its tests ended how."""
        return Totals.of(self.tests())

    @computed_field(description="The worst outcome; at best pending while unfinished.")  # type: ignore[prop-decorator]  # mypy has no decorated properties
    @property
    def outcome(self) -> Outcome:
        """The worst of its tests' outcomes; a run that did not finish has not passed."""
        outcomes = [test.outcome for test in self.tests()]
        if self.finished is None:
            outcomes.append(Outcome.PENDING)
        return Outcome.worst(outcomes)

    @property
    def command_line(self) -> str:
        """The command that runs it again, quoted for a POSIX shell; empty if it is not known."""
        return shlex.join(self.command)

    def tests(self) -> Iterator[Test]:
        """Every test of every suite, in order."""
        for suite in self.suites:
            yield from suite.tests

    def test(self, suite: str, name: str, hypervisor: str | None = None) -> Test:
        """The test of that name; without `hypervisor`, the only or first one.

        Raises:
            KeyError: There is none.
        """
        for test in self.tests():
            if (test.suite, test.name) == (suite, name) and hypervisor in (None, test.hypervisor):
                return test
        raise KeyError((suite, name, hypervisor))


class _Schema(GenerateJsonSchema):
    """JSON Schema that allows later fields: within a version the format may grow."""

    def generate(
        self, schema: Any, mode: Literal["validation", "serialization"] = "validation"
    ) -> dict[str, Any]:
        generated = super().generate(schema, mode)
        for part in (generated, *generated["$defs"].values()):
            if part.get("additionalProperties") is False:
                del part["additionalProperties"]
        return generated


def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of a report, generated from the model."""
    generated = Run.model_json_schema(mode="serialization", schema_generator=_Schema)
    generated.pop("title", None)
    return {
        "$schema": _Schema.schema_dialect,
        "$id": "urn:vmlab:report:1",
        "title": SCHEMA,
        **generated,
    }

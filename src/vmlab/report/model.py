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
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    ModelWrapValidatorHandler,
    StringConstraints,
    computed_field,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from vmlab.report.parts import (
    Artifact,
    Check,
    Direction,
    FaultRecord,
    MachineRecord,
    Mark,
    Message,
    Metric,
    Moment,
    Name,
    Outcome,
    Output,
    Phase,
    Record,
    Seconds,
    Severity,
    Text,
    describe,
)

__all__ = [
    "SCHEMA",
    "Artifact",
    "Attempt",
    "Check",
    "Direction",
    "FaultRecord",
    "MachineRecord",
    "Mark",
    "Message",
    "Metric",
    "Outcome",
    "Output",
    "Phase",
    "Run",
    "Severity",
    "Suite",
    "Test",
    "Totals",
    "describe",
    "schema",
]

SCHEMA: Final = "vmlab.report/1"
"""The name and version of the document format."""


class _Computing(Record):
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


class Attempt(Record):
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
    phases: tuple[Phase, ...] = ()
    machines: tuple[MachineRecord, ...] = ()
    faults: tuple[FaultRecord, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        names = [machine.name for machine in self.machines]
        twice = [name for name, n in Counter(names).items() if n > 1]
        if twice:
            raise ValueError(f"has more than one machine named {twice[0]!r}")
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

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The last attempt's phases."""
        return self.last.phases if self.last else ()

    @property
    def machines(self) -> tuple[MachineRecord, ...]:
        """The last attempt's machines."""
        return self.last.machines if self.last else ()

    @property
    def faults(self) -> tuple[FaultRecord, ...]:
        """The faults of the last attempt, injected and refused."""
        return self.last.faults if self.last else ()


class Totals(Record):
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

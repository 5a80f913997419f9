"""What is different between two runs: outcomes, tests that appeared or vanished, metrics.

Tests are the same if suite, name and hypervisor are. Metrics are compared over the samples of all
tests of one hypervisor, those of a run as they are: within one run they say how much the run's own
samples differ, not how much another run would (`baseline.py` compares several runs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmlab.report.comparison import TOLERANCE, Comparison, Verdict, compare
from vmlab.report.model import Outcome, Run, Test
from vmlab.report.parts import Direction

__all__ = [
    "Difference",
    "MetricChange",
    "MetricKey",
    "TestChange",
    "difference",
    "measured",
    "samples_of",
]


@dataclass(frozen=True, order=True)
class MetricKey:
    """What was measured; `hypervisor` is empty where the tests named none."""

    name: str
    unit: str
    hypervisor: str

    def __str__(self) -> str:
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.name}{unit} on {self.hypervisor}" if self.hypervisor else self.name + unit


@dataclass(frozen=True)
class TestChange:
    """A test whose outcome changed; None is that it was not there."""

    __test__ = False  # not a class of tests, whatever pytest thinks of its name

    id: str
    before: Outcome | None
    after: Outcome | None
    reason: str = ""

    @property
    def worse(self) -> bool:
        """Whether it is a loss: something was ok and is not, or is new and not ok."""
        if self.after is None:
            return self.before is None or self.before.ok
        return not self.after.ok and (self.before is None or self.before.ok)


@dataclass(frozen=True)
class MetricChange:
    """A metric of both sides, and how its samples compare."""

    metric: MetricKey
    comparison: Comparison

    @property
    def moved(self) -> bool:
        """Whether it changed for certain, or seems to by more than does not matter."""
        found = self.comparison
        if found.verdict is not Verdict.CANNOT_TELL:
            return found.verdict is not Verdict.SAME
        before = found.medians[0]
        if before is None or found.shift is None:
            return False
        return abs(found.shift) > TOLERANCE * abs(before)


@dataclass(frozen=True)
class Difference:
    """What is different in the second run."""

    changed: tuple[TestChange, ...]
    appeared: tuple[TestChange, ...]
    vanished: tuple[TestChange, ...]
    metrics: tuple[MetricChange, ...]
    unchanged: int
    """How many tests ended as they had."""

    @property
    def worse(self) -> bool:
        """Whether a test was lost, or a metric got worse for certain."""
        tests = (*self.changed, *self.appeared, *self.vanished)
        return any(test.worse for test in tests) or any(
            metric.comparison.verdict is Verdict.WORSE for metric in self.metrics
        )

    @property
    def moved(self) -> tuple[MetricChange, ...]:
        """The metrics that changed, and those that seem to and cannot be told."""
        return tuple(metric for metric in self.metrics if metric.moved)


def samples_of(run: Run) -> dict[MetricKey, list[float]]:
    """All samples of a run, of each test's last attempt, in order."""
    found: dict[MetricKey, list[float]] = {}
    for key, _, value in measured(run):
        found.setdefault(key, []).append(value)
    return found


def directions_of(run: Run) -> dict[MetricKey, Direction]:
    """Which way each metric of a run gets better."""
    return {key: direction for key, direction, _ in measured(run)}


def measured(run: Run) -> Iterator[tuple[MetricKey, Direction, float]]:
    """Every sample of a run: what was measured, which way that gets better, and the value."""
    for test in run.tests():
        for metric in test.metrics:
            key = MetricKey(metric.name, metric.unit, test.hypervisor or "")
            yield key, metric.direction, metric.value


def difference(before: Run, after: Run) -> Difference:
    """Compare the second run with the first."""
    old, new = _by_identity(before), _by_identity(after)
    changed, appeared, unchanged = [], [], 0
    for identity, test in new.items():
        was = old.get(identity)
        if was is None:
            appeared.append(TestChange(test.id, None, test.outcome, test.reason))
        elif was.outcome is test.outcome:
            unchanged += 1
        else:
            changed.append(TestChange(test.id, was.outcome, test.outcome, test.reason))
    vanished = [
        TestChange(test.id, test.outcome, None)
        for identity, test in old.items()
        if identity not in new
    ]
    then, now, directions = samples_of(before), samples_of(after), directions_of(after)
    metrics = [
        MetricChange(key, compare(then[key], now[key], direction=directions[key]))
        for key in now
        if key in then
    ]
    return Difference(tuple(changed), tuple(appeared), tuple(vanished), tuple(metrics), unchanged)


def _by_identity(run: Run) -> dict[tuple[str, str, str | None], Test]:
    return {(test.suite, test.name, test.hypervisor): test for test in run.tests()}

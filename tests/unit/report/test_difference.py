"""Two runs against each other: outcomes, tests that came and went, metrics."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from vmlab.report import Attempt, Direction, Metric, Outcome, Run, Suite, Test
from vmlab.report.comparison import Verdict, compare
from vmlab.report.difference import MetricChange, MetricKey, TestChange, difference, samples_of


def _run(*tests: Test) -> Run:
    suites = [Suite(name="s", tests=tests)]
    return Run(
        id="r", tool="t", version="1", started=datetime(2026, 1, 1, tzinfo=UTC), suites=suites
    )


def _test(name: str, outcome: str, hypervisor: str | None = None, **more: object) -> Test:
    reason = {"skip_reason": "so"} if outcome == "skip" else {}
    attempt = Attempt(outcome=outcome, **reason, **more)
    return Test(suite="s", name=name, hypervisor=hypervisor, attempts=[attempt])


def _measured(values: list[float], direction: Direction = Direction.LOWER) -> Run:
    metrics = [Metric(name="boot", value=v, unit="s", direction=direction) for v in values]
    return _run(_test("t", "pass", "qemu", metrics=metrics))


def test_a_run_does_not_differ_from_itself(run: Run) -> None:
    found = difference(run, run)
    assert (found.changed, found.appeared, found.vanished) == ((), (), ())
    assert found.unchanged == 8
    assert not found.worse


def test_what_changed_what_is_new_and_what_is_gone() -> None:
    before = _run(_test("a", "pass"), _test("b", "fail"), _test("c", "skip"), _test("d", "pass"))
    after = _run(_test("a", "fail"), _test("b", "pass"), _test("d", "pass"), _test("e", "pass"))
    found = difference(before, after)
    assert [(c.id, c.before, c.after) for c in found.changed] == [
        ("s::a", "pass", "fail"),
        ("s::b", "fail", "pass"),
    ]
    assert [c.id for c in found.appeared] == ["s::e"]
    assert [c.id for c in found.vanished] == ["s::c"]
    assert found.unchanged == 1


def test_the_same_test_on_another_hypervisor_is_another_test() -> None:
    found = difference(_run(_test("a", "pass", "qemu")), _run(_test("a", "pass", "embedded")))
    assert [c.id for c in found.appeared] == ["s::a[embedded]"]
    assert [c.id for c in found.vanished] == ["s::a[qemu]"]


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        ("pass", "fail", True),
        ("pass", "pending", True),
        ("skip", "error", True),
        ("pass", None, True),
        ("fail", None, False),
        (None, "fail", True),
        (None, "pass", False),
        ("fail", "error", False),
        ("fail", "pass", False),
    ],
)
def test_a_loss_is_what_was_ok_and_is_not(
    before: str | None, after: str | None, worse: bool
) -> None:
    change = TestChange("t", before and Outcome(before), after and Outcome(after))
    assert change.worse is worse
    old = _run(*([_test("t", before)] if before else []))
    new = _run(*([_test("t", after)] if after else []))
    assert difference(old, new).worse is worse


def test_metrics_are_compared_as_they_get_better() -> None:
    fast, slow = [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]
    found = difference(_measured(fast), _measured(slow))
    (metric,) = found.moved
    assert metric.metric == MetricKey("boot", "s", "qemu")
    assert str(metric.metric) == "boot (s) on qemu"
    assert metric.comparison.verdict is Verdict.WORSE
    assert found.worse
    higher = difference(_measured(fast, Direction.HIGHER), _measured(slow, Direction.HIGHER))
    assert higher.moved[0].comparison.verdict is Verdict.BETTER
    assert not higher.worse
    steady = [10 + n / 100 for n in range(12)]
    assert difference(_measured(steady), _measured(steady)).moved == ()
    assert difference(_measured(fast), _run()).metrics == ()


@pytest.mark.parametrize(("after", "moved"), [([1.0], False), ([1.04], False), ([1.2], True)])
def test_what_cannot_be_told_is_told_where_it_seems_to_have_moved(
    after: list[float], moved: bool
) -> None:
    found = difference(_measured([1.0]), _measured(after))
    assert found.metrics[0].comparison.verdict is Verdict.CANNOT_TELL
    assert (found.moved != ()) is moved


def test_samples_are_those_of_last_attempts() -> None:
    def attempt(value: float) -> Attempt:
        return Attempt(outcome="pass", metrics=[Metric(name="m", value=value)])

    test = Test(suite="s", name="t", attempts=[attempt(1), attempt(2)])
    assert samples_of(_run(test)) == {MetricKey("m", "", ""): [2]}
    assert str(MetricKey("m", "", "")) == "m"


def test_a_metric_without_samples_has_not_moved() -> None:
    assert not MetricChange(MetricKey("m", "", ""), compare([], [1.0])).moved

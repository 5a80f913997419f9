"""The result model: what it computes, and what it refuses to believe."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import ValidationError

from vmlab.machine.errors import VmlabError
from vmlab.report import (
    Artifact,
    Attempt,
    Check,
    Message,
    Metric,
    Outcome,
    Run,
    Suite,
    Test,
    Totals,
    parse,
)
from vmlab.report.json_report import render

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def _run(*outcomes: str, finished: datetime | None = NOW) -> Run:
    tests = [
        Test(
            suite="s",
            name=f"t{number}",
            attempts=[
                Attempt(outcome=outcome, skip_reason="because" if outcome == "skip" else None)
            ],
        )
        for number, outcome in enumerate(outcomes)
    ]
    suites = [Suite(name="s", tests=tests)]
    return Run(id="r", tool="t", version="1", started=NOW, finished=finished, suites=suites)


def test_outcomes_take_precedence_in_the_documented_order() -> None:
    order = ["error", "fail", "pending", "pass", "xfail", "skip"]
    for (worse_rank, worse), (better_rank, better) in itertools.product(enumerate(order), repeat=2):
        expected = order[min(worse_rank, better_rank)]
        assert Outcome.worst([Outcome(worse), Outcome(better)]) == expected
    assert Outcome.worst([]) is Outcome.SKIP


def test_what_did_not_end_is_not_ok() -> None:
    assert {outcome for outcome in Outcome if not outcome.ok} == {"error", "fail", "pending"}


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["pass", "skip"], "pass"),
        (["skip", "skip"], "skip"),
        (["pass", "xfail"], "pass"),
        (["pass", "pending"], "pending"),
        (["fail", "pending"], "fail"),
        (["fail", "error", "pass"], "error"),
        ([], "skip"),
    ],
)
def test_a_run_is_as_good_as_its_worst_test(outcomes: list[str], expected: str) -> None:
    assert _run(*outcomes).outcome == expected
    assert _run(*outcomes).suites[0].outcome == expected


def test_a_run_that_did_not_finish_has_not_passed() -> None:
    assert _run("pass", finished=None).outcome is Outcome.PENDING
    assert _run("fail", finished=None).outcome is Outcome.FAIL


def test_totals_count_every_outcome_once(run: Run) -> None:
    assert run.totals == Totals(
        tests=8, passed=2, failed=2, errors=1, skipped=1, xfailed=1, pending=1
    )
    assert sum(run.totals[outcome] for outcome in Outcome) == run.totals.tests
    assert [suite.totals.tests for suite in run.suites] == [4, 4]


@pytest.mark.parametrize("count", ["tests", "pass", "fail", "error", "skip", "xfail", "pending"])
@pytest.mark.parametrize("where", ["run", "suite"])
def test_a_document_whose_totals_disagree_is_refused(run: Run, where: str, count: str) -> None:
    document = json.loads(render(run))
    holder = document if where == "run" else document["suites"][1]
    holder["totals"][count] += 1
    with pytest.raises(VmlabError, match="states totals") as refused:
        parse(json.dumps(document))
    assert "do not trust" in str(refused.value.hint)


@pytest.mark.parametrize("path", [[], ["suites", 0], ["suites", 0, "tests", 0]])
def test_a_document_whose_outcome_disagrees_is_refused(run: Run, path: list[str | int]) -> None:
    document = json.loads(render(run))
    holder = document
    for step in path:
        holder = holder[step]
    holder["outcome"] = "xfail"
    with pytest.raises(VmlabError, match="states outcome = 'xfail'"):
        parse(json.dumps(document))


def test_totals_without_a_count_disagree_and_totals_with_a_later_count_do_not(run: Run) -> None:
    document = json.loads(render(run))
    document["totals"]["flaky"] = 1
    assert parse(json.dumps(document)).totals == run.totals
    del document["totals"]["fail"]
    with pytest.raises(VmlabError, match="states totals"):
        parse(json.dumps(document))


def test_true_totals_are_taken_as_records_too(run: Run) -> None:
    facts = dict(run)
    assert Run(**facts, totals=run.totals, outcome=run.outcome) == run
    with pytest.raises(ValidationError, match="states totals"):
        Run(**facts, totals=_run("pass").totals)


def test_a_record_is_itself_when_validated_again(run: Run) -> None:
    assert Run.model_validate(run) is run


def test_a_tests_outcome_is_its_last_attempts(run: Run) -> None:
    flaky = run.test("other", "test_flaky")
    assert (flaky.outcome, flaky.flaky, flaky.duration_s) == (Outcome.PASS, True, 2)
    assert not run.test("lifecycle", "test_boot").flaky
    never = run.test("lifecycle", "test_never_begun")
    assert (never.outcome, never.reason, never.duration_s) == (
        Outcome.PENDING,
        "planned, never begun",
        None,
    )
    assert (never.checks, never.messages, never.metrics, never.output) == ((), (), (), ())
    assert (never.artifacts, never.skip_reason, never.last) == ((), None, None)


def test_a_test_shows_what_its_last_attempt_found(run: Run) -> None:
    boot = run.test("lifecycle", "test_boot")
    assert boot.last is not None
    assert boot.metrics[0].name == "boot_s"
    assert boot.checks == boot.last.checks
    assert [message.text for message in boot.messages] == ["warm", "quiet"]
    assert [output.stream for output in boot.output] == ["stdout", "stderr"]
    assert [artifact.name for artifact in boot.artifacts] == ["console.log"]
    assert run.test("other", "test_gpu").skip_reason == "no GPU here"


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (Attempt(outcome="pass"), ""),
        (Attempt(outcome="pending"), "begun, never finished"),
        (Attempt(outcome="skip", skip_reason="no KVM"), "no KVM"),
        (
            Attempt(
                outcome="fail",
                checks=[
                    Check(name="a", outcome="pass"),
                    Check(name="b", outcome="fail", message="b is wrong", expected="1"),
                ],
            ),
            "b is wrong (expected 1, got None)",
        ),
        (Attempt(outcome="fail", checks=[Check(name="b", outcome="error")]), "check 'b': error"),
        (
            Attempt(
                outcome="error",
                messages=[Message(text="by the way"), Message(text="it died", severity="error")],
                checks=[Check(name="b", outcome="fail")],
            ),
            "it died",
        ),
    ],
)
def test_the_reason_is_the_most_telling_line(attempt: Attempt, reason: str) -> None:
    assert attempt.reason == reason


def test_the_same_test_on_two_hypervisors_is_two_tests() -> None:
    tests = [Test(suite="s", name="t", hypervisor=name) for name in ("qemu", "simulated")]
    suite = Suite(name="s", tests=tests)
    assert [test.id for test in suite.tests] == ["s::t[qemu]", "s::t[simulated]"]
    assert Test(suite="s", name="t[qemu]", hypervisor="qemu").id == "s::t[qemu]"
    assert Test(suite="s", name="t").id == "s::t"
    run = Run(id="r", tool="t", version="1", started=NOW, suites=[suite])
    assert run.test("s", "t", "simulated").hypervisor == "simulated"
    assert run.test("s", "t").hypervisor == "qemu"
    with pytest.raises(KeyError):
        run.test("s", "t", "xen")


def test_contradictions_are_refused() -> None:
    failing = Check(name="c", outcome="fail")
    for facts, problem in [
        ({"outcome": "skip"}, "needs a skip_reason"),
        ({"outcome": "skip", "skip_reason": ""}, "needs a skip_reason"),
        ({"outcome": "fail", "skip_reason": "x"}, "its outcome is 'fail'"),
        ({"outcome": "pending", "finished": NOW}, "is pending, but"),
        ({"outcome": "pending", "duration_s": 0}, "is pending, but"),
        ({"outcome": "pass", "checks": [failing]}, "its check 'c' is 'fail'"),
    ]:
        with pytest.raises(ValidationError, match=problem):
            Attempt(**facts)
    with pytest.raises(ValidationError, match="of suite 'other'"):
        Suite(name="s", tests=[Test(suite="other", name="t")])
    with pytest.raises(ValidationError, match="several attempts"):
        Suite(name="s", tests=[Test(suite="s", name="t"), Test(suite="s", name="t")])
    for facts, problem in [
        ({"suites": [Suite(name="s"), Suite(name="s")]}, "more than one suite named 's'"),
        ({"duration_s": 1}, "never finished"),
        ({"id": "../x"}, "pattern"),
        ({"started": datetime(2026, 1, 1)}, "timezone"),  # the point of it
        ({"sead": 1}, "Extra inputs"),
    ]:
        with pytest.raises(ValidationError, match=problem):
            Run(**{"id": "r", "tool": "t", "version": "1", "started": NOW, **facts})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "fast"])
def test_a_metric_is_a_finite_number(value: object) -> None:
    with pytest.raises(ValidationError):
        Metric(name="m", value=value)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "", "a\\b", "c:/x", "a\nb", "a/"]
)
def test_an_artifact_stays_beside_its_report(path: str) -> None:
    with pytest.raises(ValidationError):
        Artifact(name="x", path=path, sha256="0" * 64, size=0)


def test_an_artifact_may_lie_in_a_directory() -> None:
    assert Artifact(name="x", path="a b/ü.log", sha256="0" * 64, size=0).path == "a b/ü.log"


def test_times_are_kept_in_utc_and_may_run_backwards() -> None:
    east = timezone(timedelta(hours=5))
    attempt = Attempt(
        outcome="pass",
        started=datetime(2026, 1, 1, 6, tzinfo=east),
        finished=datetime(2026, 1, 1, 0, tzinfo=UTC),
        duration_s=3,
    )
    assert attempt.started == datetime(2026, 1, 1, 1, tzinfo=UTC)
    assert attempt.started.tzinfo is UTC
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Attempt(outcome="pass", duration_s=-1)


def test_bytes_and_undecodable_characters_are_written_out() -> None:
    assert Message(text=b"caf\xc3\xa9 \xff").text == "café \\xff"
    assert Message(text="smuggled \udcff, lone \ud800").text == "smuggled \\xff, lone \\ud800"


def test_a_suite_begins_with_its_first_attempt(run: Run) -> None:
    assert run.suites[0].started == datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
    assert Suite(name="s").started is None


def test_the_command_is_quoted_for_a_shell(run: Run) -> None:
    assert run.command_line == "vmlab conformance qemu --seed 'it'\"'\"'s'"

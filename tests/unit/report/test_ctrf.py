"""CTRF: valid under its published schema, and nothing lost on the way."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from vmlab.report import Run, ctrf


def _document(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(ctrf.render(run))
    return document


def _test(run: Run, name: str) -> dict[str, Any]:
    (found,) = [t for t in _document(run)["results"]["tests"] if t["name"] == name]
    return found  # type: ignore[no-any-return]  # JSON


def test_it_is_valid_under_the_published_schema(
    run: Run, run_with_machines: Run, ctrf_schema: jsonschema.protocols.Validator
) -> None:
    for each in (run, run_with_machines, Run(id="r", tool="t", version="1", started=run.started)):
        ctrf_schema.validate(_document(each))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["results", "tests", 0, "status"], "green"),
        (["results", "summary", "tests"], 1.5),
        (["results", "weather"], "fine"),
        (["reportId"], "run 1"),
    ],
)
def test_the_schema_refuses_what_is_wrong(
    run: Run, ctrf_schema: jsonschema.protocols.Validator, path: list[Any], value: object
) -> None:
    document = _document(run)
    holder: Any = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    assert not ctrf_schema.is_valid(document)


def test_its_sums_are_those_of_its_tests(run: Run) -> None:
    results = _document(run)["results"]
    summary = results["summary"]
    statuses = [test["status"] for test in results["tests"]]
    for status in ("passed", "failed", "skipped", "pending", "other"):
        assert summary[status] == statuses.count(status)
    assert (summary["tests"], summary["suites"]) == (8, 2)
    assert summary["flaky"] == sum(test["flaky"] for test in results["tests"]) == 2
    assert (summary["stop"] - summary["start"], summary["duration"]) == (7000, 7000)


def test_each_outcome_has_a_status_and_keeps_its_own_name(run: Run) -> None:
    statuses = {
        t["name"]: (t["status"], t["rawStatus"]) for t in _document(run)["results"]["tests"]
    }
    assert statuses == {
        "test_boot[qemu]": ("passed", "pass"),
        "test_pause": ("failed", "fail"),
        "test_fork": ("failed", "error"),
        "test_never_begun": ("pending", "pending"),
        "test_gpu": ("skipped", "skip"),
        "test_known_bug": ("other", "xfail"),
        "test_flaky": ("passed", "pass"),
        "test_broken_twice": ("failed", "fail"),
    }


def test_a_test_says_what_it_found(run: Run) -> None:
    booted = _test(run, "test_boot[qemu]")
    assert (booted["duration"], booted["stop"] - booted["start"]) == (1500, 1500)
    assert (booted["stdout"], booted["stderr"]) == (["out"], ["err"])
    assert booted["steps"][0]["name"] == "exists"
    assert booted["attachments"][0]["path"] == "artifacts/console.log"
    assert booted["labels"] == {"image": "debian"}
    assert booted["extra"]["metrics"][0]["value"] == 1.25
    assert _test(run, "test_fork")["trace"].startswith("Traceback")
    assert "kernel panic" in _test(run, "test_fork")["message"]
    assert _test(run, "test_gpu")["message"] == "no GPU here"


def test_attempts_are_all_there(run: Run) -> None:
    flaky = _test(run, "test_flaky")
    assert (flaky["retries"], flaky["flaky"]) == (2, True)
    assert [
        (attempt["attempt"], attempt["status"], attempt["extra"]["rawStatus"])
        for attempt in flaky["retryAttempts"]
    ] == [(1, "failed", "fail"), (2, "pending", "pending"), (3, "passed", "pass")]


def test_machines_phases_and_faults_are_told(run_with_machines: Run) -> None:
    panicked = _test(run_with_machines, "test_panic[qemu]")
    assert [(step["name"], step["status"]) for step in panicked["steps"]] == [
        ("boot", "passed"),
        ("build", "failed"),
    ]
    (machine,) = panicked["extra"]["machines"]
    assert (machine["name"], machine["timeline"][2]["kind"]) == ("web", "panic")
    assert [fault["refused"] for fault in panicked["extra"]["faults"]] == ["", "it cannot", ""]
    assert "insmod: <script>alert(1)</script>" in "\n".join(panicked["stdout"])


def test_a_run_that_died_stops_where_it_was_last_heard_of(run: Run) -> None:
    died = run.model_copy(update={"finished": None, "duration_s": None})
    summary = _document(died)["results"]["summary"]
    assert summary["stop"] - summary["start"] == 1500
    assert summary["extra"] == {"outcome": "error", "finished": False}


def test_a_report_written_twice_is_the_same(run: Run) -> None:
    assert ctrf.render(run) == ctrf.render(run)
    ids = [test["id"] for test in _document(run)["results"]["tests"]]
    assert len(set(ids)) == len(ids)

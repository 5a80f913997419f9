"""The document of sums: each agrees with the tests and with the others."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from vmlab.report import Attempt, MachineRecord, Metric, Outcome, Run, Suite, Test, results


def _document(run: Run) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(results.render(run))
    return document


def _run(*tests: Test) -> Run:
    return Run(
        id="r",
        tool="t",
        version="1",
        started=datetime(2026, 1, 1, tzinfo=UTC),
        suites=[Suite(name="s", tests=tests)] if tests else [],
    )


def _passed(name: str, hypervisor: str | None = None, **more: Any) -> Test:
    attempt = Attempt(outcome=Outcome.PASS, **more)
    return Test(suite="s", name=name, hypervisor=hypervisor, attempts=[attempt])


COUNTS = ("passed", "failed", "errors", "skipped", "expected_failures", "pending")


def test_the_sums_are_true(run: Run) -> None:
    document = _document(run)
    for counted in (*document["test_results"].values(), document["totals"]):
        assert counted["tests"] == sum(counted[name] for name in COUNTS)
    for name in ("tests", *COUNTS):
        suites = document["test_results"].values()
        assert document["totals"][name] == sum(suite[name] for suite in suites)
    assert document["totals"]["tests"] == 8
    # 2 passed of 2 + 2 failed + 1 error + 1 pending; the skip and the known bug do not count.
    assert document["success_rate"] == 33.3
    assert document["test_results"]["lifecycle"]["duration_ms"] == 2250
    assert document["test_results"]["other"]["reason"] == "no GPU here"


def test_it_says_which_run_it_was(run: Run) -> None:
    document = _document(run)
    assert document["test_run_id"] == run.id
    assert (document["start_time"], document["end_time"]) == (
        "2026-11-21T09:30:00Z",
        "2026-11-21T09:30:07Z",
    )
    assert document["duration_seconds"] == 7
    assert (document["tool"], document["version"]) == ("vmlab conformance", "0.1.0")


@pytest.mark.parametrize(
    ("passed", "failed", "rate"), [(0, 0, None), (1, 0, 100.0), (2999, 1, 99.9), (0, 3, 0.0)]
)
def test_only_a_run_without_failures_is_a_hundred_per_cent(
    passed: int, failed: int, rate: float | None
) -> None:
    tests = [_passed(f"p{n}") for n in range(passed)]
    tests += [
        Test(suite="s", name=f"f{n}", attempts=[Attempt(outcome=Outcome.FAIL)])
        for n in range(failed)
    ]
    assert _document(_run(*tests))["success_rate"] == rate


def test_a_run_that_died_has_no_end_and_its_pending_tests_count(run_with_machines: Run) -> None:
    document = _document(run_with_machines)
    assert (document["end_time"], document["duration_seconds"]) == (None, None)
    assert document["totals"]["pending"] == 1
    assert document["success_rate"] == 33.3


def test_what_the_machines_have_in_common_is_told(run_with_machines: Run) -> None:
    assert _document(run_with_machines)["vm_config"] == {
        "ram_mb": None,  # nobody knows how much `store` has
        "cpus": None,
        "os": "debian-12",
        "hypervisor": "qemu",
        "accelerator": "tcg",
        "architecture": None,
        "machines": 3,
    }
    assert _document(_run())["vm_config"]["machines"] == 0


@pytest.mark.parametrize(
    ("spec", "ram_mb", "cpus"),
    [
        ({"memory": {"size": 2**30}, "cpus": {"count": 4}}, 1024, 4),
        ({"memory": "1.5G", "cpus": 1}, 1536, 1),
        ({"memory": 2**19, "cpus": True}, 0.5, None),
        ({"memory": "much", "cpus": "many"}, None, None),
        ({}, None, None),
    ],
)
def test_memory_and_cpus_are_read_however_they_were_written(
    spec: dict[str, Any], ram_mb: float | None, cpus: int | None
) -> None:
    machine = MachineRecord(name="m", hypervisor="qemu", spec=spec)
    config = _document(_run(_passed("t", machines=[machine])))["vm_config"]
    assert (config["ram_mb"], config["cpus"]) == (ram_mb, cpus)


def test_metrics_end_with_their_unit(run_with_machines: Run) -> None:
    assert _document(run_with_machines)["performance_metrics"] == {
        "boot_avg_s": 1.0,
        "boot_min_s": 0.75,
        "boot_max_s": 1.25,
        "cpu_percent": 12.5,
    }


def test_metrics_of_hypervisors_are_apart() -> None:
    tests = [
        _passed("t", "qemu", metrics=[Metric(name="boot", value=2, unit="s")]),
        _passed("t", "embedded", metrics=[Metric(name="boot", value=3, unit="s")]),
        _passed("u", metrics=[Metric(name="boot", value=4, unit="s")]),
    ]
    assert _document(_run(*tests))["performance_metrics"] == {
        "qemu_boot_s": 2,
        "embedded_boot_s": 3,
        "boot_s": 4,
    }


def test_metrics_whose_names_look_alike_do_not_hide_each_other() -> None:
    metrics = [Metric(name="a-b", value=1), Metric(name="a b", value=2), Metric(name="?", value=3)]
    found = _document(_run(_passed("t", metrics=metrics)))["performance_metrics"]
    assert found == {"a_b_avg": 1.5, "a_b_min": 1, "a_b_max": 2, "metric": 3}
    metrics = [Metric(name="a", value=1, unit="s"), Metric(name="a_s", value=2, unit="")]
    found = _document(_run(_passed("t", metrics=metrics)))["performance_metrics"]
    assert found == {"a_s": 1, "a_s_2": 2}

"""The results of a run as one short document of sums: what a dashboard or a shell script reads.

Its fields are those that shell-written runners of virtual machine tests have made customary
(`test_run_id`, `vm_config`, `test_results` by suite, `performance_metrics`, `success_rate`). All of
them are computed from the tests, so that they agree with each other:

- the counts of a suite, and of `totals`, add up to its `tests`;
- `success_rate` is `passed` of the tests that were to pass or fail (`passed`, `failed`, `errors`
  and `pending`), in per cent with one decimal, rounded down: 100.0 is all of them. Null where
  there is no such test. What never ended has not succeeded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from math import fsum
from typing import Any, Final

from vmlab.machine.sizes import MIB, parse_size
from vmlab.report.model import MachineRecord, Metric, Run, Suite, Totals

__all__ = ["render"]

_UNIT_NAMES: Final = {"%": "percent", "µs": "us", "μs": "us"}
_NOT_A_WORD: Final = re.compile(r"\W+")


def render(run: Run) -> bytes:
    """`run` as indented JSON in UTF-8."""
    document: dict[str, Any] = {
        "test_run_id": run.id,
        "start_time": _time(run.started),
        "end_time": None if run.finished is None else _time(run.finished),
        "duration_seconds": run.duration_s,
        "tool": run.tool,
        "version": run.version,
        "seed": run.seed,
        "vm_config": _vm_config(run),
        "test_results": {suite.name: _suite(suite) for suite in run.suites},
        "totals": _counts(run.totals),
        "performance_metrics": _metrics(run),
        "success_rate": _success_rate(run.totals),
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _counts(totals: Totals) -> dict[str, int]:
    return {
        "tests": totals.tests,
        "passed": totals.passed,
        "failed": totals.failed,
        "errors": totals.errors,
        "skipped": totals.skipped,
        "expected_failures": totals.xfailed,
        "pending": totals.pending,
    }


def _suite(suite: Suite) -> dict[str, Any]:
    counted: dict[str, Any] = {
        **_counts(suite.totals),
        "duration_ms": round(1000 * suite.duration_s),
    }
    reasons = dict.fromkeys(test.skip_reason for test in suite.tests if test.skip_reason)
    if reasons:
        counted["reason"] = "; ".join(reasons)
    return counted


def _success_rate(totals: Totals) -> float | None:
    counted = totals.passed + totals.failed + totals.errors + totals.pending
    return (1000 * totals.passed // counted) / 10 if counted else None


def _vm_config(run: Run) -> dict[str, Any]:
    """What all machines of the run have in common; null where they differ or nobody knows."""
    configs = [
        _machine(machine)
        for test in run.tests()
        for attempt in test.attempts
        for machine in attempt.machines
    ]
    names = ("ram_mb", "cpus", "os", "hypervisor", "accelerator", "architecture")
    common: dict[str, Any] = dict.fromkeys(names)
    for name in common:
        values = {config[name] for config in configs}
        if len(values) == 1:
            common[name] = values.pop()
    return {**common, "machines": len(configs)}


def _machine(machine: MachineRecord) -> dict[str, Any]:
    return {
        "ram_mb": _megabytes(machine.spec.get("memory")),
        "cpus": _count(machine.spec.get("cpus")),
        "os": machine.image or None,
        "hypervisor": machine.hypervisor,
        "accelerator": machine.accelerator or None,
        "architecture": machine.architecture or None,
    }


def _megabytes(memory: object) -> int | float | None:
    """Memory as a specification has it (bytes, "512M", or a table with `size`), in MiB."""
    if isinstance(memory, Mapping):
        memory = memory.get("size")
    try:
        size = parse_size(memory)
    except ValueError:
        return None
    return size // MIB if size % MIB == 0 else size / MIB


def _count(cpus: object) -> int | None:
    """vCPUs as a specification has them: a number, or a table with `count`."""
    if isinstance(cpus, Mapping):
        cpus = cpus.get("count")
    return cpus if isinstance(cpus, int) and not isinstance(cpus, bool) else None


def _metrics(run: Run) -> dict[str, float]:
    """Metrics of all tests: the value of one sample; mean, least and greatest of several.

    The unit ends the name. Where tests ran on several hypervisors, samples of each are apart.
    """
    samples: dict[tuple[str, str, str], list[float]] = {}
    apart = len({test.hypervisor for test in run.tests()}) > 1
    for test in run.tests():
        on = test.hypervisor if apart and test.hypervisor else ""
        for metric in test.metrics:
            name, unit = _named(metric)
            samples.setdefault((on, name, unit), []).append(metric.value)
    sums: dict[str, float] = {}
    for (on, name, unit), values in samples.items():
        stem = f"{_word(on)}_{name}" if on else name
        ending = f"_{unit}" if unit else ""
        if len(values) == 1:
            _put(sums, f"{stem}{ending}", values[0])
            continue
        _put(sums, f"{stem}_avg{ending}", fsum(value / len(values) for value in values))
        _put(sums, f"{stem}_min{ending}", min(values))
        _put(sums, f"{stem}_max{ending}", max(values))
    return sums


def _word(text: str) -> str:
    return _NOT_A_WORD.sub("_", text).strip("_")


def _named(metric: Metric) -> tuple[str, str]:
    """The metric's name without its unit, and the unit, both fit for a key."""
    unit = _word(_UNIT_NAMES.get(metric.unit, metric.unit))
    name = _word(metric.name) or "metric"
    if unit and name.endswith(f"_{unit}"):
        name = name.removesuffix(f"_{unit}")
    return name, unit


def _put(sums: dict[str, float], key: str, value: float) -> None:
    """Names that differ in signs alone ("a-b", "a b") must not hide each other."""
    unused, number = key, 1
    while unused in sums:
        number += 1
        unused = f"{key}_{number}"
    sums[unused] = value

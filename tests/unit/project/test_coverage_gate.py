"""The coverage gate refuses a package whose lines or branches are covered too little."""

from __future__ import annotations

import coverage_gate
import pytest


def report(**summaries: tuple[int, int, int, int]) -> dict[str, object]:
    """coverage's JSON: per file covered lines of lines, covered branches of branches."""
    keys = ("covered_lines", "num_statements", "covered_branches", "num_branches")
    return {
        "files": {
            f"src/vmlab/machine/{name}.py": {"summary": dict(zip(keys, numbers, strict=True))}
            for name, numbers in summaries.items()
        }
    }


@pytest.mark.parametrize(
    ("measured", "problems"),
    [
        (report(a=(95, 100, 19, 20)), []),
        (report(a=(94, 100, 20, 20)), ["vmlab/machine: 94.00% of lines covered, 95.0% required"]),
        (
            report(a=(100, 100, 18, 20)),
            ["vmlab/machine: 90.00% of branches covered, 95.0% required"],
        ),
        (report(a=(100, 100, 0, 0)), []),
        (report(a=(50, 50, 0, 0), b=(45, 50, 0, 0)), []),
    ],
)
def test_lines_and_branches_each_have_to_reach_the_gate(
    measured: dict[str, object], problems: list[str]
) -> None:
    assert coverage_gate.failures(measured, {"vmlab/machine": 95.0}) == problems


def test_a_package_that_was_not_measured_is_no_pass() -> None:
    with pytest.raises(ValueError, match="no file below src/vmlab/hypervisors"):
        coverage_gate.failures(report(a=(1, 1, 1, 1)), {"vmlab/hypervisors": 95.0})

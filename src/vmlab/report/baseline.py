"""Runs against runs: whether what they measured got better, got worse, or cannot be told.

One run is one sample: its median of a metric. Samples within one run share its machine, its boot
and its minute, so they say little about another run; counting them as if they were independent is
the commonest way to find a difference that is not there. So runs are repeated, and where two
commands are compared their runs are interleaved (`interleaved.py`), so that whatever the host does
meanwhile happens to both.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmlab.report.comparison import ALPHA, TOLERANCE, Comparison, Verdict, compare
from vmlab.report.difference import MetricChange
from vmlab.report.history import RunSamples

__all__ = [
    "ALPHA",
    "TOLERANCE",
    "Comparison",
    "Verdict",
    "any_worse",
    "compare",
    "compare_runs",
]


def compare_runs(
    before: Sequence[RunSamples],
    after: Sequence[RunSamples],
    *,
    alpha: float = ALPHA,
    tolerance: float = TOLERANCE,
) -> list[MetricChange]:
    """Compare each metric that both sides measured, in the order of the second side's.

    Args:
        before: The runs of one side, each with what it measured.
        after: Those of the other.
        alpha: How often equal things may be called different, for each metric.
        tolerance: Shifts up to this share of the first median do not matter.
    """
    known = {key for run in before for key in run.values}
    keys = dict.fromkeys(key for run in after for key in run.values if key in known)
    found = []
    for key in keys:
        sides = [
            [median for run in runs if (median := run.median(key)) is not None]
            for runs in (before, after)
        ]
        direction = next(run.directions[key] for run in after if key in run.directions)
        comparison = compare(*sides, direction=direction, alpha=alpha, tolerance=tolerance)
        found.append(MetricChange(key, comparison))
    return found


def any_worse(changes: Sequence[MetricChange]) -> bool:
    """Whether a metric got worse for certain."""
    return any(change.comparison.verdict is Verdict.WORSE for change in changes)

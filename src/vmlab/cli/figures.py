"""A table of comparisons of metrics, for the commands that print one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmlab.cli import output

if TYPE_CHECKING:
    from vmlab.report.comparison import Comparison
    from vmlab.report.difference import MetricKey

__all__ = ["COLUMNS", "figures"]

COLUMNS: Final = (
    output.Column("metric", "METRIC"),
    output.Column("a", "A (median)", justify="right"),
    output.Column("b", "B (median)", justify="right"),
    output.Column("change", "CHANGE", justify="right"),
    output.Column("verdict", "VERDICT"),
    output.Column("effect", "EFFECT"),
    output.Column("p", "P", justify="right"),
    output.Column("n", "SAMPLES", justify="right"),
    output.Column("reason", ""),
)


def figures(metric: MetricKey, comparison: Comparison) -> dict[str, object]:
    """The row of one metric."""
    from vmlab.report import escape_controls

    a, b = comparison.medians
    change = None
    if a and comparison.shift is not None:
        change = f"{100 * comparison.shift / abs(a):+.1f} %"
    return {
        "metric": escape_controls(str(metric)),
        "a": a,
        "b": b,
        "change": change,
        "verdict": comparison.verdict,
        "effect": f"{comparison.magnitude} ({comparison.effect:+.2f})",
        "p": comparison.p,
        "n": f"{comparison.n[0]}, {comparison.n[1]}",
        "reason": comparison.reason,
    }

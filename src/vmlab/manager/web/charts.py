"""One figure over time as SVG, drawn here so that the page needs no script for it.

It says in words what it shows (`aria-label`); colours are classes of the page's style sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import escape

__all__ = ["Line", "line_chart"]

_WIDTH: Final = 360
_HEIGHT: Final = 110
_LEFT: Final = 70
_EDGE: Final = 10


@dataclass(frozen=True, slots=True)
class Line:
    """Values at seconds; as many of the one as of the other."""

    seconds: Sequence[float]
    values: Sequence[float]


def line_chart(name: str, line: Line, words: Callable[[float], str]) -> str:
    """A line over time, from zero up.

    Args:
        name: What it is.
        line: The values; there may be none yet.
        words: A value, for a person.
    """
    if not line.values:
        return _svg(f"{name}: no readings yet", "")
    top = max(*line.values, 0.0) or 1.0
    first, last = line.seconds[0], line.seconds[-1]
    span = (last - first) or 1.0

    def x(second: float) -> float:
        return _LEFT + (second - first) / span * (_WIDTH - _LEFT - _EDGE)

    def y(value: float) -> float:
        return _EDGE + (1 - value / top) * (_HEIGHT - 2 * _EDGE - 12)

    points = " ".join(
        f"{x(second):.1f},{y(value):.1f}"
        for second, value in zip(line.seconds, line.values, strict=True)
    )
    bottom = y(0)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>'
        for at in (y(top), bottom)
    ]
    parts += [
        f'<text class="tick" x="{_LEFT - 6}" y="{y(top) + 4:.1f}" text-anchor="end">'
        f"{escape(words(top))}</text>",
        f'<text class="tick" x="{_LEFT - 6}" y="{bottom + 4:.1f}" text-anchor="end">0</text>',
        f'<text class="tick" x="{_WIDTH - _EDGE}" y="{_HEIGHT - 2}" text-anchor="end">now</text>',
        f'<text class="tick" x="{_LEFT}" y="{_HEIGHT - 2}">{span:.0f} s ago</text>',
        f'<polygon class="area" points="{x(first):.1f},{bottom:.1f} {points} '
        f'{x(last):.1f},{bottom:.1f}"/>',
        f'<polyline class="line" points="{points}"/>',
    ]
    low, high = words(min(line.values)), words(max(line.values))
    label = f"{name}: now {words(line.values[-1])}, from {low} to {high} in {span:.0f} s"
    return _svg(label, "".join(parts))


def _svg(label: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" class="chart" role="img" '
        f'aria-label="{escape(label)}">{inside}</svg>'
    )

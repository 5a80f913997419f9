"""Timelines and charts as SVG, drawn here so that the report needs no script and no network.

Each drawing says in words what it shows (`aria-label`, a `<title>` on every shape), and the page
has the same figures as a table beside it. Colours are classes of the page's style sheet, so that
they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from vmlab.report.comparison import middle_of
from vmlab.report.escape import escape_controls, escape_xml
from vmlab.report.model import Attempt, FaultRecord, Mark, Outcome, Phase

__all__ = ["Sample", "chart", "number", "timeline"]

_WIDTH: Final = 960
_LEFT: Final = 120  # names of the rows stand left of it
_LANE: Final = 18
_CHARACTER: Final = 6.4  # about as wide as one is at 11 px
_MOST_LANES: Final = 12
_LABEL: Final = 32  # characters
_TICKS: Final = 5

_CHART_WIDTH: Final = 480
_CHART_HEIGHT: Final = 150
_CHART_LEFT: Final = 64
_CHART_EDGE: Final = 14

_Scale = Callable[[float], float]  # seconds, or a value, to a place in the drawing

FATAL: Final = ("panic", "oops", "bug", "lockup", "hung", "oom", "lost", "unexpected", "died")
"""A mark whose kind has one of these words in it is drawn as a cause of death."""


def number(value: float) -> str:
    """A figure as people read it: at most five significant digits, whole numbers whole."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.5g}"


@dataclass(frozen=True)
class Sample:
    """One point of a chart; `of` names the test that it comes from."""

    of: str
    value: float


@dataclass(frozen=True)
class _Event:
    start: float
    end: float | None
    kind: str  # the class of the style sheet
    label: str
    title: str


@dataclass
class _Row:
    name: str
    events: list[_Event]


def _clean(text: str) -> str:
    return escape_xml(escape_controls(text))


def _element(
    parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: object
) -> ElementTree.Element:
    named = {
        name.rstrip("_").replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else value
        for name, value in attributes.items()
    }
    element = ElementTree.SubElement(
        parent, tag, {name: _clean(str(value)) for name, value in named.items()}
    )
    if text is not None:
        element.text = _clean(text)
    return element


def _drawing(width: int, height: float, label: str, kind: str) -> ElementTree.Element:
    return ElementTree.Element(
        "svg",
        {
            "viewBox": f"0 0 {width} {height:g}",
            "width": str(width),
            "class": kind,
            "role": "img",
            "aria-label": _clean(label),
        },
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


# ------------------------------------------------------------------------------------ timelines


def timeline(attempt: Attempt, seconds: float | None = None) -> str:
    """The phases, machines and faults of an attempt over time, as one SVG element.

    Args:
        attempt: What to draw.
        seconds: How long it took; as the attempt says, if None.

    Returns:
        The SVG; empty where there is nothing to draw.
    """
    rows = [row for row in _rows(attempt) if row.events]
    if not rows:
        return ""
    ends = [time for row in rows for e in row.events for time in (e.start, e.end or e.start)]
    first = min(0.0, *ends)
    last = max(seconds or attempt.duration_s or 0.0, *ends)
    if last <= first:
        last = first + 1.0
    scale = (_WIDTH - _LEFT - 8) / (last - first)

    def x(time: float) -> float:
        return _LEFT + (time - first) * scale

    laid = [(row, _lanes(row.events, x)) for row in rows]
    height = sum(max(lanes) + 1 for _, lanes in laid) * _LANE + 8 * len(laid) + 24
    machines = ", ".join(machine.name for machine in attempt.machines)
    label = f"Timeline from {_seconds(first)} to {_seconds(last)}"
    svg = _drawing(_WIDTH, height, f"{label}; machines: {machines}" if machines else label, "time")
    y = 4.0
    for row, lanes in laid:
        tall = (max(lanes) + 1) * _LANE
        _element(svg, "rect", class_="row", x=0, y=y, width=_WIDTH, height=tall + 4, rx=3)
        name = row.name if len(row.name) <= 17 else f"{row.name[:16]}…"
        _element(svg, "text", name, class_="name", x=6, y=y + 14)
        for event, lane in zip(row.events, lanes, strict=True):
            _draw(svg, event, x, y + 3 + lane * _LANE)
        y += tall + 8
    for tick in range(_TICKS + 1):
        time = first + (last - first) * tick / _TICKS
        at = x(time)
        _element(svg, "line", class_="grid", x1=at, x2=at, y1=0, y2=y)
        anchor = "end" if tick == _TICKS else "middle"
        _element(svg, "text", _seconds(time), class_="tick", x=at, y=y + 14, text_anchor=anchor)
    return ElementTree.tostring(svg, encoding="unicode")


def _rows(attempt: Attempt) -> Iterator[_Row]:
    yield _Row("phases", [_phase(phase, attempt) for phase in attempt.phases])
    names = [machine.name for machine in attempt.machines]
    for machine in attempt.machines:
        events = [_mark(mark) for mark in machine.timeline]
        events += [_fault(fault) for fault in attempt.faults if fault.machine == machine.name]
        yield _Row(machine.name, sorted(events, key=lambda event: event.start))
    for other in dict.fromkeys(f.machine for f in attempt.faults if f.machine not in names):
        yield _Row(other, [_fault(fault) for fault in attempt.faults if fault.machine == other])


def _phase(phase: Phase, attempt: Attempt) -> _Event:
    spent = phase.duration_s
    if spent is None and phase.outcome is Outcome.PENDING:
        spent = max(0.0, (attempt.duration_s or 0.0) - phase.started_s)
    title = f"{phase.name}: {phase.outcome.value}"
    if phase.duration_s is not None:
        title += f", {_seconds(phase.duration_s)}"
    end = None if spent is None else phase.started_s + spent
    return _Event(phase.started_s, end, f"phase {phase.outcome.value}", phase.name, title)


def _mark(mark: Mark) -> _Event:
    fatal = any(word in mark.kind.lower() for word in FATAL)
    title = f"{_seconds(mark.at_s)}: {mark.kind}"
    end = None
    if mark.duration_s is not None:
        title += f", {_seconds(mark.duration_s)}"
        end = mark.at_s + mark.duration_s
    if mark.text:
        title += f": {mark.text}"
    return _Event(mark.at_s, end, "mark fatal" if fatal else "mark", mark.kind, title)


def _fault(fault: FaultRecord) -> _Event:
    title = f"{_seconds(fault.at_s)}: fault {fault.id} ({fault.kind})"
    if fault.refused:
        return _Event(
            fault.at_s,
            None,
            "refused",
            f"{fault.kind} refused",
            f"{title} refused: {fault.refused}",
        )
    if fault.cleared_s is not None:
        title += f", cleared at {_seconds(fault.cleared_s)}"
    return _Event(fault.at_s, fault.cleared_s, "fault", fault.kind, title)


def _lanes(events: Sequence[_Event], x: _Scale) -> list[int]:
    """A lane for each event, so that no label covers another as long as there is room."""
    taken: list[float] = []
    chosen = []
    for event in events:
        left, right = _extent(event, x)
        free = (lane for lane, until in enumerate(taken) if left >= until)
        lane = min(next(free, len(taken)), _MOST_LANES - 1)
        if lane == len(taken):
            taken.append(right)
        else:
            taken[lane] = max(taken[lane], right)
        chosen.append(lane)
    return chosen


def _label(event: _Event) -> str:
    return event.label if len(event.label) <= _LABEL else f"{event.label[: _LABEL - 1]}…"


def _wide(event: _Event) -> float:
    return 10 + _CHARACTER * len(_label(event))


def _label_at(event: _Event, x: _Scale) -> tuple[float, str]:
    """Where the label begins or ends: in its bar, beside it, or before it at the right edge."""
    left, right = x(event.start), x(event.end if event.end is not None else event.start)
    if right - left >= _wide(event):
        return left + 6, "start"
    if max(right, left + 3) + _wide(event) <= _WIDTH:
        return max(right, left + 3) + 4, "start"
    return left - 4, "end"


def _extent(event: _Event, x: _Scale) -> tuple[float, float]:
    left, right = x(event.start), x(event.end if event.end is not None else event.start)
    at, anchor = _label_at(event, x)
    if anchor == "end":
        return at - _wide(event), right + 4
    return left, max(right + 4, at + _wide(event))


def _draw(svg: ElementTree.Element, event: _Event, x: _Scale, y: float) -> None:
    group = _element(svg, "g", class_=event.kind)
    _element(group, "title", event.title)
    left = x(event.start)
    wide = 3.0 if event.end is None else max(3.0, x(event.end) - left)
    _element(group, "rect", x=left, y=y, width=wide, height=14.0, rx=2)
    at, anchor = _label_at(event, x)
    _element(group, "text", _label(event), x=at, y=y + 11, text_anchor=anchor)


# --------------------------------------------------------------------------------------- charts


def chart(name: str, samples: Sequence[Sample]) -> str:
    """One metric over the tests that measured it, in their order, as one SVG element.

    Args:
        name: What was measured, with its unit.
        samples: At least one.
    """
    values = [sample.value for sample in samples]
    low, high, middle = min(values), max(values), middle_of(values)
    counted = "1 sample" if len(values) == 1 else f"{len(values)} samples"
    words = f"{name}: {counted}, median {number(middle)}"
    svg = _drawing(
        _CHART_WIDTH,
        _CHART_HEIGHT,
        f"{words}, from {number(low)} to {number(high)}",
        "chart",
    )
    room = _CHART_HEIGHT - 2 * _CHART_EDGE
    across = (_CHART_WIDTH - _CHART_LEFT - _CHART_EDGE) / max(1, len(values) - 1)

    def y(value: float) -> float:
        # The difference of two doubles may be more than a double holds; that of halves is not.
        part = 2 if math.isinf(high - low) else 1
        share = (value / part - low / part) / (high / part - low / part) if high > low else 0.5
        return _CHART_EDGE + room * (1 - share)

    for value in sorted({low, middle, high}):
        kind = "median" if value == middle else "grid"
        _element(
            svg,
            "line",
            class_=kind,
            x1=_CHART_LEFT,
            x2=_CHART_WIDTH,
            y1=y(value),
            y2=y(value),
        )
    for value in (low, high) if high > low else (low,):
        _element(
            svg,
            "text",
            number(value),
            class_="tick",
            x=_CHART_LEFT - 6,
            y=y(value) + 4,
            text_anchor="end",
        )
    for position, sample in enumerate(samples):
        at = _CHART_LEFT + _CHART_EDGE / 2 + position * across
        point = _element(svg, "circle", class_="sample", cx=at, cy=y(sample.value), r=3)
        _element(point, "title", f"{sample.of}: {number(sample.value)}")
    return ElementTree.tostring(svg, encoding="unicode")

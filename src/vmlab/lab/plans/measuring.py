"""Numbers out of what a phase prints, line by line while it comes.

A line is searched as a whole, so that a pattern cannot match where two lines meet; long ones are
cut, since what a guest prints is not trusted. A pattern that backtracks for hours is its author's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vmlab.lab.plans.phases import MetricPattern
from vmlab.report import Direction

LONGEST_LINE: Final = 4096
"""Characters of a line that are searched."""

MOST_SAMPLES: Final = 10_000
"""Samples that one phase may give."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One number that was found."""

    name: str
    value: float
    unit: str
    direction: Direction


class Meter:
    """Finds samples in one stream of output.

    `unreadable` are texts that a pattern's group matched and that are no numbers.
    """

    def __init__(self, patterns: Sequence[MetricPattern]) -> None:
        self._patterns = [(pattern, re.compile(pattern.pattern)) for pattern in patterns]
        self._held = b""
        self._samples = 0
        self.unreadable: list[str] = []

    def feed(self, data: bytes) -> Iterator[Sample]:
        """The samples in the lines that `data` completes."""
        if not self._patterns:
            return
        *lines, rest = (self._held + data).split(b"\n")
        # Of a line without an end no more is kept than is searched.
        self._held = rest[: 4 * LONGEST_LINE]
        for line in lines:
            yield from self._search(line)

    def finish(self) -> Iterator[Sample]:
        """The samples in the last line, which may have no end."""
        held, self._held = self._held, b""
        if held:
            yield from self._search(held)

    def _search(self, line: bytes) -> Iterator[Sample]:
        text = line.decode("utf-8", "replace")[:LONGEST_LINE].rstrip("\r")
        for pattern, compiled in self._patterns:
            for found in compiled.finditer(text):
                groups = zip(pattern.names, found.groups(), strict=True)
                for name, number in groups:
                    if number is None:
                        continue
                    value = _number(number)
                    if value is None:
                        if len(self.unreadable) < 5:
                            self.unreadable.append(f"{name} = {number[:100]!r} is no number")
                    elif self._samples < MOST_SAMPLES:
                        self._samples += 1
                        yield Sample(name, value, pattern.unit, pattern.direction)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

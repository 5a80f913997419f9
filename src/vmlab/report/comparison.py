"""Whether two sets of measurements differ: Mann-Whitney U, Cliff's delta, and a shift with limits.

Nothing is assumed of the measurements but that they are independent: times of machines are skewed
and have several humps, so means and normal curves say little about them. A verdict needs three
things: p below `ALPHA`, an effect that is not negligible, and a shift of the medians beyond the
tolerance. "same" is a finding too, not the lack of one: all shifts that the samples leave possible
are within the tolerance. Whatever is neither is "cannot tell".

Mann and Whitney, Annals of Mathematical Statistics 18 (1947); Hodges and Lehmann, ibid. 34 (1963);
Cliff, Psychological Bulletin 114 (1993), with the limits of Romano et al. (2006).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from statistics import NormalDist
from typing import Final

from vmlab.machine.errors import VmlabError
from vmlab.report.parts import Direction

__all__ = [
    "ALPHA",
    "TOLERANCE",
    "Comparison",
    "Verdict",
    "cliffs_delta",
    "compare",
    "middle_of",
    "p_value",
]

ALPHA: Final = 0.05
"""How often equal things may be called different."""

TOLERANCE: Final = 0.05
"""Shifts up to this share of the first median do not matter."""

NEGLIGIBLE: Final = 0.147
_MAGNITUDES: Final = ((NEGLIGIBLE, "negligible"), (0.33, "small"), (0.474, "medium"))

_EXACT: Final = 12 * 12
"""Pairs up to which p is counted out; beyond, the normal approximation is within 0.003 of it."""


class Verdict(StrEnum):
    """What is known of the second samples against the first."""

    BETTER = "better"
    WORSE = "worse"
    DIFFERENT = "different"  # of a metric that gets neither better nor worse
    SAME = "same"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Comparison:
    """What two sets of samples say about each other."""

    verdict: Verdict
    effect: float
    """Cliff's delta: how much more often the second is greater than less, from -1 to 1."""
    p: float
    """Of the two-sided test that both come from one distribution."""
    n: tuple[int, int]
    """How many samples there were of each."""
    medians: tuple[float | None, float | None]
    shift: float | None
    """By how much the second are greater: the median of all differences (Hodges-Lehmann)."""
    limits: tuple[float, float] | None
    """Between which the shift is, at 1 - alpha; None where there are too few samples."""
    reason: str = ""
    """Why nothing can be told."""

    @property
    def magnitude(self) -> str:
        """The effect in a word: negligible, small, medium or large."""
        size = abs(self.effect)
        return next((word for limit, word in _MAGNITUDES if size < limit), "large")


def compare(
    a_samples: Sequence[float],
    b_samples: Sequence[float],
    *,
    direction: Direction = Direction.LOWER,
    alpha: float = ALPHA,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Compare the second samples with the first.

    Args:
        a_samples: Finite numbers, in any order.
        b_samples: The same.
        direction: Which way it gets better; without one it can only be "different".
        alpha: How often equal things may be called different, between 0 and 1.
        tolerance: Shifts up to this share of the first median do not matter.

    Raises:
        VmlabError: A sample is not finite, or alpha or tolerance makes no sense.
    """
    if not 0 < alpha < 1:
        raise VmlabError(f"alpha = {alpha!r} is no probability", hint="say 0.05 for one in twenty")
    if not 0 <= tolerance < math.inf:
        raise VmlabError(f"tolerance = {tolerance!r} is no share", hint="say 0.05 for 5 %")
    a, b = sorted(map(float, a_samples)), sorted(map(float, b_samples))
    for value in (*a, *b):
        if not math.isfinite(value):
            raise VmlabError(f"a sample is {value!r}", hint="only finite numbers can be compared")
    known = Comparison(
        verdict=Verdict.CANNOT_TELL,
        effect=cliffs_delta(a, b) if a and b else 0.0,
        p=p_value(a, b) if a and b else 1.0,
        n=(len(a), len(b)),
        medians=(middle_of(a) if a else None, middle_of(b) if b else None),
        shift=None,
        limits=None,
        reason="one side has no samples",
    )
    if not a or not b:
        return known
    differences = sorted(y - x for y in b for x in a)
    shift = middle_of(differences)
    limits = _limits(differences, len(a), len(b), alpha)
    known = replace(known, shift=shift, limits=limits)
    if limits is None:
        why = f"{len(a)} and {len(b)} samples are too few for any difference to show"
        return replace(known, reason=why)
    slack = tolerance * abs(middle_of(a))
    if known.p < alpha and abs(known.effect) >= NEGLIGIBLE and abs(shift) > slack:
        return replace(known, verdict=_towards(direction, shift), reason="")
    if -slack <= limits[0] and limits[1] <= slack:
        return replace(known, verdict=Verdict.SAME, reason="")
    if known.p < alpha:
        return replace(known, reason="they differ, but by how much is not certain enough")
    why = "the samples vary too much, or are too few, to tell a difference from chance"
    return replace(known, reason=why)


def _towards(direction: Direction, shift: float) -> Verdict:
    if direction is Direction.NONE:
        return Verdict.DIFFERENT
    worse = shift > 0 if direction is Direction.LOWER else shift < 0
    return Verdict.WORSE if worse else Verdict.BETTER


def middle_of(values: Sequence[float]) -> float:
    """The median of at least one value, also of figures whose sum no double holds."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2 or ordered[half - 1] == ordered[half]:
        return ordered[half]
    return ordered[half - 1] / 2 + ordered[half] / 2


def cliffs_delta(a: Sequence[float], b: Sequence[float]) -> float:
    """How much more often a value of `b` is greater than one of `a` than less: from -1 to 1."""
    ordered = sorted(a)
    greater = sum(bisect_left(ordered, value) for value in b)
    less = sum(len(ordered) - bisect_right(ordered, value) for value in b)
    return (greater - less) / (len(a) * len(b))


def p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p of Mann-Whitney's test, ties included.

    Up to 144 pairs by counting every way to deal the values to the two sides (so it is exact with
    ties too); beyond by the normal approximation, with corrections for ties and continuity.
    """
    ranks, ties = _doubled_ranks(a, b)
    if len(a) * len(b) <= _EXACT:
        return _exact(tuple(sorted(ranks)), sum(ranks[: len(a)]), len(a))
    n, m = len(a), len(b)
    total = n + m
    u = sum(ranks[:n]) / 2 - n * (n + 1) / 2
    tied = sum(t**3 - t for t in ties)
    variance = n * m / 12 * (total + 1 - tied / (total * (total - 1)))
    if variance <= 0:
        return 1.0  # all values are one
    distance = max(0.0, abs(u - n * m / 2) - 0.5)
    return min(1.0, 2 * (1 - NormalDist().cdf(distance / math.sqrt(variance))))


def _doubled_ranks(a: Sequence[float], b: Sequence[float]) -> tuple[list[int], list[int]]:
    """Twice the middle rank of each value, which is whole, and how many values share each rank."""
    values = [*a, *b]
    ordered = sorted(values)
    ranks = [bisect_left(ordered, v) + bisect_right(ordered, v) + 1 for v in values]
    ties = [
        bisect_right(ordered, value) - bisect_left(ordered, value)
        for value in dict.fromkeys(ordered)
    ]
    return ranks, ties


def _exact(ranks: tuple[int, ...], found: int, count: int) -> float:
    """The share of all choices of `count` ranks whose sum is at least as far out as `found`."""
    ways = _ways(ranks, count)
    # Sums are whole and doubled: the middle times 2 is compared, so that nothing is rounded.
    middle = count * sum(ranks) * 2 // len(ranks)
    distance = abs(2 * found - middle)
    out = sum(number for rank_sum, number in ways.items() if abs(2 * rank_sum - middle) >= distance)
    return out / math.comb(len(ranks), count)


@lru_cache(maxsize=64)
def _ways(ranks: tuple[int, ...], count: int) -> dict[int, int]:
    """How many choices of `count` of the ranks have each sum."""
    ways: list[dict[int, int]] = [{0: 1}, *({} for _ in range(count))]
    for rank in ranks:
        for chosen in range(count, 0, -1):
            here = ways[chosen]
            for before, number in ways[chosen - 1].items():
                here[before + rank] = here.get(before + rank, 0) + number
    return ways[count]


def _limits(
    differences: Sequence[float], n: int, m: int, alpha: float
) -> tuple[float, float] | None:
    """Between which differences the shift is, by the distribution of U without ties."""
    if n * m <= _EXACT:
        ways = _ways(tuple(range(1, n + m + 1)), n)
        least = n * (n + 1) // 2
        all_ways = math.comb(n + m, n)
        below, out = 0, -1
        while (below := below + ways.get(least + out + 1, 0)) * 2 <= alpha * all_ways:
            out += 1
    else:
        spread = math.sqrt(n * m * (n + m + 1) / 12)
        out = math.floor(n * m / 2 - NormalDist().inv_cdf(1 - alpha / 2) * spread - 0.5)
    if out < 0:
        return None
    return differences[out], differences[len(differences) - 1 - out]

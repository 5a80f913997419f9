"""Comparing samples: against scipy, and against distributions whose truth is known."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vmlab.machine.errors import VmlabError
from vmlab.report import Direction
from vmlab.report.comparison import Verdict, cliffs_delta, compare, p_value

figures = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)
few = st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=5)
many = st.lists(st.integers(0, 40).map(float), min_size=13, max_size=40)


@given(figures, figures)
def test_p_is_that_of_scipy_where_no_values_are_equal(a: list[float], b: list[float]) -> None:
    if len({*a, *b}) < len(a) + len(b):
        return
    expected = stats.mannwhitneyu(a, b, method="exact").pvalue
    assert p_value(a, b) == pytest.approx(expected, abs=1e-12)


@given(few, few)
def test_p_with_ties_is_that_of_every_way_to_deal_them(a: list[float], b: list[float]) -> None:
    values = [*a, *b]
    ranks = stats.rankdata(values)
    middle = len(a) * (len(values) + 1) / 2
    found = abs(ranks[: len(a)].sum() - middle)
    sums = [
        abs(sum(ranks[i] for i in chosen) - middle)
        for chosen in itertools.combinations(range(len(values)), len(a))
    ]
    expected = sum(distance >= found - 1e-9 for distance in sums) / len(sums)
    assert p_value(a, b) == pytest.approx(expected, abs=1e-12)


@given(many, many)
def test_p_of_many_is_that_of_scipys_approximation(a: list[float], b: list[float]) -> None:
    if len({*a, *b}) == 1:
        assert p_value(a, b) == 1
        return
    expected = stats.mannwhitneyu(a, b, method="asymptotic").pvalue
    assert p_value(a, b) == pytest.approx(expected, abs=1e-9)


@given(figures, figures)
def test_the_effect_counts_pairs(a: list[float], b: list[float]) -> None:
    pairs = [(y > x) - (y < x) for x in a for y in b]
    assert cliffs_delta(a, b) == pytest.approx(sum(pairs) / len(pairs))


@given(figures, figures, st.sampled_from([Direction.LOWER, Direction.HIGHER]))
def test_the_other_way_round_it_is_the_other_way_round(
    a: list[float], b: list[float], direction: Direction
) -> None:
    other = {Verdict.BETTER: Verdict.WORSE, Verdict.WORSE: Verdict.BETTER}
    there = compare(a, b, direction=direction, tolerance=0)
    back = compare(b, a, direction=direction, tolerance=0)
    assert back.verdict is other.get(there.verdict, there.verdict)
    assert (back.p, back.effect) == (there.p, -there.effect)
    mirrored = compare([-x for x in a], [-y for y in b], tolerance=0)
    assert mirrored.verdict is compare(a, b, direction=Direction.HIGHER, tolerance=0).verdict


DISTRIBUTIONS = {
    "normal": lambda dice, n: dice.normal(10, 1, n),
    "skewed": lambda dice, n: dice.lognormal(0, 1, n),
    "two humps": lambda dice, n: numpy.where(dice.random(n) < 0.3, 9, 10) + dice.random(n),
    "few values": lambda dice, n: dice.integers(1, 5, n).astype(float),
}


@pytest.mark.parametrize("n", [4, 7, 10, 20])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_equal_things_are_called_different_no_more_often_than_alpha(name: str, n: int) -> None:
    """With 600 trials of a chance of 0.05 more than 45 happen once in 600 such tests."""
    dice = numpy.random.default_rng([7, n])
    trials = 600
    wrong = sum(
        compare(DISTRIBUTIONS[name](dice, n), DISTRIBUTIONS[name](dice, n)).verdict
        in (Verdict.BETTER, Verdict.WORSE)
        for _ in range(trials)
    )
    assert wrong <= stats.binom.isf(1 / 600, trials, 0.05)


@pytest.mark.parametrize("n", [8, 20])
def test_a_clear_difference_is_found(n: int) -> None:
    dice = numpy.random.default_rng(3)
    verdicts = [
        compare(dice.normal(10, 0.5, n), dice.normal(12, 0.5, n)).verdict for _ in range(100)
    ]
    assert verdicts.count(Verdict.WORSE) == 100


def test_same_is_a_finding() -> None:
    dice = numpy.random.default_rng(3)
    steady = compare(dice.normal(10, 0.1, 20), dice.normal(10, 0.1, 20))
    assert steady.verdict is Verdict.SAME
    assert steady.limits is not None and -0.5 < steady.limits[0] <= steady.limits[1] < 0.5
    noisy = compare(dice.normal(10, 5, 20), dice.normal(10, 5, 20))
    assert noisy.verdict is Verdict.CANNOT_TELL
    assert "vary too much" in noisy.reason


def test_a_difference_that_does_not_matter_is_same() -> None:
    a = [100 + n / 10 for n in range(12)]
    result = compare(a, [x + 2 for x in a])
    assert result.p < 0.001 and result.verdict is Verdict.SAME
    assert compare(a, [x + 2 for x in a], tolerance=0.01).verdict is Verdict.WORSE


def test_a_difference_that_may_or_may_not_matter_is_not_decided() -> None:
    dice = numpy.random.default_rng(1)
    a, b = dice.normal(100, 6, 40), dice.normal(104.6, 6, 40)
    result = compare(a, b)
    assert result.p < 0.05 and result.verdict is Verdict.CANNOT_TELL
    assert "not certain enough" in result.reason


@pytest.mark.parametrize("n", range(4))
def test_three_samples_of_each_tell_nothing(n: int) -> None:
    result = compare([1.0] * n, [100.0] * 3)
    assert result.verdict is Verdict.CANNOT_TELL
    assert result.reason
    assert result.n == (n, 3)
    assert result.medians == (1.0 if n else None, 100.0)


def test_four_samples_of_each_tell_what_is_plain() -> None:
    a, b = [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]
    slower = compare(a, b)
    assert (slower.verdict, slower.effect, slower.magnitude) == (Verdict.WORSE, 1.0, "large")
    assert slower.p == pytest.approx(2 / 70)
    assert slower.shift == pytest.approx(1.0)
    assert slower.medians == (pytest.approx(1.15), pytest.approx(2.15))
    assert compare(a, b, direction=Direction.HIGHER).verdict is Verdict.BETTER
    assert compare(b, a).verdict is Verdict.BETTER
    assert compare(a, b, direction=Direction.NONE).verdict is Verdict.DIFFERENT
    assert compare(a, b, alpha=0.01).verdict is Verdict.CANNOT_TELL


def test_equal_figures_are_the_same() -> None:
    result = compare([5.0] * 6, [5.0] * 6)
    assert (result.verdict, result.effect, result.p, result.shift) == (Verdict.SAME, 0, 1, 0)
    assert result.magnitude == "negligible"


def test_order_does_not_matter() -> None:
    dice = random.Random(5)
    a, b = [dice.random() for _ in range(9)], [dice.random() + 0.5 for _ in range(7)]
    first = compare(a, b)
    dice.shuffle(a)
    dice.shuffle(b)
    assert compare(a, b) == first


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: compare([1], [float("nan")]), "a sample is nan"),
        (lambda: compare([1], [2], alpha=0), "alpha = 0"),
        (lambda: compare([1], [2], tolerance=-1), "tolerance = -1"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, problem: str) -> None:
    with pytest.raises(VmlabError, match=problem):
        call()  # type: ignore[operator]  # a lambda


@pytest.mark.parametrize(
    ("n", "critical"), [(4, 0), (5, 2), (6, 5), (8, 13), (10, 23), (12, 37), (15, 64), (20, 127)]
)
def test_the_limits_of_the_shift_are_those_of_the_tables(n: int, critical: int) -> None:
    """The critical values of U, two-sided at 0.05, as statistics books print them.

    The differences of these samples are all whole numbers from 1 - n on, each once.
    """
    a = [float(value) for value in range(n)]
    b = [float(value * n) for value in range(n)]
    limits = compare(a, b).limits
    assert limits is not None
    assert limits == (1 - n + critical, n * (n - 1) - critical)


def test_the_limits_hold_the_shift_as_often_as_they_say() -> None:
    dice = numpy.random.default_rng(5)
    trials = 400
    held = 0
    for _ in range(trials):
        limits = compare(dice.lognormal(0, 1, 9), dice.lognormal(0, 1, 9) + 3).limits
        assert limits is not None
        held += limits[0] <= 3 <= limits[1]
    assert trials - held <= stats.binom.isf(1 / 1000, trials, 0.05)

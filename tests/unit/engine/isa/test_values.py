"""The abstract value computes as two's complement does, and asks an emitter for what is unknown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.engine.isa.values import Value, signed

WORDS = st.integers(0, (1 << 64) - 1)


class Recorder:
    """An emitter that writes down what it is asked."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def operation(self, text: str) -> str:
        self.lines.append(text)
        return f"%{len(self.lines)}"

    def decide(self, operand: str) -> bool:
        self.lines.append(f"br {operand}")
        return True


@given(WORDS, WORDS)
def test_numbers_wrap(a: int, b: int) -> None:
    x, y = Value(a), Value(b)
    assert (x + y).number == (a + b) % (1 << 64)
    assert (x - y).number == (a - b) % (1 << 64)
    assert (x * y).number == a * b % (1 << 64)
    assert (-x).number == -a % (1 << 64)
    assert x.less(y).number == (signed(a, 64) < signed(b, 64))
    assert x.below(y).number == (a < b)


@given(WORDS, st.integers(1, (1 << 64) - 1))
def test_signed_division_rounds_towards_zero(a: int, b: int) -> None:
    left, right = signed(a, 64), signed(b, 64)
    if (left, right) == (-(1 << 63), -1):
        return
    quotient = Value(a).divide_signed(Value(b)).signed_number
    remainder = Value(a).remainder_signed(Value(b)).signed_number
    assert quotient * right + remainder == left
    assert abs(remainder) < abs(right)
    assert remainder == 0 or (remainder < 0) == (left < 0)


@given(WORDS, st.integers(0, 200))
def test_rotation_keeps_all_bits(a: int, amount: int) -> None:
    there = Value(a).rotate_left(Value(amount))
    assert there.count_ones().number == a.bit_count()
    assert there.rotate_left(-Value(amount)).number == a


@pytest.mark.parametrize(("a", "leading", "trailing"), [(0, 64, 64), (1, 63, 0), (1 << 63, 0, 63)])
def test_zeros_are_counted(a: int, leading: int, trailing: int) -> None:
    assert Value(a).count_leading_zeros().number == leading
    assert Value(a).count_trailing_zeros().number == trailing


def test_unknown_bits_are_asked_of_the_emitter() -> None:
    recorder = Recorder()
    x = Value("%x", 64, recorder)
    y = ((x + 3).low(32) ^ 5).sign_extend(64)
    assert y.text == "%4"
    assert recorder.lines == [
        "add i64 %x, 3",
        "trunc i64 %1 to i32",
        "xor i32 %2, 5",
        "sext i32 %3 to i64",
    ]
    assert y.less(0)
    assert recorder.lines[4:] == ["icmp slt i64 %4, 0", "br %5"]


def test_what_changes_nothing_emits_nothing() -> None:
    recorder = Recorder()
    x = Value("%x", 64, recorder)
    for same in (x + 0, x | 0, x ^ 0, x << 0, x >> 0, x & -1, x.low(64), x.sign_extend(64)):
        assert same is x
    assert recorder.lines == []


def test_an_unknown_value_has_no_number() -> None:
    with pytest.raises(ValueError, match="known only when"):
        _ = Value("%x", 64, Recorder()).number


def test_different_widths_do_not_mix() -> None:
    with pytest.raises(ValueError, match="widths differ"):
        _ = Value(1, 32) + Value(1, 64)

"""Floating point to the bit: against exact rational arithmetic, and against another emulator."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
from tests.unit.engine.isa.rational import (
    MODES,
    NV,
    RNE,
    Outcome,
    any_bits,
    bits_of,
    cases,
    expected_add,
    expected_conversion,
    expected_divide,
    expected_from_integer,
    expected_fused,
    expected_integer,
    expected_multiply,
    expected_square_root,
    fraction_of,
    is_nan,
    is_signaling,
    operands,
)

from vmlab.engine.isa import softfloat
from vmlab.engine.isa.softfloat import DOUBLE, SINGLE, Format
from vmlab.engine.isa.values import constant

FORMATS = pytest.mark.parametrize("form", [SINGLE, DOUBLE], ids=["single", "double"])
ARITHMETIC: dict[str, tuple[int, Callable[..., Outcome]]] = {
    "fused": (3, expected_fused),
    "add": (2, expected_add),
    "multiply": (2, expected_multiply),
    "divide": (2, expected_divide),
    "square_root": (1, expected_square_root),
}


@FORMATS
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_rational_arithmetic_rounded_once(form: Format, name: str) -> None:
    arity, expected = ARITHMETIC[name]
    operation = getattr(softfloat, name)
    for number, numbers in enumerate(cases(form, arity, seed=arity)):
        mode = number % 5
        result, flags = operation(
            form, *(constant(bits, form.width) for bits in numbers), constant(mode, 3)
        )
        assert (result.width, flags.width) == (form.width, 5)
        found = f"{result.number:#x} {flags.number:#04x}"
        right = "{:#x} {:#04x}".format(*expected(form, *numbers, mode))
        assert found == right, f"{name} {[hex(bits) for bits in numbers]} mode {mode}"


@FORMATS
def test_subtracting_is_adding_the_opposite(form: Format) -> None:
    for a, b in cases(form, 2, seed=9, count=300):
        result, flags = softfloat.subtract(
            form, constant(a, form.width), constant(b, form.width), constant(RNE, 3)
        )
        assert (result.number, flags.number) == expected_add(form, a, b ^ form.sign, RNE)


@FORMATS
def test_numbers_are_ordered(form: Format) -> None:
    for a, b in cases(form, 2, seed=3):
        x, y = constant(a, form.width), constant(b, form.width)
        nan = is_nan(form, a) or is_nan(form, b)
        signaling = NV * (is_signaling(form, a) or is_signaling(form, b))

        def order(bits: int) -> Fraction:
            return fraction_of(form, bits)  # an infinity is the next number after the largest

        answers = {
            "equal": (not nan and order(a) == order(b), signaling),
            "less": (not nan and order(a) < order(b), NV * nan),
            "less_or_equal": (not nan and order(a) <= order(b), NV * nan),
        }
        for name, right in answers.items():
            result, flags = getattr(softfloat, name)(form, x, y)
            assert (result.number, flags.number) == right, f"{name} {a:#x} {b:#x}"
        for name, pick in (("minimum", min), ("maximum", max)):
            result, flags = getattr(softfloat, name)(form, x, y)
            some = [bits for bits in (a, b) if not is_nan(form, bits)]
            right = pick(some, key=lambda bits: (order(bits), not bits & form.sign), default=None)
            assert result.number == (form.nan if right is None else right), f"{name} {a:#x} {b:#x}"
            assert flags.number == signaling


@FORMATS
def test_every_number_is_of_one_class(form: Format) -> None:
    least = 1 << form.fraction
    classes = [
        form.sign | form.infinity,
        form.sign | form.one,
        form.sign | (least - 1),
        form.sign,
        0,
        1,
        form.infinity - 1,
        form.infinity,
        form.infinity + 1,
        form.nan,
    ]
    for position, bits in enumerate(classes):
        assert softfloat.classify(form, constant(bits, form.width)).number == 1 << position
    assert softfloat.classify(form, constant(form.sign | form.nan, form.width)).number == 1 << 9
    assert softfloat.classify(form, constant(form.sign | least, form.width)).number == 1 << 1


@FORMATS
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_integers_come_and_go(form: Format, width: int, is_signed: bool) -> None:
    chance = random.Random(width)
    numbers = [any_bits(form, chance) for _ in range(600)] + operands(form)
    near = [Fraction(2) ** power + offset for power in (31, 32, 63, 64) for offset in range(-2, 3)]
    halves = [Fraction(n, 4) for n in range(-9, 10)]
    numbers += [bits_of(each, form) for each in near + [-each for each in near] + halves]
    for bits, mode in itertools.product(numbers, MODES):
        result, flags = softfloat.to_integer(
            form, constant(bits, form.width), width, constant(mode, 3), signed=is_signed
        )
        right = expected_integer(form, bits, width, mode, is_signed)
        assert (result.number, flags.number) == right, f"{bits:#x} mode {mode}"
    wholes = [chance.getrandbits(width) >> chance.randrange(width) for _ in range(600)]
    wholes += [0, 1, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1]
    for whole, mode in itertools.product(wholes, MODES):
        result, flags = softfloat.from_integer(
            form, constant(whole, width), constant(mode, 3), signed=is_signed
        )
        right = expected_from_integer(form, whole, width, mode, is_signed)
        assert (result.number, flags.number) == right


@pytest.mark.parametrize(
    ("source", "target"), [(SINGLE, DOUBLE), (DOUBLE, SINGLE)], ids=["widens", "narrows"]
)
def test_one_format_becomes_the_other(source: Format, target: Format) -> None:
    chance = random.Random(source.width)
    numbers = [any_bits(source, chance) for _ in range(1500)] + operands(source)
    # About the smallest and the largest of the narrow format, and half way between two of it.
    edges = [Fraction(2) ** SINGLE.smallest, Fraction(2) ** (SINGLE.smallest - 23)]
    edges += [Fraction(2) ** SINGLE.largest * (2 - Fraction(1, 2**23)), Fraction(1)]
    steps = [Fraction(2) ** -power for power in (20, 23, 24, 25, 26)]
    numbers += [
        bits_of(edge * (1 + sign * step), source)
        for edge in edges
        for step in steps
        for sign in (1, -1)
    ]
    for bits, mode in itertools.product(numbers, MODES):
        result, flags = softfloat.converted(
            source, target, constant(bits, source.width), constant(mode, 3)
        )
        right = expected_conversion(source, target, bits, mode)
        assert (result.number, flags.number) == right, f"{bits:#x} mode {mode}"

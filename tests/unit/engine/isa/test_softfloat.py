"""Floating point to the bit: against exact rational arithmetic, and against another emulator."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from vmlab.engine.isa import softfloat
from vmlab.engine.isa.softfloat import DOUBLE, SINGLE, Format
from vmlab.engine.isa.values import constant, signed

NV, DZ, OF, UF, NX = 16, 8, 4, 2, 1
RNE, RTZ, RDN, RUP, RMM = MODES = range(5)
FORMATS = pytest.mark.parametrize("form", [SINGLE, DOUBLE], ids=["single", "double"])


# What numbers mean, by rational arithmetic and nothing else.


def fraction_of(form: Format, bits: int) -> Fraction:
    stored = bits >> form.fraction & ((1 << form.exponent) - 1)
    field = bits & ((1 << form.fraction) - 1)
    if stored:
        field |= 1 << form.fraction
    number = Fraction(field) * Fraction(2) ** (max(stored, 1) - form.largest - form.fraction)
    return -number if bits & form.sign else number


def is_nan(form: Format, bits: int) -> bool:
    return bits & (form.sign - 1) > form.infinity


def is_signaling(form: Format, bits: int) -> bool:
    return is_nan(form, bits) and not bits >> (form.fraction - 1) & 1


def is_infinite(form: Format, bits: int) -> bool:
    return bits & (form.sign - 1) == form.infinity


def to_whole(number: Fraction, mode: int) -> int:
    """A rational number rounded to a whole one."""
    down = math.floor(number)
    rest = number - down
    up = down + 1
    if not rest:
        return down
    if mode in (RNE, RMM) and rest != Fraction(1, 2):
        return up if rest > Fraction(1, 2) else down
    return {
        RNE: up if down % 2 else down,
        RMM: up if number > 0 else down,
        RTZ: down if number > 0 else up,
        RDN: down,
        RUP: up,
    }[mode]


def rounded(form: Format, number: Fraction, mode: int, zero_sign: int = 0) -> tuple[int, int]:
    """The bits of a rational number and the flags of rounding it."""
    if number == 0:
        return form.sign * zero_sign, 0
    sign = form.sign if number < 0 else 0

    def spaced(exponent: int) -> Fraction:
        unit = Fraction(2) ** (exponent - form.fraction)
        return to_whole(number / unit, mode) * unit

    exponent = math.floor(math.log2(abs(number.numerator)) - math.log2(number.denominator))
    while Fraction(2) ** exponent > abs(number):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(number):
        exponent += 1
    tiny = abs(spaced(exponent)) < Fraction(2) ** form.smallest
    result = spaced(max(exponent, form.smallest))
    flags = NX if result != number else 0
    if abs(result) >= Fraction(2) ** (form.largest + 1):
        endless = mode in (RNE, RMM) or mode == (RDN if sign else RUP)
        return sign | (form.infinity - (not endless)), OF | NX
    if tiny and flags:
        flags |= UF
    scaled = abs(result) / Fraction(2) ** (form.smallest - form.fraction)
    assert scaled.denominator == 1
    units = scaled.numerator
    shift = max(units.bit_length() - form.precision, 0)
    return sign | (shift << form.fraction) + (units >> shift), flags


def bits_of(value: Fraction, form: Format) -> int:
    return rounded(form, value, RNE)[0]


# The operands that matter, and any others.


def operands(form: Format) -> list[int]:
    extremes = [0, 1, 2, form.infinity, form.infinity - 1, form.one, form.one - 1, form.one + 1]
    smallest_normal = 1 << form.fraction
    extremes += [smallest_normal, smallest_normal - 1, smallest_normal + 1, form.nan, form.nan + 5]
    extremes += [form.infinity + 1, bits_of(Fraction(3, 2), form), bits_of(Fraction(2), form)]
    extremes += [bits_of(Fraction(2) ** form.precision + offset, form) for offset in (-1, 0, 1)]
    extremes += [bits_of(Fraction(2) ** power, form) for power in (31, 32, 63, 64)]
    return [sign | bits for bits in extremes for sign in (0, form.sign)]


def any_bits(form: Format, chance: random.Random) -> int:
    kind = chance.random()
    if kind < 0.15:
        return chance.choice(operands(form))
    if kind < 0.5:
        # Near 1, where operands meet and cancel.
        stored = form.largest + chance.randint(-form.precision - 2, form.precision + 2)
    else:
        stored = chance.getrandbits(form.exponent)
    patterns = [chance.getrandbits(form.fraction), (1 << form.fraction) - 1, 0]
    field = patterns[0] if kind < 0.9 else chance.choice(patterns) ^ chance.getrandbits(2)
    return chance.getrandbits(1) * form.sign | stored << form.fraction | field


def cases(form: Format, arity: int, seed: int, count: int = 1500) -> list[tuple[int, ...]]:
    chance = random.Random(f"{seed}/{form.width}")
    some = [tuple(any_bits(form, chance) for _ in range(arity)) for _ in range(count)]
    if arity <= 2:
        some += itertools.product(operands(form), repeat=arity)
    return some


Outcome = tuple[int, int]


def special(form: Format, numbers: tuple[int, ...]) -> Outcome | None:
    """What any NaN among the operands makes of them."""
    if any(is_nan(form, bits) for bits in numbers):
        return form.nan, NV * any(is_signaling(form, bits) for bits in numbers)
    return None


def expected_fused(form: Format, a: int, b: int, c: int, mode: int) -> Outcome:
    ends = [is_infinite(form, bits) for bits in (a, b, c)]
    zero = any(
        is_infinite(form, one) and not other & (form.sign - 1) for one, other in ((a, b), (b, a))
    )
    if found := special(form, (a, b, c)):
        return found[0], NV if zero and not (is_nan(form, a) or is_nan(form, b)) else found[1]
    sign = (a ^ b) & form.sign
    if zero or ((ends[0] or ends[1]) and ends[2] and sign != c & form.sign):
        return form.nan, NV
    if ends[0] or ends[1]:
        return sign | form.infinity, 0
    if ends[2]:
        return c, 0
    product = fraction_of(form, a) * fraction_of(form, b)
    alike = sign == c & form.sign
    return rounded(
        form,
        product + fraction_of(form, c),
        mode,
        zero_sign=sign != 0 if alike else mode == RDN,
    )


def expected_add(form: Format, a: int, b: int, mode: int) -> Outcome:
    return expected_fused(form, a, form.one, b, mode)


def expected_multiply(form: Format, a: int, b: int, mode: int) -> Outcome:
    return expected_fused(form, a, b, (a ^ b) & form.sign, mode)


def expected_divide(form: Format, a: int, b: int, mode: int) -> Outcome:
    if found := special(form, (a, b)):
        return found
    sign = (a ^ b) & form.sign
    x, y = (is_infinite(form, bits) for bits in (a, b))
    nothing = [not bits & (form.sign - 1) for bits in (a, b)]
    if (x and y) or all(nothing):
        return form.nan, NV
    if x:
        return sign | form.infinity, 0
    if y or nothing[0]:
        return sign, 0
    if nothing[1]:
        return sign | form.infinity, DZ
    return rounded(form, fraction_of(form, a) / fraction_of(form, b), mode)


def expected_square_root(form: Format, a: int, mode: int) -> Outcome:
    if found := special(form, (a,)):
        return found
    if not a & (form.sign - 1):
        return a, 0
    if a & form.sign:
        return form.nan, NV
    if is_infinite(form, a):
        return a, 0
    number = fraction_of(form, a)
    scale = 4 ** (form.precision + form.largest + form.fraction)
    root = math.isqrt(int(number * scale * scale))
    # What is not a square lies between two whole numbers, and is not near a tie.
    exact = Fraction(root * root, scale * scale) == number
    return rounded(form, Fraction(2 * root + (not exact), 2 * scale), mode)


Operation = Callable[..., tuple[object, object]]
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


def expected_integer(form: Format, a: int, width: int, mode: int, is_signed: bool) -> Outcome:
    top = (1 << (width - is_signed)) - 1
    bottom = -top - 1 if is_signed else 0
    if is_nan(form, a) or a == form.infinity:
        return top, NV
    if is_infinite(form, a):
        return bottom & ((1 << width) - 1), NV
    number = fraction_of(form, a)
    whole = to_whole(number, mode)
    if not bottom <= whole <= top:
        return (top if whole > top else bottom) & ((1 << width) - 1), NV
    return whole & ((1 << width) - 1), NX * (whole != number)


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
        number = signed(whole, width) if is_signed else whole
        assert (result.number, flags.number) == rounded(form, Fraction(number), mode)


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
        if is_nan(source, bits):
            right = target.nan, NV * is_signaling(source, bits)
        elif is_infinite(source, bits):
            right = target.infinity | target.sign * (bits != source.infinity), 0
        else:
            sign = 1 if bits & source.sign else 0
            right = rounded(target, fraction_of(source, bits), mode, zero_sign=sign)
        assert (result.number, flags.number) == right, f"{bits:#x} mode {mode}"

"""Floating point by exact rational arithmetic: what is right, and operands that matter."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

from vmlab.engine.isa.softfloat import Format
from vmlab.engine.isa.values import signed

NV, DZ, OF, UF, NX = 16, 8, 4, 2, 1
RNE, RTZ, RDN, RUP, RMM = MODES = range(5)


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


def expected_conversion(source: Format, target: Format, a: int, mode: int) -> Outcome:
    if is_nan(source, a):
        return target.nan, NV * is_signaling(source, a)
    if is_infinite(source, a):
        return target.infinity | target.sign * (a != source.infinity), 0
    sign = 1 if a & source.sign else 0
    return rounded(target, fraction_of(source, a), mode, zero_sign=sign)


def expected_from_integer(
    form: Format, bits: int, width: int, mode: int, is_signed: bool
) -> Outcome:
    return rounded(form, Fraction(signed(bits, width) if is_signed else bits), mode)

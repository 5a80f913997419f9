"""Binary floating point to the bit, over the abstract value: IEEE 754-2019 as RISC-V has it.

Oracle and slow path of the F and D extensions (RISC-V unprivileged, chapters 20 and 21): every
rounding mode, every flag, tininess after rounding, one canonical NaN. Nothing here branches on a
value, so that the same functions compute numbers and emit straight code. NaN boxing, the dynamic
rounding mode and the accumulated flags belong to the instructions.

Inside, a number is a sign, an exponent and a significand whose highest set bit, bit 63, weighs
2**exponent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmlab.engine.isa.values import Value, constant, mask

INVALID: Final = 16
DIVIDE_BY_ZERO: Final = 8
OVERFLOW: Final = 4
UNDERFLOW: Final = 2
INEXACT: Final = 1

TO_NEAREST_EVEN: Final = 0
TOWARDS_ZERO: Final = 1
DOWN: Final = 2
UP: Final = 3
TO_NEAREST_AWAY: Final = 4

_FLAGS: Final = 5
_EXPONENT: Final = 32
_FAR: Final = -20_000
"""The exponent of a zero: below that of any product."""


@dataclass(frozen=True)
class Format:
    """An interchange format (IEEE 754-2019, 3.6).

    Attributes:
        width: Bits of the whole.
        fraction: Bits of the significand that are stored.
    """

    width: int
    fraction: int

    @property
    def precision(self) -> int:
        """Bits of a significand, with the one that is not stored."""
        return self.fraction + 1

    @property
    def exponent(self) -> int:
        """Bits of the stored exponent."""
        return self.width - self.fraction - 1

    @property
    def largest(self) -> int:
        """The largest exponent; also what is added to an exponent that is stored."""
        return mask(self.exponent - 1)

    @property
    def smallest(self) -> int:
        """The exponent of the smallest normal number."""
        return 1 - self.largest

    @property
    def infinity(self) -> int:
        """The bits of positive infinity."""
        return mask(self.exponent) << self.fraction

    @property
    def nan(self) -> int:
        """The bits of the one NaN that operations give (unprivileged, 20.3)."""
        return self.infinity | 1 << (self.fraction - 1)

    @property
    def one(self) -> int:
        """The bits of 1."""
        return self.largest << self.fraction

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << (self.width - 1)


SINGLE: Final = Format(32, 23)
DOUBLE: Final = Format(64, 52)


class _Number:
    """The parts of an operand, and what kind of number it is (each a single bit)."""

    def __init__(self, form: Format, bits: Value) -> None:
        self.form = form
        self.bits = bits
        self.sign = bits.bit(form.width - 1)
        stored = bits.bits_from(form.fraction, form.exponent)
        fraction = bits.low(form.fraction)
        extreme = stored.eq(mask(form.exponent))
        self.nan = extreme & fraction.ne(0)
        self.signaling = self.nan & ~bits.bit(form.fraction - 1)
        self.infinite = extreme & fraction.eq(0)
        self.zero = bits.low(form.width - 1).eq(0)
        self.subnormal = stored.eq(0) & fraction.ne(0)
        small = stored.eq(0)
        hidden = (~small).zero_extend(64) << 63
        raw = hidden | (fraction.zero_extend(64) << (63 - form.fraction))
        leading = raw.count_leading_zeros()
        biased = stored.zero_extend(_EXPONENT) | small.zero_extend(_EXPONENT)
        exponent = biased - form.largest - leading.low(_EXPONENT)
        self.significand = raw << (leading & 63)
        self.exponent = self.zero.select(constant(_FAR, _EXPONENT), exponent)


def _flag(condition: Value, flag: int) -> Value:
    return condition.select(constant(flag, _FLAGS), 0)


def _at_least(value: Value, limit: int) -> Value:
    return value.less(limit).select(limit, value)


def _at_most(value: Value, limit: int) -> Value:
    bound = constant(limit, value.width)
    return bound.less(value).select(bound, value)


def _shift_right_jamming(value: Value, amount: Value) -> Value:
    """Shift right by at most width - 1; the lowest bit stays set if any set bit was lost."""
    shifted = value >> amount
    return shifted | (shifted << amount).ne(value).zero_extend(value.width)


def _rounds_up(mode: Value, sign: Value, odd: Value, beyond: Value, half: int) -> Value:
    """Whether a magnitude grows by rounding `beyond`, the bits that go, whose half is `half`."""
    above = constant(half, beyond.width).below(beyond)
    tie = beyond.eq(half)
    some = beyond.ne(0)
    return (
        (mode.eq(TO_NEAREST_EVEN) & (above | (tie & odd)))
        | (mode.eq(TO_NEAREST_AWAY) & (above | tie))
        | (mode.eq(DOWN) & sign & some)
        | (mode.eq(UP) & ~sign & some)
    )


def _packed(
    form: Format, sign: Value, exponent: Value, significand: Value, mode: Value
) -> tuple[Value, Value]:
    """The number nearest to sign, exponent and significand, and its flags.

    A significand of 0 gives a zero of that sign. The lowest bit of the significand may stand for
    any number of bits below it.
    """
    dropped = 64 - form.precision
    half = 1 << (dropped - 1)
    nothing = significand.eq(0)

    # As if exponents had no limit: whether what rounds up to a normal number was tiny before.
    beyond = significand.low(dropped)
    full = significand >> dropped
    carries = full.eq(mask(form.precision)) & _rounds_up(mode, sign, full.bit(0), beyond, half)
    below = exponent.less(form.smallest)
    tiny = below & ~(exponent.eq(form.smallest - 1) & carries)

    distance = below.select(constant(form.smallest, _EXPONENT) - exponent, 0)
    shift = _at_most(distance, 63).zero_extend(64)
    kept = _shift_right_jamming(significand, shift)
    beyond = kept.low(dropped)
    top = kept >> dropped
    grows = _rounds_up(mode, sign, top.bit(0), beyond, half)
    top = top + grows.zero_extend(64)

    # The leading bit of a normal significand adds 1 to the stored exponent, and so does a carry.
    stored = below.select(constant(0, _EXPONENT), exponent + (form.largest - 1))
    inexact = beyond.ne(0)
    reached = stored + (top >> form.fraction).low(_EXPONENT)
    over = ~nothing & ~below & ~reached.less(mask(form.exponent))
    magnitude = (stored.zero_extend(64) << form.fraction) + top
    to_infinity = (
        mode.eq(TO_NEAREST_EVEN)
        | mode.eq(TO_NEAREST_AWAY)
        | (mode.eq(DOWN) & sign)
        | (mode.eq(UP) & ~sign)
    )
    extreme = to_infinity.select(constant(form.infinity, 64), form.infinity - 1)
    magnitude = over.select(extreme, magnitude)
    magnitude = nothing.select(constant(0, 64), magnitude)
    flags = (
        _flag(~nothing & (inexact | over), INEXACT)
        | _flag(~nothing & tiny & inexact, UNDERFLOW)
        | _flag(over, OVERFLOW)
    )
    return _signed(form, sign, magnitude.low(form.width)), flags


def _signed(form: Format, sign: Value, magnitude: Value) -> Value:
    return (sign.zero_extend(form.width) << (form.width - 1)) | magnitude


def _unless(
    special: Value, bits: Value | int, flags: Value | int, result: tuple[Value, Value]
) -> tuple[Value, Value]:
    """`bits` and `flags` where `special` is set, else `result`."""
    return special.select(bits, result[0]), special.select(flags, result[1])


def _invalid(condition: Value) -> Value:
    return _flag(condition, INVALID)


# ------------------------------------------------------------------------------------ arithmetic


def fused(form: Format, a: Value, b: Value, c: Value, mode: Value) -> tuple[Value, Value]:
    """a * b + c, rounded once (fusedMultiplyAdd, 5.4.1).

    Args:
        form: Of the operands and of the result.
        a: A factor, `form.width` bits.
        b: The other factor.
        c: What is added.
        mode: The rounding mode, 3 bits.

    Returns:
        The result's bits and its flags, 5 bits in the order of fcsr.
    """
    x, y, z = _Number(form, a), _Number(form, b), _Number(form, c)
    sign = x.sign ^ y.sign
    nothing = x.zero | y.zero
    # Of 128 bits the product's leading one is bit 124 or 125, the addend's bit 124. Bits below
    # them are lost only where the other one is so much larger that they decide but ties.
    product = (
        (x.significand >> 11).zero_extend(128) * (y.significand >> 11).zero_extend(128)
    ) << 20
    product = nothing.select(constant(0, 128), product)
    addend = z.zero.select(constant(0, 128), (z.significand >> 11).zero_extend(128) << 72)
    raised = nothing.select(constant(2 * _FAR, _EXPONENT), x.exponent + y.exponent)
    ahead = raised - z.exponent
    later = ahead.less(0)
    exponent = later.select(z.exponent, raised)
    back = _at_most(later.select(constant(0, _EXPONENT) - ahead, 0), 127).zero_extend(128)
    forth = _at_most(later.select(constant(0, _EXPONENT), ahead), 127).zero_extend(128)
    product = _shift_right_jamming(product, back)
    addend = _shift_right_jamming(addend, forth)

    apart = sign ^ z.sign
    reverse = apart & product.below(addend)
    total = apart.select(reverse.select(addend - product, product - addend), product + addend)
    empty = total.eq(0)
    leading = total.count_leading_zeros()
    total = total << (leading & 127)
    significand = (total >> 64).low(64) | total.low(64).ne(0).zero_extend(64)
    exponent = exponent + 3 - leading.low(_EXPONENT)
    # The sum of opposite numbers is +0, and -0 when rounding down (6.3).
    cancelled = apart.select(mode.eq(DOWN), sign)
    result_sign = empty.select(cancelled, reverse.select(z.sign, sign))
    result = _packed(form, result_sign, exponent, significand, mode)

    endless = x.infinite | y.infinite
    signaling = x.signaling | y.signaling | z.signaling
    undefined = (x.infinite & y.zero) | (x.zero & y.infinite)
    nan = x.nan | y.nan | z.nan
    opposed = ~nan & endless & z.infinite & apart
    infinity = constant(form.infinity, form.width)
    result = _unless(z.infinite, _signed(form, z.sign, infinity), 0, result)
    result = _unless(endless, _signed(form, sign, infinity), 0, result)
    wrong = signaling | undefined | opposed
    return _unless(nan | undefined | opposed, form.nan, _invalid(wrong), result)


def add(form: Format, a: Value, b: Value, mode: Value) -> tuple[Value, Value]:
    """a + b; arguments and result as for `fused`."""
    return fused(form, a, constant(form.one, form.width), b, mode)


def subtract(form: Format, a: Value, b: Value, mode: Value) -> tuple[Value, Value]:
    """a - b; arguments and result as for `fused`. The sign of a NaN says nothing."""
    return add(form, a, b ^ form.sign, mode)


def multiply(form: Format, a: Value, b: Value, mode: Value) -> tuple[Value, Value]:
    """a * b; arguments and result as for `fused`."""
    # A zero of the product's sign changes neither the product nor its sign.
    return fused(form, a, b, (a ^ b) & form.sign, mode)


def divide(form: Format, a: Value, b: Value, mode: Value) -> tuple[Value, Value]:
    """a / b; arguments and result as for `fused`."""
    x, y = _Number(form, a), _Number(form, b)
    sign = x.sign ^ y.sign
    dividend, divisor = x.significand >> 11, y.significand >> 11
    divisor = y.zero.select(constant(1, 64), divisor)
    smaller = dividend.below(divisor)
    remainder = (dividend << smaller.zero_extend(64)) - divisor
    remainder = y.zero.select(constant(0, 64), remainder)
    quotient = constant(1, 64)
    for _ in range(5):
        # The remainder is below the divisor, which has 53 bits: eleven more bits fit.
        remainder = remainder << 11
        digits = remainder.divide_unsigned(divisor)
        remainder = remainder - digits * divisor
        quotient = (quotient << 11) | digits
    significand = (quotient << 8) | remainder.ne(0).zero_extend(64)
    exponent = x.exponent - y.exponent - smaller.zero_extend(_EXPONENT)
    result = _packed(form, sign, exponent, significand, mode)

    nan = x.nan | y.nan
    undefined = (x.infinite & y.infinite) | (x.zero & y.zero)
    infinity = _signed(form, sign, constant(form.infinity, form.width))
    nothing = _signed(form, sign, constant(0, form.width))
    result = _unless(x.zero | y.infinite, nothing, 0, result)
    result = _unless(x.infinite, infinity, 0, result)
    result = _unless(y.zero & ~x.infinite, infinity, DIVIDE_BY_ZERO, result)
    wrong = x.signaling | y.signaling | undefined
    return _unless(nan | undefined, form.nan, _invalid(wrong), result)


def square_root(form: Format, a: Value, mode: Value) -> tuple[Value, Value]:
    """The square root of a; arguments and result as for `fused`."""
    x = _Number(form, a)
    odd = x.exponent.bit(0)
    # 54 bits of the radicand, two for each bit of the root; below them are zeros.
    radicand = (x.significand >> 11) << odd.zero_extend(64)
    root = remainder = constant(0, 64)
    for step in range(56):
        pair = radicand.bits_from(52 - 2 * step, 2).zero_extend(64) if step < 27 else 0
        remainder = (remainder << 2) | pair
        trial = (root << 2) | 1
        fits = ~remainder.below(trial)
        remainder = remainder - fits.select(trial, 0)
        root = (root << 1) | fits.zero_extend(64)
    significand = (root << 8) | remainder.ne(0).zero_extend(64)
    exponent = (x.exponent - odd.zero_extend(_EXPONENT)).shift_right_signed(1)
    result = _packed(form, constant(0, 1), exponent, significand, mode)

    undefined = x.sign & ~x.zero & ~x.nan
    result = _unless(x.zero | (x.infinite & ~x.sign), a, 0, result)
    return _unless(x.nan | undefined, form.nan, _invalid(x.signaling | undefined), result)


# ----------------------------------------------------------------------------------- comparisons


def _below(x: _Number, y: _Number) -> Value:
    """Whether x < y; of two zeros neither is."""
    width = x.form.width - 1
    smaller = x.bits.low(width).below(y.bits.low(width))
    larger = y.bits.low(width).below(x.bits.low(width))
    alike = x.sign.select(larger, smaller)
    return ~(x.zero & y.zero) & (x.sign ^ y.sign).select(x.sign, alike)


def _same(x: _Number, y: _Number) -> Value:
    return (x.zero & y.zero) | x.bits.eq(y.bits)


def equal(form: Format, a: Value, b: Value) -> tuple[Value, Value]:
    """One bit, whether a == b, and flags; a quiet NaN is no error (compareQuietEqual)."""
    x, y = _Number(form, a), _Number(form, b)
    ordered = ~(x.nan | y.nan)
    return ordered & _same(x, y), _invalid(x.signaling | y.signaling)


def less(form: Format, a: Value, b: Value) -> tuple[Value, Value]:
    """One bit, whether a < b, and flags; any NaN is invalid (compareSignalingLess)."""
    x, y = _Number(form, a), _Number(form, b)
    unordered = x.nan | y.nan
    return ~unordered & _below(x, y), _invalid(unordered)


def less_or_equal(form: Format, a: Value, b: Value) -> tuple[Value, Value]:
    """One bit, whether a <= b, and flags; any NaN is invalid (compareSignalingLessEqual)."""
    x, y = _Number(form, a), _Number(form, b)
    unordered = x.nan | y.nan
    return ~unordered & (_same(x, y) | _below(x, y)), _invalid(unordered)


def minimum(form: Format, a: Value, b: Value) -> tuple[Value, Value]:
    """The smaller number and flags: -0 is below +0, a NaN loses (minimumNumber, 9.6)."""
    return _extreme(form, a, b, largest=False)


def maximum(form: Format, a: Value, b: Value) -> tuple[Value, Value]:
    """The larger number and flags: +0 is above -0, a NaN loses (maximumNumber, 9.6)."""
    return _extreme(form, a, b, largest=True)


def _extreme(form: Format, a: Value, b: Value, *, largest: bool) -> tuple[Value, Value]:
    x, y = _Number(form, a), _Number(form, b)
    first = _below(x, y) | (x.zero & y.zero & x.sign)
    if largest:
        first = _below(y, x) | (x.zero & y.zero & ~x.sign)
    bits = y.nan.select(a, x.nan.select(b, first.select(a, b)))
    bits = (x.nan & y.nan).select(form.nan, bits)
    return bits, _invalid(x.signaling | y.signaling)


def classify(form: Format, a: Value) -> Value:
    """The mask of fclass, 10 bits of which one is set (unprivileged, table 20.5)."""
    x = _Number(form, a)
    normal = ~(x.nan | x.infinite | x.zero | x.subnormal)
    classes = [
        x.sign & x.infinite,
        x.sign & normal,
        x.sign & x.subnormal,
        x.sign & x.zero,
        ~x.sign & x.zero,
        ~x.sign & x.subnormal,
        ~x.sign & normal,
        ~x.sign & x.infinite,
        x.signaling,
        x.nan & ~x.signaling,
    ]
    result = constant(0, len(classes))
    for position, member in enumerate(classes):
        result = result | (member.zero_extend(len(classes)) << position)
    return result


# ----------------------------------------------------------------------------------- conversions


def converted(source: Format, target: Format, a: Value, mode: Value) -> tuple[Value, Value]:
    """A number of one format in another, and flags (convertFormat, 5.4.2)."""
    x = _Number(source, a)
    significand = x.zero.select(constant(0, 64), x.significand)
    result = _packed(target, x.sign, x.exponent, significand, mode)
    infinity = _signed(target, x.sign, constant(target.infinity, target.width))
    result = _unless(x.infinite, infinity, 0, result)
    return _unless(x.nan, target.nan, _invalid(x.signaling), result)


def from_integer(form: Format, number: Value, mode: Value, *, signed: bool) -> tuple[Value, Value]:
    """An integer of at most 64 bits as a floating-point number, and flags."""
    sign = number.bit(number.width - 1) if signed else constant(0, 1)
    wide = number.sign_extend(64) if signed else number.zero_extend(64)
    magnitude = sign.select(-wide, wide)
    leading = magnitude.count_leading_zeros()
    significand = magnitude << (leading & 63)
    exponent = constant(63, _EXPONENT) - leading.low(_EXPONENT)
    return _packed(form, sign, exponent, significand, mode)


def to_integer(
    form: Format, a: Value, width: int, mode: Value, *, signed: bool
) -> tuple[Value, Value]:
    """A number as an integer of `width` bits, at most 64, and flags.

    What has no place is the nearest that has one, and a NaN the largest; both are invalid
    (unprivileged, table 20.4).
    """
    x = _Number(form, a)
    # Two bits below the point: the first of the fraction, and whether there is more of it.
    exponent = _at_most(_at_least(x.exponent, -2), 64)
    amount = (constant(125, _EXPONENT) - exponent).zero_extend(128)
    wide = _shift_right_jamming(x.significand.zero_extend(128) << 64, amount)
    wide = x.zero.select(constant(0, 128), wide)
    beyond = wide.low(2)
    magnitude = wide >> 2
    grows = _rounds_up(mode, x.sign, magnitude.bit(0), beyond, 2)
    magnitude = magnitude + grows.zero_extend(128)

    top = mask(width - 1) if signed else mask(width)
    bottom = 1 << (width - 1) if signed else 0
    over = ~x.sign & constant(top, 128).below(magnitude)
    under = x.sign & constant(bottom, 128).below(magnitude)
    low = magnitude.low(width)
    result = x.sign.select(-low, low), _flag(beyond.ne(0), INEXACT)
    result = _unless(over | (x.infinite & ~x.sign), top, INVALID, result)
    result = _unless(under | (x.infinite & x.sign), bottom, INVALID, result)
    return _unless(x.nan, top, INVALID, result)

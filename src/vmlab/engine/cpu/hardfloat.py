"""When the host's floating-point unit gives the guest's bits, and no flag that is not there yet.

The way of QEMU's hardfloat (fpu/softfloat.c), with more cases: rounding to nearest even, a result
that is finite and not tiny, and fcsr inexact already, or the result exact, which is found out with
a few operations more. Everything else, NaNs first of all, raises `Rare`, and softfloat does it.
The host's rounding mode and flags (MXCSR, FPCR) are neither read nor written.

Each function takes and gives what the routine of its name in vmlab.engine.cpu.floating does. They
are for generated code; the reference executor computes by softfloat alone, and so is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.engine.cpu.core import Core, Rare
from vmlab.engine.cpu.layout import FFLAGS
from vmlab.engine.isa import hostfloat
from vmlab.engine.isa.softfloat import (
    DOUBLE,
    INEXACT,
    SINGLE,
    TO_NEAREST_EVEN,
    TOWARDS_ZERO,
    Format,
)
from vmlab.engine.isa.values import Value

Fast = Callable[..., Value]


def _magnitude(form: Format, bits: Value) -> Value:
    return bits & (form.sign - 1)


def _is_zero(form: Format, bits: Value) -> Value:
    return _magnitude(form, bits).eq(0)


def _finite(form: Format, bits: Value) -> Value:
    return _magnitude(form, bits).below(form.infinity)


def _ordinary(form: Format, bits: Value) -> Value:
    """One bit: finite and above the smallest normal number.

    That one itself may come of a number that was tiny before it was rounded.
    """
    smallest = 1 << form.fraction
    return (_magnitude(form, bits) - (smallest + 1)).below(form.infinity - smallest - 1)


def _stored(form: Format, bits: Value) -> Value:
    return bits.bits_from(form.fraction, form.exponent).zero_extend(32)


def _zeros_below(form: Format, bits: Value) -> Value:
    """The zeros at the end of a normal number's significand."""
    significand = (bits & ((1 << form.fraction) - 1)) | 1 << form.fraction
    return significand.count_trailing_zeros().low(32)


def _is_product(form: Format, a: Value, b: Value, product: Value) -> Value:
    """One bit: a * b is just `product`, which is a normal number and what the host makes of it."""
    if form is SINGLE:
        # The product of two singles fits into a double.
        x, y, z = (hostfloat.converted(SINGLE, DOUBLE, one) for one in (a, b, product))
        return hostfloat.equal(DOUBLE, hostfloat.multiply(DOUBLE, x, y), z)
    # The zeros at the ends of the factors add up; those digits must be zeros that get lost. Where a
    # factor is subnormal one more is asked for than would do.
    lost = _stored(form, product) - _stored(form, a) - _stored(form, b)
    lost = lost + (form.largest + form.fraction)
    zeros = _zeros_below(form, a) + _zeros_below(form, b)
    return ~zeros.less(lost)


def _is_sum(form: Format, a: Value, b: Value, total: Value) -> Value:
    """One bit: a + b is just `total` (Knuth's two-sum; The Art of Computer Programming, 4.2.2)."""
    other = hostfloat.subtract(form, total, a)
    first = hostfloat.subtract(form, a, hostfloat.subtract(form, total, other))
    second = hostfloat.subtract(form, b, other)
    return hostfloat.equal(form, hostfloat.add(form, first, second), Value(0, form.width))


def _expect_no_flag(core: Core, exact: Callable[[], Value]) -> None:
    """Go on where inexact is set, or would not be."""
    if not core.likely((core[FFLAGS] & INEXACT).ne(0)):
        core.expect(exact())


def _expect_nearest(core: Core, mode: Value) -> None:
    core.expect(mode.eq(TO_NEAREST_EVEN))


def _expect_ordinary(core: Core, form: Format, bits: Value, zero: Callable[[], Value]) -> bool:
    """Go on where a result is ordinary, or where it is an exact zero; whether it is not zero."""
    if core.likely(_ordinary(form, bits)):
        return True
    core.expect(_is_zero(form, bits) & zero())
    return False


def sum_of(form: Format, *, negate: bool) -> Fast:
    """a + b, or a - b. A sum that is tiny is exact."""

    def compute(core: Core, a: Value, b: Value, mode: Value) -> Value:
        _expect_nearest(core, mode)
        x, y = a.low(form.width), b.low(form.width)
        if negate:
            y = y ^ form.sign
        bits = hostfloat.add(form, x, y)
        core.expect(_finite(form, bits))
        _expect_no_flag(core, lambda: _is_sum(form, x, y, bits))
        return bits.zero_extend(64)

    return compute


def product(form: Format) -> Fast:
    """a * b."""

    def compute(core: Core, a: Value, b: Value, mode: Value) -> Value:
        _expect_nearest(core, mode)
        x, y = a.low(form.width), b.low(form.width)
        bits = hostfloat.multiply(form, x, y)
        if _expect_ordinary(core, form, bits, lambda: _is_zero(form, x) | _is_zero(form, y)):
            _expect_no_flag(core, lambda: _is_product(form, x, y, bits))
        return bits.zero_extend(64)

    return compute


def quotient(form: Format) -> Fast:
    """a / b."""

    def compute(core: Core, a: Value, b: Value, mode: Value) -> Value:
        _expect_nearest(core, mode)
        x, y = a.low(form.width), b.low(form.width)
        bits = hostfloat.divide(form, x, y)

        def exact() -> Value:
            back = hostfloat.multiply(form, bits, y)
            same = hostfloat.equal(form, back, x) & _ordinary(form, x)
            return same & _is_product(form, bits, y, x)

        # A zero by a NaN or by zero is a NaN.
        if _expect_ordinary(core, form, bits, lambda: _is_zero(form, x)):
            _expect_no_flag(core, exact)
        return bits.zero_extend(64)

    return compute


def square_root(form: Format) -> Fast:
    """The square root of a."""

    def compute(core: Core, a: Value, mode: Value) -> Value:
        _expect_nearest(core, mode)
        x = a.low(form.width)
        bits = hostfloat.square_root(form, x)

        def exact() -> Value:
            back = hostfloat.multiply(form, bits, bits)
            same = hostfloat.equal(form, back, x) & _ordinary(form, x)
            return same & _is_product(form, bits, bits, x)

        # Only a zero has the root zero.
        if _expect_ordinary(core, form, bits, lambda: Value(1, 1)):
            _expect_no_flag(core, exact)
        return bits.zero_extend(64)

    return compute


def fused(form: Format, *, negate_product: bool, negate_addend: bool) -> Fast:
    """a * b + c, rounded once, of any signs; where the host can do it."""

    def compute(core: Core, a: Value, b: Value, c: Value, mode: Value) -> Value:
        if not core.host_fuses:
            raise Rare
        _expect_nearest(core, mode)
        x, y, z = (value.low(form.width) for value in (a, b, c))
        if negate_product:
            x = x ^ form.sign
        if negate_addend:
            z = z ^ form.sign
        bits = hostfloat.fused(form, x, y, z)

        def nothing() -> Value:
            return _is_zero(form, x) | _is_zero(form, y)

        if _expect_ordinary(core, form, bits, nothing):
            # The sum of a zero and a number is exact; of others it is not worth finding out.
            _expect_no_flag(core, nothing)
        return bits.zero_extend(64)

    return compute


def compared(form: Format, relation: Callable[[Format, Value, Value], Value]) -> Fast:
    """Whether a relation holds between two numbers."""

    def compute(core: Core, a: Value, b: Value) -> Value:
        x, y = a.low(form.width), b.low(form.width)
        core.expect(~hostfloat.unordered(form, x, y))
        return relation(form, x, y).zero_extend(64)

    return compute


def extreme(form: Format, *, largest: bool) -> Fast:
    """The smaller or the larger of two numbers; -0 is smaller than 0."""

    def compute(core: Core, a: Value, b: Value) -> Value:
        x, y = a.low(form.width), b.low(form.width)
        core.expect(~hostfloat.unordered(form, x, y))
        # Equal numbers have equal bits, or are zeros of which one has the sign.
        alike = x & y if largest else x | y
        first = hostfloat.less(form, *((y, x) if largest else (x, y)))
        bits = hostfloat.equal(form, x, y).select(alike, first.select(x, y))
        return bits.zero_extend(64)

    return compute


def to_integer(form: Format, width: int, *, signed: bool) -> Fast:
    """A number as an integer, of which 63 bits are tried, where no bit is cut off above."""
    digits = width - 1 if signed else min(width, 63)
    limit = Value((form.largest + digits) << form.fraction, form.width)

    def compute(core: Core, a: Value, mode: Value) -> Value:
        x = a.low(form.width)
        # A negative number is above any limit for who looks at its bits only.
        core.expect((_magnitude(form, x) if signed else x).below(limit))
        number = hostfloat.truncated(form, x)
        back = hostfloat.from_integer(form, number, signed=True)
        if not core.likely(mode.eq(TOWARDS_ZERO) & (core[FFLAGS] & INEXACT).ne(0)):
            core.expect(hostfloat.equal(form, back, x))
        return number.low(width).sign_extend(64)

    return compute


def from_integer(form: Format, width: int, *, signed: bool) -> Fast:
    """An integer as a number; up to the precision of the format none is rounded."""

    def compute(core: Core, a: Value, mode: Value) -> Value:
        number = a.low(width)
        if width > form.precision:
            bound = 1 << form.precision
            small = (number + bound).below(2 * bound) if signed else number.below(bound)
            if not core.likely(small):
                _expect_nearest(core, mode)
                core.expect((core[FFLAGS] & INEXACT).ne(0))
        return hostfloat.from_integer(form, number, signed=signed).zero_extend(64)

    return compute


def narrowed() -> Fast:
    """A double as a single."""

    def compute(core: Core, a: Value, mode: Value) -> Value:
        _expect_nearest(core, mode)
        bits = hostfloat.converted(DOUBLE, SINGLE, a)

        def exact() -> Value:
            return hostfloat.equal(DOUBLE, hostfloat.converted(SINGLE, DOUBLE, bits), a)

        if _expect_ordinary(core, SINGLE, bits, lambda: _is_zero(DOUBLE, a)):
            _expect_no_flag(core, exact)
        return bits.zero_extend(64)

    return compute


def widened() -> Fast:
    """A single as a double, which has all of them."""

    def compute(core: Core, a: Value, mode: Value) -> Value:
        x = a.low(SINGLE.width)
        core.expect(~hostfloat.unordered(SINGLE, x, x))
        return hostfloat.converted(SINGLE, DOUBLE, x)

    return compute

"""Floating-point instructions as routines: softfloat, and the flags that add up in fcsr.

Code that is generated for the usual case uses the host's unit (vmlab.engine.cpu.hardfloat).

A routine takes and gives 64 bits, of which a single-precision number is the lower half; NaN boxing
is the instructions' (vmlab.engine.isa.riscv64.floating).
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.engine.cpu import hardfloat
from vmlab.engine.cpu.core import Core, Routine
from vmlab.engine.cpu.layout import FFLAGS, FRM
from vmlab.engine.isa import hostfloat, softfloat
from vmlab.engine.isa.cpu import Illegal
from vmlab.engine.isa.softfloat import DOUBLE, SINGLE, Format
from vmlab.engine.isa.values import Value

Result = tuple[Value, Value]
DYNAMIC = 7
FLOATING: dict[str, Callable[..., Value]] = {}


def rounding_mode(core: Core, encoded: Value) -> Value:
    """The mode that an instruction asks for, or the one of fcsr.

    Raises:
        Illegal: it is none of the five.
    """
    encoded = encoded & 7
    mode = encoded.eq(DYNAMIC).select(core[FRM], encoded)
    if core.hurried:
        core.expect(mode.below(softfloat.TO_NEAREST_AWAY + 1))
    elif Value(softfloat.TO_NEAREST_AWAY, 64).below(mode):
        raise Illegal
    return mode


def _define(
    name: str, arguments: int, compute: Callable[..., Result], fast: hardfloat.Fast
) -> None:
    def body(core: Core, *operands: Value) -> Value:
        result, flags = compute(*operands)
        core[FFLAGS] = core[FFLAGS] | flags.zero_extend(64)
        return result

    made = Routine(f"softfloat.{name}", body, arguments, traps=False)

    def call(core: Core, *operands: Value) -> Value:
        return fast(core, *operands) if core.hurried else core.call(made, *operands)

    FLOATING[name] = call


def _arithmetic(
    form: Format, operation: Callable[[Format, Value, Value, Value], Result]
) -> Callable[..., Result]:
    def compute(a: Value, b: Value, mode: Value) -> Result:
        bits, flags = operation(form, a.low(form.width), b.low(form.width), mode.low(3))
        return bits.zero_extend(64), flags

    return compute


def _fused(form: Format, *, negate_product: bool, negate_addend: bool) -> Callable[..., Result]:
    def compute(a: Value, b: Value, c: Value, mode: Value) -> Result:
        x, y, z = (value.low(form.width) for value in (a, b, c))
        if negate_product:
            x = x ^ form.sign
        if negate_addend:
            z = z ^ form.sign
        bits, flags = softfloat.fused(form, x, y, z, mode.low(3))
        return bits.zero_extend(64), flags

    return compute


def _square_root(form: Format) -> Callable[..., Result]:
    def compute(a: Value, mode: Value) -> Result:
        bits, flags = softfloat.square_root(form, a.low(form.width), mode.low(3))
        return bits.zero_extend(64), flags

    return compute


def _two(
    form: Format, operation: Callable[[Format, Value, Value], Result]
) -> Callable[..., Result]:
    def compute(a: Value, b: Value) -> Result:
        bits, flags = operation(form, a.low(form.width), b.low(form.width))
        return bits.zero_extend(64), flags

    return compute


def _to_integer(form: Format, width: int, *, signed: bool) -> Callable[..., Result]:
    def compute(a: Value, mode: Value) -> Result:
        number, flags = softfloat.to_integer(
            form, a.low(form.width), width, mode.low(3), signed=signed
        )
        return number.sign_extend(64), flags

    return compute


def _from_integer(form: Format, width: int, *, signed: bool) -> Callable[..., Result]:
    def compute(a: Value, mode: Value) -> Result:
        bits, flags = softfloat.from_integer(form, a.low(width), mode.low(3), signed=signed)
        return bits.zero_extend(64), flags

    return compute


def _converted(source: Format, target: Format) -> Callable[..., Result]:
    def compute(a: Value, mode: Value) -> Result:
        bits, flags = softfloat.converted(source, target, a.low(source.width), mode.low(3))
        return bits.zero_extend(64), flags

    return compute


INTEGERS = {"w": (32, True), "wu": (32, False), "l": (64, True), "lu": (64, False)}

for _letter, _form in (("s", SINGLE), ("d", DOUBLE)):
    for _name, _operation, _fast in (
        ("fadd", softfloat.add, hardfloat.sum_of(_form, negate=False)),
        ("fsub", softfloat.subtract, hardfloat.sum_of(_form, negate=True)),
        ("fmul", softfloat.multiply, hardfloat.product(_form)),
        ("fdiv", softfloat.divide, hardfloat.quotient(_form)),
    ):
        _define(f"{_name}.{_letter}", 3, _arithmetic(_form, _operation), _fast)
    for _name, _product, _addend in (
        ("fmadd", False, False),
        ("fmsub", False, True),
        ("fnmsub", True, False),
        ("fnmadd", True, True),
    ):
        _define(
            f"{_name}.{_letter}",
            4,
            _fused(_form, negate_product=_product, negate_addend=_addend),
            hardfloat.fused(_form, negate_product=_product, negate_addend=_addend),
        )
    _define(f"fsqrt.{_letter}", 2, _square_root(_form), hardfloat.square_root(_form))
    for _name, _comparison, _fast in (
        ("feq", softfloat.equal, hardfloat.compared(_form, hostfloat.equal)),
        ("flt", softfloat.less, hardfloat.compared(_form, hostfloat.less)),
        ("fle", softfloat.less_or_equal, hardfloat.compared(_form, hostfloat.less_or_equal)),
        ("fmin", softfloat.minimum, hardfloat.extreme(_form, largest=False)),
        ("fmax", softfloat.maximum, hardfloat.extreme(_form, largest=True)),
    ):
        _define(f"{_name}.{_letter}", 2, _two(_form, _comparison), _fast)
    for _name, (_width, _is_signed) in INTEGERS.items():
        _define(
            f"fcvt.{_name}.{_letter}",
            2,
            _to_integer(_form, _width, signed=_is_signed),
            hardfloat.to_integer(_form, _width, signed=_is_signed),
        )
        _define(
            f"fcvt.{_letter}.{_name}",
            2,
            _from_integer(_form, _width, signed=_is_signed),
            hardfloat.from_integer(_form, _width, signed=_is_signed),
        )
_define("fcvt.s.d", 2, _converted(DOUBLE, SINGLE), hardfloat.narrowed())
_define("fcvt.d.s", 2, _converted(SINGLE, DOUBLE), hardfloat.widened())

"""Floating-point instructions as routines: softfloat, and the flags that add up in fcsr.

A routine takes and gives 64 bits, of which a single-precision number is the lower half; NaN boxing
is the instructions' (vmlab.engine.isa.riscv64.floating).
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.engine.cpu.core import Core, Routine
from vmlab.engine.cpu.layout import FFLAGS, FRM
from vmlab.engine.isa import softfloat
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
    if Value(softfloat.TO_NEAREST_AWAY, 64).below(mode):
        raise Illegal
    return mode


def _define(name: str, arguments: int, compute: Callable[..., Result]) -> None:
    def body(core: Core, *operands: Value) -> Value:
        result, flags = compute(*operands)
        core[FFLAGS] = core[FFLAGS] | flags.zero_extend(64)
        return result

    made = Routine(f"softfloat.{name}", body, arguments, traps=False)
    FLOATING[name] = lambda core, *operands: core.call(made, *operands)


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
    for _name, _operation in (
        ("fadd", softfloat.add),
        ("fsub", softfloat.subtract),
        ("fmul", softfloat.multiply),
        ("fdiv", softfloat.divide),
    ):
        _define(f"{_name}.{_letter}", 3, _arithmetic(_form, _operation))
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
        )
    _define(f"fsqrt.{_letter}", 2, _square_root(_form))
    for _name, _comparison in (
        ("feq", softfloat.equal),
        ("flt", softfloat.less),
        ("fle", softfloat.less_or_equal),
        ("fmin", softfloat.minimum),
        ("fmax", softfloat.maximum),
    ):
        _define(f"{_name}.{_letter}", 2, _two(_form, _comparison))
    for _name, (_width, _is_signed) in INTEGERS.items():
        _define(f"fcvt.{_name}.{_letter}", 2, _to_integer(_form, _width, signed=_is_signed))
        _define(f"fcvt.{_letter}.{_name}", 2, _from_integer(_form, _width, signed=_is_signed))
_define("fcvt.s.d", 2, _converted(DOUBLE, SINGLE))
_define("fcvt.d.s", 2, _converted(SINGLE, DOUBLE))

"""The host's own floating-point unit as operations of the abstract value, in generated code only.

Each is one IEEE 754 operation, rounded to nearest, ties to even: the environment that the host has
by default and that nothing here changes. What NaN comes out and what flags there would be is not
told; when the bits are the guest's is for vmlab.engine.cpu.hardfloat to know. With numbers there is
no such operation: vmlab.engine.isa.softfloat computes those.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from vmlab.engine.isa.softfloat import DOUBLE, Format
from vmlab.engine.isa.values import Emitter, Value

_TYPES: Final = {32: "float", 64: "double"}


def _emitter(*operands: Value) -> Emitter:
    for operand in operands:
        if operand.emitter is not None:
            return operand.emitter
    raise ValueError("the host's floating point computes in generated code only")


def _float(form: Format, bits: Value, emitter: Emitter) -> str:
    """The name of an operand as a floating-point number."""
    assert bits.width == form.width
    return emitter.operation(f"bitcast {bits.typed} to {_TYPES[form.width]}")


def _bits(form: Format, name: str, emitter: Emitter) -> Value:
    """A floating-point number as bits."""
    text = f"bitcast {_TYPES[form.width]} {name} to i{form.width}"
    return Value(emitter.operation(text), form.width, emitter)


def _operation(opcode: str, form: Format, *operands: Value) -> Value:
    emitter = _emitter(*operands)
    names = ", ".join(_float(form, operand, emitter) for operand in operands)
    name = emitter.operation(f"{opcode} {_TYPES[form.width]} {names}")
    return _bits(form, name, emitter)


def _intrinsic(name: str, form: Format, *operands: Value) -> Value:
    emitter = _emitter(*operands)
    kind = _TYPES[form.width]
    values = ", ".join(f"{kind} {_float(form, operand, emitter)}" for operand in operands)
    result = emitter.operation(f"call {kind} @llvm.{name}.f{form.width}({values})")
    return _bits(form, result, emitter)


def _compare(predicate: str, form: Format, a: Value, b: Value) -> Value:
    emitter = _emitter(a, b)
    x, y = _float(form, a, emitter), _float(form, b, emitter)
    text = f"fcmp {predicate} {_TYPES[form.width]} {x}, {y}"
    return Value(emitter.operation(text), 1, emitter)


# Of a format and numbers of it.

add: Final = partial(_operation, "fadd")
subtract: Final = partial(_operation, "fsub")
multiply: Final = partial(_operation, "fmul")
divide: Final = partial(_operation, "fdiv")
square_root: Final = partial(_intrinsic, "sqrt")
fused: Final = partial(_intrinsic, "fma")
"""a * b + c, rounded once; only for hosts that have it, others would call a library."""

# One bit each.

unordered: Final = partial(_compare, "uno")
"""At least one is a NaN."""
equal: Final = partial(_compare, "oeq")
"""a == b, and neither is a NaN; so with those that follow."""
less: Final = partial(_compare, "olt")
less_or_equal: Final = partial(_compare, "ole")


def converted(source: Format, target: Format, a: Value) -> Value:
    """A number of one format in another one."""
    if source is target:
        return a
    emitter = _emitter(a)
    opcode = "fpext" if target is DOUBLE else "fptrunc"
    kinds = _TYPES[source.width], _TYPES[target.width]
    name = emitter.operation(f"{opcode} {kinds[0]} {_float(source, a, emitter)} to {kinds[1]}")
    return _bits(target, name, emitter)


def from_integer(form: Format, number: Value, *, signed: bool) -> Value:
    """An integer of 32 or 64 bits as a number."""
    emitter = _emitter(number)
    opcode = "sitofp" if signed else "uitofp"
    name = emitter.operation(f"{opcode} {number.typed} to {_TYPES[form.width]}")
    return _bits(form, name, emitter)


def truncated(form: Format, a: Value) -> Value:
    """A number as a signed integer of 64 bits, rounded towards zero.

    Its magnitude must be below 2**63; other numbers must not come here.
    """
    emitter = _emitter(a)
    name = emitter.operation(f"fptosi {_TYPES[form.width]} {_float(form, a, emitter)} to i64")
    return Value(name, 64, emitter)

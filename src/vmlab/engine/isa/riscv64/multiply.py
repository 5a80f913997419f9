"""M, multiplication and division (RISC-V unprivileged 20191213, chapter 7)."""

from __future__ import annotations

from vmlab.engine.isa.encoding import Group
from vmlab.engine.isa.riscv64.base import Operation, binary, binary_word
from vmlab.engine.isa.values import Value

multiply = Group("M")


def _product(a: Value, b: Value) -> Value:
    return a * b


def _high(a: Value, b: Value) -> Value:
    return ((a.sign_extend(128) * b.sign_extend(128)) >> 64).low(64)


def _high_mixed(a: Value, b: Value) -> Value:
    return ((a.sign_extend(128) * b.zero_extend(128)) >> 64).low(64)


def _high_unsigned(a: Value, b: Value) -> Value:
    return ((a.zero_extend(128) * b.zero_extend(128)) >> 64).low(64)


def _safe_signed_divisor(a: Value, b: Value) -> Value:
    """1 where a division by `b` has no quotient: by 0, and of the lowest number by -1."""
    overflow = a.eq(1 << (a.width - 1)) & b.eq(-1)
    return (b.eq(0) | overflow).select(1, b)


def _quotient(a: Value, b: Value) -> Value:
    # The lowest number divided by 1 is itself, which is what an overflow gives (table 7.1).
    return b.eq(0).select(-1, a.divide_signed(_safe_signed_divisor(a, b)))


def _remainder(a: Value, b: Value) -> Value:
    return b.eq(0).select(a, a.remainder_signed(_safe_signed_divisor(a, b)))


def _quotient_unsigned(a: Value, b: Value) -> Value:
    zero = b.eq(0)
    return zero.select(-1, a.divide_unsigned(zero.select(1, b)))


def _remainder_unsigned(a: Value, b: Value) -> Value:
    zero = b.eq(0)
    return zero.select(a, a.remainder_unsigned(zero.select(1, b)))


_OPERATIONS: tuple[tuple[str, str, Operation, bool], ...] = (
    ("mul", "000", _product, True),
    ("mulh", "001", _high, False),
    ("mulhsu", "010", _high_mixed, False),
    ("mulhu", "011", _high_unsigned, False),
    ("div", "100", _quotient, True),
    ("divu", "101", _quotient_unsigned, True),
    ("rem", "110", _remainder, True),
    ("remu", "111", _remainder_unsigned, True),
)
for _name, _funct3, _operation, _has_word in _OPERATIONS:
    multiply.add(_name, f"0000001 rs2 rs1 {_funct3} rd 0110011", binary(_operation))
    if _has_word:
        multiply.add(_name + "w", f"0000001 rs2 rs1 {_funct3} rd 0111011", binary_word(_operation))

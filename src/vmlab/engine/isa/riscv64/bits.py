"""Zba, Zbb and Zbs, bit manipulation (RISC-V bit-manipulation 1.0.0)."""

from __future__ import annotations

from collections.abc import Callable

from vmlab.engine.isa.cpu import Cpu
from vmlab.engine.isa.encoding import Body, Group
from vmlab.engine.isa.riscv64.base import Operation, binary, binary_word
from vmlab.engine.isa.values import Value

address_bits = Group("Zba")
basic_bits = Group("Zbb")
single_bits = Group("Zbs")


# ------------------------------------------------------------------------------------------ Zba


def _shift_add(amount: int, *, word: bool) -> Body:
    def body(cpu: Cpu) -> None:
        index = cpu.rs1.low(32).zero_extend(64) if word else cpu.rs1
        cpu.rd = cpu.rs2 + (index << amount)

    return body


address_bits.add("add.uw", "0000100 rs2 rs1 000 rd 0111011", _shift_add(0, word=True))
for _amount, _funct3 in ((1, "010"), (2, "100"), (3, "110")):
    address_bits.add(
        f"sh{_amount}add",
        f"0010000 rs2 rs1 {_funct3} rd 0110011",
        _shift_add(_amount, word=False),
    )
    address_bits.add(
        f"sh{_amount}add.uw",
        f"0010000 rs2 rs1 {_funct3} rd 0111011",
        _shift_add(_amount, word=True),
    )


@address_bits.instruction("slli.uw", "000010 shamt[5:0] rs1 001 rd 0011011")
def slli_uw(cpu: Cpu) -> None:
    cpu.rd = cpu.rs1.low(32).zero_extend(64) << cpu.imm


# ------------------------------------------------------------------------------------------ Zbb


def _maximum(a: Value, b: Value) -> Value:
    return a.less(b).select(b, a)


def _minimum(a: Value, b: Value) -> Value:
    return a.less(b).select(a, b)


def _maximum_unsigned(a: Value, b: Value) -> Value:
    return a.below(b).select(b, a)


def _minimum_unsigned(a: Value, b: Value) -> Value:
    return a.below(b).select(a, b)


def _rotate_left(a: Value, b: Value) -> Value:
    return a.rotate_left(b)


def _rotate_right(a: Value, b: Value) -> Value:
    return a.rotate_left(-b)


_BINARY: tuple[tuple[str, str, str, Operation], ...] = (
    ("andn", "0100000", "111", lambda a, b: a & ~b),
    ("orn", "0100000", "110", lambda a, b: a | ~b),
    ("xnor", "0100000", "100", lambda a, b: ~(a ^ b)),
    ("max", "0000101", "110", _maximum),
    ("maxu", "0000101", "111", _maximum_unsigned),
    ("min", "0000101", "100", _minimum),
    ("minu", "0000101", "101", _minimum_unsigned),
    ("rol", "0110000", "001", _rotate_left),
    ("ror", "0110000", "101", _rotate_right),
)
for _name, _funct7, _funct3, _operation in _BINARY:
    basic_bits.add(_name, f"{_funct7} rs2 rs1 {_funct3} rd 0110011", binary(_operation))
basic_bits.add("rolw", "0110000 rs2 rs1 001 rd 0111011", binary_word(_rotate_left))
basic_bits.add("rorw", "0110000 rs2 rs1 101 rd 0111011", binary_word(_rotate_right))


@basic_bits.instruction("rori", "011000 shamt[5:0] rs1 101 rd 0010011")
def rori(cpu: Cpu) -> None:
    cpu.rd = _rotate_right(cpu.rs1, cpu.imm)


@basic_bits.instruction("roriw", "0110000 shamt[4:0] rs1 101 rd 0011011")
def roriw(cpu: Cpu) -> None:
    cpu.rd = _rotate_right(cpu.rs1.low(32), cpu.imm.low(32)).sign_extend(64)


def _or_combine(value: Value) -> Value:
    """Each byte becomes 0xff unless it is 0."""
    lows, highs = 0x7F7F_7F7F_7F7F_7F7F, 0x8080_8080_8080_8080
    set_tops = (((value & lows) + lows) | value) & highs
    return (set_tops - (set_tops >> 7)) | set_tops


_UNARY: tuple[tuple[str, str, Callable[[Value], Value]], ...] = (
    ("clz", "011000000000 rs1 001 rd 0010011", lambda a: a.count_leading_zeros()),
    ("ctz", "011000000001 rs1 001 rd 0010011", lambda a: a.count_trailing_zeros()),
    ("cpop", "011000000010 rs1 001 rd 0010011", lambda a: a.count_ones()),
    ("clzw", "011000000000 rs1 001 rd 0011011", lambda a: a.low(32).count_leading_zeros()),
    ("ctzw", "011000000001 rs1 001 rd 0011011", lambda a: a.low(32).count_trailing_zeros()),
    ("cpopw", "011000000010 rs1 001 rd 0011011", lambda a: a.low(32).count_ones()),
    ("sext.b", "011000000100 rs1 001 rd 0010011", lambda a: a.low(8).sign_extend(64)),
    ("sext.h", "011000000101 rs1 001 rd 0010011", lambda a: a.low(16).sign_extend(64)),
    ("zext.h", "000010000000 rs1 100 rd 0111011", lambda a: a.low(16)),
    ("orc.b", "001010000111 rs1 101 rd 0010011", _or_combine),
    ("rev8", "011010111000 rs1 101 rd 0010011", lambda a: a.swap_bytes()),
)


def _unary(operation: Callable[[Value], Value]) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.rd = operation(cpu.rs1).zero_extend(64)

    return body


for _name, _pattern, _function in _UNARY:
    basic_bits.add(_name, _pattern, _unary(_function))


# ------------------------------------------------------------------------------------------ Zbs


def _one_bit(b: Value) -> Value:
    return Value(1, 64) << (b & 63)


_SINGLE: tuple[tuple[str, str, str, Operation], ...] = (
    ("bclr", "010010", "001", lambda a, b: a & ~_one_bit(b)),
    ("bext", "010010", "101", lambda a, b: (a >> (b & 63)) & 1),
    ("binv", "011010", "001", lambda a, b: a ^ _one_bit(b)),
    ("bset", "001010", "001", lambda a, b: a | _one_bit(b)),
)


def _with_shamt(operation: Operation) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.rd = operation(cpu.rs1, cpu.imm)

    return body


for _name, _funct6, _funct3, _operation in _SINGLE:
    single_bits.add(_name, f"{_funct6}0 rs2 rs1 {_funct3} rd 0110011", binary(_operation))
    single_bits.add(
        _name + "i", f"{_funct6} shamt[5:0] rs1 {_funct3} rd 0010011", _with_shamt(_operation)
    )

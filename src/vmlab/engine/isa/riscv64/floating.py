"""F and D, floating point (RISC-V unprivileged 20191213, chapters 11 and 12).

A single-precision number in a register has ones above it (NaN boxing); what has not is taken for
the canonical NaN. The arithmetic is vmlab.engine.isa.softfloat's.
"""

from __future__ import annotations

from collections.abc import Callable

from vmlab.engine.isa.cpu import Cpu, Extension
from vmlab.engine.isa.encoding import Body, Group
from vmlab.engine.isa.softfloat import DOUBLE, SINGLE, Format, classify
from vmlab.engine.isa.values import Value, mask

single = Group("F")
double = Group("D")

_UPPER = mask(64) & ~mask(32)


def _unboxed(form: Format, register: Value) -> Value:
    if form is DOUBLE:
        return register
    boxed = (register & _UPPER).eq(_UPPER)
    return boxed.select(register, Value(SINGLE.nan, 64))


def _boxed(form: Format, bits: Value) -> Value:
    return bits if form is DOUBLE else bits | _UPPER


def _load(size: int) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.system_call("use_floating")
        cpu.fd = cpu.load(cpu.rs1 + cpu.imm, size, Extension.BOX)

    return body


def _store(size: int) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.system_call("check_floating")
        cpu.store(cpu.rs1 + cpu.imm, size, cpu.fs2)

    return body


def _rounded(name: str, form: Format, operands: str, result: Format | None) -> Body:
    """An operation with a rounding mode.

    Args:
        name: of the routine.
        form: of the floating-point operands.
        operands: the registers: "1", "12", "123", or "x" for the integer register rs1.
        result: the format of the result, None for an integer.
    """

    def body(cpu: Cpu) -> None:
        mode = cpu.system_call("rounding_mode", cpu.imm)
        cpu.system_call("use_floating")
        if operands == "x":
            values = [cpu.rs1]
        else:
            registers = [cpu.fs1, *([cpu.fs2] if "2" in operands else [])]
            registers += [cpu.fs3] if "3" in operands else []
            values = [_unboxed(form, register) for register in registers]
        bits = cpu.system_call(name, *values, mode)
        if result is None:
            cpu.rd = bits
        else:
            cpu.fd = _boxed(result, bits)

    return body


def _exact(name: str, form: Format, *, to_integer: bool) -> Body:
    """An operation that rounds nothing but may set flags."""

    def body(cpu: Cpu) -> None:
        cpu.system_call("use_floating")
        bits = cpu.system_call(name, _unboxed(form, cpu.fs1), _unboxed(form, cpu.fs2))
        if to_integer:
            cpu.rd = bits
        else:
            cpu.fd = _boxed(form, bits)

    return body


def _sign(form: Format, sign: Callable[[Value, Value], Value]) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.system_call("use_floating")
        a, b = _unboxed(form, cpu.fs1), _unboxed(form, cpu.fs2)
        magnitude = a & (form.sign - 1)
        cpu.fd = _boxed(form, magnitude | (sign(a, b) & form.sign))

    return body


def _classify(form: Format) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.system_call("check_floating")
        cpu.rd = classify(form, _unboxed(form, cpu.fs1).low(form.width)).zero_extend(64)

    return body


def _move_to_integer(form: Format) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.system_call("check_floating")
        cpu.rd = cpu.fs1.low(form.width).sign_extend(64)

    return body


def _move_from_integer(form: Format) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.system_call("use_floating")
        cpu.fd = _boxed(form, cpu.rs1.low(form.width).zero_extend(64))

    return body


_INTEGERS = {"w": "00000", "wu": "00001", "l": "00010", "lu": "00011"}


def _define(group: Group, letter: str, fmt: str, form: Format, move: str) -> None:
    width, size = ("010", 4) if form is SINGLE else ("011", 8)
    group.add(f"fl{move}", f"imm[11:0] rs1 {width} rd 0000111", _load(size), "fd,imm(rs1)")
    group.add(
        f"fs{move}", f"imm[11:5] rs2 rs1 {width} imm[4:0] 0100111", _store(size), "fs2,imm(rs1)"
    )
    for name, opcode in (
        ("fmadd", "1000011"),
        ("fmsub", "1000111"),
        ("fnmsub", "1001011"),
        ("fnmadd", "1001111"),
    ):
        group.add(
            f"{name}.{letter}",
            f"rs3 {fmt} rs2 rs1 rm rd {opcode}",
            _rounded(f"{name}.{letter}", form, "123", form),
            "fd,fs1,fs2,fs3,rm",
        )
    for name, funct5 in (
        ("fadd", "00000"),
        ("fsub", "00001"),
        ("fmul", "00010"),
        ("fdiv", "00011"),
    ):
        group.add(
            f"{name}.{letter}",
            f"{funct5}{fmt} rs2 rs1 rm rd 1010011",
            _rounded(f"{name}.{letter}", form, "12", form),
            "fd,fs1,fs2,rm",
        )
    group.add(
        f"fsqrt.{letter}",
        f"01011{fmt} 00000 rs1 rm rd 1010011",
        _rounded(f"fsqrt.{letter}", form, "1", form),
        "fd,fs1,rm",
    )
    signs: tuple[tuple[str, str, Callable[[Value, Value], Value]], ...] = (
        ("fsgnj", "000", lambda _, b: b),
        ("fsgnjn", "001", lambda _, b: ~b),
        ("fsgnjx", "010", lambda a, b: a ^ b),
    )
    for name, funct3, sign in signs:
        group.add(
            f"{name}.{letter}",
            f"00100{fmt} rs2 rs1 {funct3} rd 1010011",
            _sign(form, sign),
            "fd,fs1,fs2",
        )
    for name, funct3 in (("fmin", "000"), ("fmax", "001")):
        group.add(
            f"{name}.{letter}",
            f"00101{fmt} rs2 rs1 {funct3} rd 1010011",
            _exact(f"{name}.{letter}", form, to_integer=False),
            "fd,fs1,fs2",
        )
    for name, funct3 in (("feq", "010"), ("flt", "001"), ("fle", "000")):
        group.add(
            f"{name}.{letter}",
            f"10100{fmt} rs2 rs1 {funct3} rd 1010011",
            _exact(f"{name}.{letter}", form, to_integer=True),
            "rd,fs1,fs2",
        )
    for name, number in _INTEGERS.items():
        group.add(
            f"fcvt.{name}.{letter}",
            f"11000{fmt} {number} rs1 rm rd 1010011",
            _rounded(f"fcvt.{name}.{letter}", form, "1", None),
            "rd,fs1,rm",
        )
        group.add(
            f"fcvt.{letter}.{name}",
            f"11010{fmt} {number} rs1 rm rd 1010011",
            _rounded(f"fcvt.{letter}.{name}", form, "x", form),
            "fd,rs1,rm",
        )
    group.add(f"fclass.{letter}", f"11100{fmt} 00000 rs1 001 rd 1010011", _classify(form), "rd,fs1")
    group.add(
        f"fmv.x.{move}",
        f"11100{fmt} 00000 rs1 000 rd 1010011",
        _move_to_integer(form),
        "rd,fs1",
    )
    group.add(
        f"fmv.{move}.x",
        f"11110{fmt} 00000 rs1 000 rd 1010011",
        _move_from_integer(form),
        "fd,rs1",
    )


_define(single, "s", "00", SINGLE, "w")
_define(double, "d", "01", DOUBLE, "d")
double.add(
    "fcvt.s.d",
    "0100000 00001 rs1 rm rd 1010011",
    _rounded("fcvt.s.d", DOUBLE, "1", SINGLE),
    "fd,fs1,rm",
)
double.add(
    "fcvt.d.s",
    "0100001 00000 rs1 rm rd 1010011",
    _rounded("fcvt.d.s", SINGLE, "1", DOUBLE),
    "fd,fs1,rm",
)

"""The host's floating-point unit gives the guest's bits and flags, or is not used.

A guest does each operation twice, first with FS at "initial", which is not the usual case, so that
softfloat does it, then with FS at "dirty". The two must not differ; some are compared with rational
arithmetic, too. This holds for code that does without parts of the host's processor.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import pytest
from tests.unit.engine.isa import rational
from tests.unit.engine.isa.rational import NX, RNE, Outcome, any_bits

from vmlab.engine.accel.interpreter import CodePages, InterpreterExecutor, NativeCode
from vmlab.engine.compile.interpreter import interpreter_text
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.isa.softfloat import DOUBLE, SINGLE, Format
from vmlab.engine.memory.ram import Ram

BASE, SIZE, TABLE = 0x8000_0000, 8 << 20, 0x8010_0000
ROUND = 65536  # operations of one run of the guest
COUNT = int(os.environ.get("VMLAB_FLOATING_CASES", "2000"))  # of each operation
SAMPLE = 40  # of them by rational arithmetic
RECORD = struct.Struct("<8Q")
FCSR, MSTATUS = 3, 0x300
INITIAL, DIRTY = 1 << 13, 3 << 13
BOX = 0xFFFF_FFFF_0000_0000
DYNAMIC = 7

WITHOUT = {"the host's": (), "no fma": ("fma", "avx512f"), "sse2": ("fma", "avx", "sse3")}


@dataclass(frozen=True)
class Operation:
    """An instruction, how its operands and result are made, and what is right."""

    name: str
    form: Format  # of the operands
    result: Format | None  # None for an integer
    arity: int
    expected: Callable[..., Outcome]  # operands and mode to result and flags
    integer: int = 0  # bits of an operand that is an integer
    rounding: bool = True


def negated(form: Format, signs: str, a: int, b: int, c: int, mode: int) -> Outcome:
    product, addend = (form.sign if sign == "-" else 0 for sign in signs)
    return rational.expected_fused(form, a ^ product, b, c ^ addend, mode)


def subtracted(form: Format, a: int, b: int, mode: int) -> Outcome:
    return rational.expected_add(form, a, b ^ form.sign, mode)


def ordered(form: Format, name: str, a: int, b: int, _mode: int) -> Outcome:
    nan = rational.is_nan(form, a) or rational.is_nan(form, b)
    signaling = rational.is_signaling(form, a) or rational.is_signaling(form, b)
    x, y = rational.fraction_of(form, a), rational.fraction_of(form, b)
    holds = {"feq": x == y, "flt": x < y, "fle": x <= y}[name]
    wrong = signaling if name == "feq" else nan
    return int(holds and not nan), rational.NV * wrong


def picked(form: Format, name: str, a: int, b: int, _mode: int) -> Outcome:
    pick = min if name == "fmin" else max
    some = [bits for bits in (a, b) if not rational.is_nan(form, bits)]

    def order(bits: int) -> tuple[object, bool]:
        return rational.fraction_of(form, bits), not bits & form.sign

    signaling = any(rational.is_signaling(form, bits) for bits in (a, b))
    return pick(some, key=order, default=form.nan), rational.NV * signaling


def operations() -> Iterator[Operation]:
    for letter, form in (("s", SINGLE), ("d", DOUBLE)):
        for name, arity, expected in (
            ("fadd", 2, rational.expected_add),
            ("fsub", 2, subtracted),
            ("fmul", 2, rational.expected_multiply),
            ("fdiv", 2, rational.expected_divide),
            ("fsqrt", 1, rational.expected_square_root),
        ):
            yield Operation(f"{name}.{letter}", form, form, arity, partial(expected, form))
        fused = {"fmadd": "++", "fmsub": "+-", "fnmsub": "-+", "fnmadd": "--"}
        for name, signs in fused.items():
            yield Operation(f"{name}.{letter}", form, form, 3, partial(negated, form, signs))
        for name in ("feq", "flt", "fle"):
            right = partial(ordered, form, name)
            yield Operation(f"{name}.{letter}", form, None, 2, right, rounding=False)
        for name in ("fmin", "fmax"):
            right = partial(picked, form, name)
            yield Operation(f"{name}.{letter}", form, form, 2, right, rounding=False)
        for kind, width, is_signed in (
            ("w", 32, True),
            ("wu", 32, False),
            ("l", 64, True),
            ("lu", 64, False),
        ):
            yield Operation(
                f"fcvt.{kind}.{letter}",
                form,
                None,
                1,
                partial(to_integer, form, width, is_signed),
            )
            yield Operation(
                f"fcvt.{letter}.{kind}",
                form,
                form,
                1,
                partial(from_integer, form, width, is_signed),
                integer=width,
            )
    yield Operation(
        "fcvt.s.d", DOUBLE, SINGLE, 1, partial(rational.expected_conversion, DOUBLE, SINGLE)
    )
    yield Operation(
        "fcvt.d.s", SINGLE, DOUBLE, 1, partial(rational.expected_conversion, SINGLE, DOUBLE)
    )


def to_integer(form: Format, width: int, is_signed: bool, a: int, mode: int) -> Outcome:
    bits, flags = rational.expected_integer(form, a, width, mode, is_signed)
    if bits >> (width - 1):  # the register holds it with its sign
        bits |= ((1 << 64) - 1) ^ ((1 << width) - 1)
    return bits, flags


def from_integer(form: Format, width: int, is_signed: bool, a: int, mode: int) -> Outcome:
    return rational.expected_from_integer(form, a & ((1 << width) - 1), width, mode, is_signed)


OPERATIONS = {operation.name: operation for operation in operations()}


# ------------------------------------------------------------------------------------- operands


def short(form: Format, chance: random.Random, stored: int) -> int:
    """A number with few digits, so that much of what is computed with it is exact."""
    digits = chance.randrange(min(form.fraction, 30))
    stored = min(max(stored, 0), (1 << form.exponent) - 1)
    fraction = chance.getrandbits(digits) << (form.fraction - digits) if digits else 0
    return chance.getrandbits(1) * form.sign | stored << form.fraction | fraction


def related(form: Format, chance: random.Random) -> tuple[int, int, int]:
    """Operands whose product, quotient or sum is near a limit, or exact, or nothing."""
    ends = (0, form.smallest, form.smallest - form.fraction, form.largest, form.largest + 1)
    target = form.largest + chance.choice(ends) + chance.randint(-2, 2)
    first = chance.randrange(1, (1 << form.exponent) - 1)
    other = chance.choice((target + form.largest - first, first + form.largest - target))
    make = chance.choice((short, _full))
    a, b = make(form, chance, first), make(form, chance, other)
    c = make(form, chance, target + chance.choice((-form.precision, -1, 0, 0, 1, form.precision)))
    return chance.choice(((a, b, c), (a, b, 0), (a, a, c), (a, a ^ form.sign, c), (c, b, a)))


def _full(form: Format, chance: random.Random, stored: int) -> int:
    return short(form, chance, stored) | chance.getrandbits(form.fraction)


def numbers(form: Format, chance: random.Random) -> tuple[int, int, int]:
    kind = chance.randrange(5)
    if kind == 4:  # edges, often of opposite signs: two zeros, two infinities
        a, b, c = (chance.choice(rational.operands(form)) for _ in range(3))
        return a, chance.choice((b, a ^ form.sign)), c
    if kind == 0:
        return any_bits(form, chance), any_bits(form, chance), any_bits(form, chance)
    if kind == 1:
        a, b, c = (short(form, chance, form.largest + chance.randint(-40, 70)) for _ in range(3))
        return a, b, c
    return related(form, chance)


def register(form: Format, bits: int, chance: random.Random) -> int:
    """A register that holds a number; now and then a single that is not boxed."""
    if form is DOUBLE:
        return bits
    return bits | (BOX if chance.randrange(50) else chance.getrandbits(32) << 32)


def value(form: Format, bits: int) -> int:
    """What a register's content means."""
    if form is DOUBLE:
        return bits
    return bits & 0xFFFF_FFFF if bits >> 32 == 0xFFFF_FFFF else SINGLE.nan


def made(operation: Operation, chance: random.Random) -> tuple[int, int, int, int]:
    """Three registers and fcsr."""
    mode = chance.choice((RNE, RNE, RNE, RNE, *rational.MODES))
    fcsr = mode << 5 | chance.choice((0, NX, NX, chance.getrandbits(5)))
    if operation.integer:
        digits = chance.randrange(1, 65)
        whole = chance.getrandbits(digits) << chance.randrange(65 - digits)
        a = -whole & ((1 << 64) - 1) if chance.getrandbits(1) else whole
        return a, 0, 0, fcsr
    a, b, c = (register(operation.form, one, chance) for one in numbers(operation.form, chance))
    return a, b, c, fcsr


# ---------------------------------------------------------------------------------------- guest


def code(operation: Operation, rounding: int) -> bytes:
    """Of each record, a, b, c, fcsr: result and fcsr by softfloat, and then as usual."""
    words: list[int] = []

    def add(name: str, **operands: int) -> None:
        words.append(RISCV64[name].encode(**operands))

    pointer, end, whole, mode, state, flags, count = 10, 11, 5, 6, 7, 8, 12
    for number in (1, 2, 3):
        add("fld", rd=number, rs1=pointer, imm=8 * (number - 1))
    add("ld", rd=whole, rs1=pointer, imm=0)
    add("ld", rd=mode, rs1=pointer, imm=24)
    operands = {"rd": count, "rs1": whole if operation.integer else 1, "rs2": 2, "rs3": 3}
    chosen = {name: operands[name] for name in ("rd", "rs1", "rs2", "rs3")[: 1 + operation.arity]}
    if operation.rounding:
        chosen["imm"] = rounding
    for offset, floating_state in ((32, INITIAL), (48, DIRTY)):
        add("csrrw", rd=0, rs1=mode, imm=FCSR)
        add("lui", rd=state, imm=floating_state)
        add("csrrw", rd=0, rs1=state, imm=MSTATUS)
        add(operation.name, **chosen)
        if operation.result is None:
            add("sd", rs2=count, rs1=pointer, imm=offset)
        else:
            add("fsd", rs2=count, rs1=pointer, imm=offset)
        add("csrrs", rd=flags, rs1=0, imm=FCSR)
        add("sd", rs2=flags, rs1=pointer, imm=offset + 8)
    add("addi", rd=pointer, rs1=pointer, imm=RECORD.size)
    add("bne", rs1=pointer, rs2=end, imm=-4 * len(words))
    add("wfi")
    return b"".join(word.to_bytes(4, "little") for word in words)


@cache
def native(without: tuple[str, ...]) -> NativeCode:
    return NativeCode(without=without)


@pytest.fixture(params=WITHOUT)
def executor(request: pytest.FixtureRequest) -> Iterator[InterpreterExecutor]:
    ram = Ram(SIZE, BASE)
    yield InterpreterExecutor(Hart(ram), CodePages(ram, native(WITHOUT[request.param])))
    ram.close()


def run(
    executor: InterpreterExecutor,
    operation: Operation,
    registers: list[tuple[int, int, int, int]],
    rounding: int = DYNAMIC,
) -> Iterator[tuple[int, ...]]:
    """The records, completed by the guest."""
    hart = executor.hart
    table = b"".join(RECORD.pack(*four, 0, 0, 0, 0) for four in registers)
    hart.reset(BASE)
    hart.ram.write(BASE, code(operation, rounding))
    hart.ram.write(TABLE, table)
    hart[layout.MSTATUS] = DIRTY
    hart.set_x(10, TABLE)
    hart.set_x(11, TABLE + len(table))
    while (left := executor.run(1 << 30)).reason is Reason.BUDGET:
        pass
    assert left.reason is Reason.WAIT, left
    return RECORD.iter_unpack(hart.ram.read(TABLE, len(table)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_hosts_unit_agrees_with_softfloat(executor: InterpreterExecutor, name: str) -> None:
    operation = OPERATIONS[name]
    chance = random.Random(f"{name} {os.environ.get('VMLAB_FLOATING_SEED', '')}")
    count = COUNT
    while count > 0:
        some = [made(operation, chance) for _ in range(min(count, ROUND))]
        count -= len(some)
        for number, record in enumerate(run(executor, operation, some)):
            a, b, c, fcsr, *results = record
            shown = f"{name} {a:#x} {b:#x} {c:#x} fcsr {fcsr:#x}"
            assert results[:2] == results[2:], f"{shown}: {[hex(one) for one in results]}"
            if number < SAMPLE:
                assert tuple(results[2:]) == right(operation, a, b, c, fcsr), shown


def right(operation: Operation, a: int, b: int, c: int, fcsr: int) -> tuple[int, int]:
    """The result's register and fcsr, by rational arithmetic."""
    registers = (a, b, c)[: operation.arity]
    if not operation.integer:
        registers = tuple(value(operation.form, one) for one in registers)
    bits, flags = operation.expected(*registers, fcsr >> 5)
    if operation.result is SINGLE:
        bits |= BOX
    return bits, fcsr | flags


@pytest.mark.parametrize("rounding", [*rational.MODES])
@pytest.mark.parametrize("name", ["fadd.d", "fmul.s", "fdiv.d", "fmadd.d", "fcvt.w.d", "fcvt.s.l"])
def test_an_instruction_rounds_as_it_says(name: str, rounding: int) -> None:
    operation = OPERATIONS[name]
    chance = random.Random(f"{name} {rounding}")
    some = [(*made(operation, chance)[:3], NX | RNE << 5) for _ in range(500)]
    ram = Ram(SIZE, BASE)
    executor = InterpreterExecutor(Hart(ram), CodePages(ram, native(())))
    for number, (a, b, c, fcsr, *results) in enumerate(run(executor, operation, some, rounding)):
        assert results[:2] == results[2:], f"{name} {a:#x} {b:#x} {c:#x}"
        if number < SAMPLE:
            expected, flags = right(operation, a, b, c, rounding << 5)
            assert (results[2], results[3]) == (expected, fcsr | flags & 31)
    ram.close()


def test_a_library_is_never_called_for_what_the_host_lacks() -> None:
    assert "llvm.fma" in interpreter_text(RISCV64, host_fuses=True)
    assert "llvm.fma" not in interpreter_text(RISCV64, host_fuses=False)

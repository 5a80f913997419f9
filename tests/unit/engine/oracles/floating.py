"""Floating-point vectors, after TestFloat: edge values with each other, in every rounding mode.

A program goes through all tuples of operands, does every operation of one shape on each, and keeps
results and flags. Its records are in the order of `Suite.cases`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.unit.engine.oracles.code import DATA, FFLAGS, Code

from vmlab.engine.isa.encoding import Instruction
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.isa.softfloat import DOUBLE, SINGLE, Format
from vmlab.engine.isa.values import mask

MODES = range(5)
_RECORD = 16  # bytes: the result, the flags
_OPERANDS, _END, _RESULT, _FLAGS = 8, 9, 18, 5  # registers


def edges(form: Format, few: bool = False) -> list[int]:
    """Numbers at which something changes; of both signs."""
    least, fraction = 1 << form.fraction, (1 << form.fraction) - 1
    one = form.one
    numbers = [0, 1, fraction, least, one, form.infinity - 1, form.infinity, form.nan]
    numbers += [form.infinity + 1, one + 1]
    if not few:
        two, half = one + least, one - least
        precise = form.precision * least
        numbers += [2, fraction - 1, least + 1, 2 * least, one - 1, half, half + 1, two, two - 1]
        numbers += [one | 1 << (form.fraction - 1), one | fraction, one + precise]
        numbers += [one + precise - least, one - precise, one - precise - least, form.nan + 5]
        numbers += [form.infinity - 2, form.infinity - least, form.infinity | fraction]
        numbers += [one + 31 * least, one + 32 * least, one + 63 * least, one + 64 * least]
        numbers += [one + 30 * least | fraction, one + 62 * least | fraction]
        source = random.Random(form.width)
        numbers += [source.getrandbits(form.width - 1) for _ in range(6)]
    return [sign | number for number in numbers for sign in (0, form.sign)]


def boxed(form: Format, bits: int) -> int:
    """What a register holds."""
    return bits if form is DOUBLE else bits | mask(64) ^ mask(32)


@dataclass(frozen=True)
class Suite:
    """Operations that take the same operands, and these."""

    title: str
    operations: tuple[Instruction, ...]
    registers: str  # "f" or "x", one for each operand
    tuples: tuple[tuple[int, ...], ...]

    @property
    def steps(self) -> list[tuple[Instruction, int | None]]:
        """Each operation in each rounding mode; None for those that round nothing."""
        return [
            (operation, mode)
            for operation in self.operations
            for mode in (MODES if operation.assembly.endswith("rm") else (None,))
        ]

    @property
    def cases(self) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
        """What each record of the result is of."""
        for numbers in self.tuples:
            for operation, mode in self.steps:
                yield operation.name, mode, numbers

    @property
    def data(self) -> bytes:
        """The operands in memory."""
        every = itertools.chain.from_iterable(self.tuples)
        return b"".join(number.to_bytes(8, "little") for number in every)

    @property
    def result(self) -> int:
        """Where the results begin."""
        return DATA + -(-len(self.data) // 4096) * 4096

    @property
    def size(self) -> int:
        """Bytes of the results."""
        return _RECORD * len(self.tuples) * len(self.steps)

    def program(self) -> Code:
        """The code."""
        code = Code()
        width = 8 * len(self.registers)
        code.address(_OPERANDS, DATA)
        code.address(_END, DATA + width * len(self.tuples))
        code.address(_RESULT, self.result)
        loop = code.here
        for index, kind in enumerate(self.registers):
            load = "fld" if kind == "f" else "ld"
            code.put(load, rd=11 + index, rs1=_OPERANDS, imm=8 * index)
        for operation, mode in self.steps:
            code.put("csrrwi", rd=0, rs1=0, imm=FFLAGS)
            sources = {f"rs{number}": 10 + number for number in (1, 2, 3)}
            used = {name: at for name, at in sources.items() if name in operation.pattern.operands}
            rounding = {"imm": mode} if mode is not None else {}
            code.put(operation.name, rd=10, **used, **rounding)
            code.put("csrrs", rd=_FLAGS, imm=FFLAGS)
            to_integer = operation.assembly.startswith("rd")
            code.put("sd" if to_integer else "fsd", rs1=_RESULT, rs2=10)
            code.put("sd", rs1=_RESULT, rs2=_FLAGS, imm=8)
            code.put("addi", rd=_RESULT, rs1=_RESULT, imm=_RECORD)
        code.put("addi", rd=_OPERANDS, rs1=_OPERANDS, imm=width)
        code.put("beq", rs1=_OPERANDS, rs2=_END, imm=8)
        code.put("jal", imm=loop - code.here)
        code.finish(self.result, self.size)
        return code

    def differences(self, ours: bytes, theirs: bytes) -> list[str]:
        """What came out otherwise, one line a case."""
        assert len(ours) == len(theirs) == self.size
        if ours == theirs:
            return []
        found = []
        for at, (name, mode, numbers) in zip(range(0, self.size, _RECORD), self.cases, strict=True):
            one, other = ours[at : at + _RECORD], theirs[at : at + _RECORD]
            if one != other:
                values = [int.from_bytes(each[:8], "little") for each in (one, other)]
                flags = [each[8] for each in (one, other)]
                found.append(
                    f"{name} mode {mode} of {[hex(number) for number in numbers]}: "
                    f"{values[0]:#x} flags {flags[0]:#x}, there {values[1]:#x} {flags[1]:#x}"
                )
        return found


def _shape(operation: Instruction) -> str:
    """The kinds of an operation's operands."""
    text = operation.assembly.split(",")
    return "".join("f" if name.startswith("fs") else "x" for name in text if "s" in name)


def suites(few: bool = False) -> list[Suite]:
    """All floating-point instructions but loads and stores.

    Args:
        few: with fewer operands, for an executor that is slow.
    """
    made = []
    for form, other, fmt in ((SINGLE, DOUBLE, 0), (DOUBLE, SINGLE, 1)):
        letter = "sd"[fmt]
        table = [
            each
            for each in RISCV64
            if each.extension in "FD" and "(" not in each.assembly and each.base is None
        ]
        computing = [each for each in table if each.pattern.fixed_bits & 0x7F != 0x07]
        ours = [each for each in computing if each.pattern.fixed_bits >> 25 & 3 == fmt]
        values = [boxed(form, bits) for bits in edges(form, few)]
        middle = [boxed(form, bits) for bits in edges(form, few)[:: 4 if few else 3]]
        source = random.Random(3)
        wholes = [0, 1, 2, 1 << 24, (1 << 24) + 1, 1 << 53, (1 << 53) + 1, (1 << 53) + 3]
        wholes += [1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 63) - 1]
        wholes += [0xFFFF_FF80, 0x7FFF_FFC0, (1 << 64) - 1025, (1 << 64) - 1024, (1 << 63) - 513]
        wholes += [source.getrandbits(64) >> source.randrange(64) for _ in range(4 if few else 60)]
        wholes += [mask(64) ^ whole for whole in wholes]
        narrow = [boxed(other, bits) for bits in edges(other, few)]
        many = [*values, *_near_whole(form), *_near_other(form, other)]
        shapes: dict[str, list[tuple[int, ...]]] = {
            "ff": list(itertools.product(values[::3] if few else values, repeat=2)),
            "fff": list(itertools.product(middle, repeat=3)),
            "f": [(value,) for value in (many if not few else values)],
            "x": [(whole,) for whole in wholes],
        }
        for shape, tuples in shapes.items():
            chosen = [each for each in ours if _shape(each) == shape]
            # A conversion takes the other format.
            turned = [each for each in chosen if each.name in ("fcvt.s.d", "fcvt.d.s")]
            chosen = [each for each in chosen if each not in turned]
            # What is no boxed number is a NaN.
            if form is SINGLE:
                tuples = tuples + [(1 << 52, *one[1:]) for one in tuples[:5]]
            if chosen:
                title = f"{letter} {shape}"
                made.append(Suite(title, tuple(chosen), shape, tuple(tuples)))
            if turned:
                wide = [(value,) for value in (*narrow, *_near_other(other, form))]
                made.append(Suite(turned[0].name, tuple(turned), "f", tuple(wide)))
    return made


def _near_whole(form: Format) -> list[int]:
    """Numbers next to whole ones, halves and the limits of integers."""
    found = []
    for power in (-1, 0, 1, 30, 31, 32, 62, 63, 64):
        start = form.one + power * (1 << form.fraction)
        bit = max(form.fraction - max(power, 0), 0)
        for offset in (
            -1,
            0,
            1,
            1 << max(bit - 1, 0),
            (1 << max(bit - 1, 0)) + 1,
            3 << max(bit - 1, 0),
        ):
            found += [boxed(form, sign | start + offset) for sign in (0, form.sign)]
    return found


def _near_other(form: Format, other: Format) -> list[int]:
    """Numbers next to the other format's limits, and half way between two of its numbers."""
    if form is SINGLE:
        return [boxed(form, bits) for bits in range(1, 1 << 23, 499_979)]
    found = []
    shift = DOUBLE.fraction - SINGLE.fraction
    for power in (
        SINGLE.smallest,
        SINGLE.smallest - 1,
        SINGLE.smallest - 23,
        SINGLE.smallest - 24,
        0,
        127,
        128,
    ):
        start = form.one + power * (1 << form.fraction)
        for offset in (
            -1,
            0,
            1,
            1 << shift,
            1 << shift - 1,
            (1 << shift - 1) + 1,
            3 << shift - 1,
            -1 << shift,
            -1 << shift - 1,
            (-1 << shift - 1) - 1,
        ):
            found += [sign | start + offset for sign in (0, form.sign)]
    return found

"""Single instructions with random operands in a random state: what unicorn can be asked about."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.unit.engine.oracles.differences import UNICORN_FAULTS

from vmlab.engine.isa.encoding import Decoded, Instruction
from vmlab.engine.isa.programs import random_number
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.isa.values import mask, signed

BASE, SIZE = 0x8000_0000, 8 << 20
CODE = BASE + (4 << 20)  # a jump reaches a MiB to each side
DATA = BASE + (1 << 20)
WINDOW = 8192  # bytes of memory in its middle
EXTENSIONS = "IMAFDC"
_BOX = mask(64) ^ mask(32)


@dataclass(frozen=True)
class Step:
    """An instruction, and the state before it."""

    name: str
    decoded: Decoded
    x: list[int]
    f: list[int]
    frm: int
    memory: bytes

    @property
    def single(self) -> bool:
        """Whether its result is of single precision."""
        return self.decoded.instruction.extension == "F" or self.name == "fcvt.s.d"


def names() -> list[str]:
    """The instructions of unicorn's extensions but calls, and reservations, which need two."""
    return [
        each.name
        for each in RISCV64
        if each.extension in EXTENSIONS
        and not (RISCV64[each.base] if each.base else each).system
        and (each.base or each.name) not in ("ecall", "ebreak", "sc.w", "sc.d")
    ]


def _word(instruction: Instruction, source: random.Random) -> int:
    base = RISCV64[instruction.base] if instruction.base else instruction
    while True:
        operands = {}
        for name, operand in instruction.pattern.operands.items():
            bits = source.getrandbits(operand.width)
            if operand.offset:
                bits = source.randrange(8) + operand.offset
            elif name == "imm" and base.assembly.endswith("rm"):
                bits = source.choice((0, 1, 2, 3, 4, 7))
            operands[name] = signed(bits, operand.width) if operand.signed else bits
        word = instruction.encode(**operands)
        if RISCV64.find(word) is instruction:
            return word


def _signaling(single: bool, bits: int) -> bool:
    if single:
        return bits & 0x7F80_0000 == 0x7F80_0000 and bool(bits & 0x3F_FFFF) and not bits >> 22 & 1
    return bits >> 52 & 0x7FF == 0x7FF and bool(bits & mask(51)) and not bits >> 51 & 1


def steps(name: str, count: int, seed: int = 1) -> Iterator[Step]:
    """States for an instruction, `count` of them."""
    source = random.Random(f"{name} {seed}")
    instruction = RISCV64[name]
    while count:
        decoded = RISCV64.decode(_word(instruction, source))
        assert isinstance(decoded, Decoded)
        x = [random_number(source) for _ in range(32)]
        f = [random_number(source) for _ in range(32)]
        base = decoded.instruction
        if base.extension == "F" or ".s" in base.name:
            f = [bits | _BOX for bits in f]
        if "(rs1)" in base.assembly:
            if decoded.rs1 == 0:
                continue
            x[decoded.rs1] = DATA
        x[0] = 0
        if name in UNICORN_FAULTS and any(
            _signaling(name.endswith(".s"), f[register]) for register in (decoded.rs1, decoded.rs2)
        ):
            continue
        count -= 1
        yield Step(name, decoded, x, f, source.randrange(5), source.randbytes(WINDOW))

"""Random programs for tests, made from the instruction set's own patterns.

A program is straight code with forward branches over a few instructions. What it may rely on:
the registers in POINTERS hold addresses in the middle of memory that it may write, aligned to 64
bytes, and it never changes them.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vmlab.engine.isa.encoding import Instruction, InstructionSet, Operand
from vmlab.engine.isa.values import mask, signed

POINTERS = (2, 8, 9)
REACH = 2048
"""Bytes on each side of a pointer that a program may touch."""

# Numbers at which something changes; others are drawn at random.
_LOW_EDGES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
EDGES: tuple[int, ...] = (*_LOW_EDGES, *(mask(64) ^ edge for edge in _LOW_EDGES), 1 << 63, mask(63))


def random_number(source: random.Random) -> int:
    """64 bits, often an edge, a narrow number or a floating-point number of a special kind."""
    kind = source.randrange(6)
    if kind == 0:
        return source.choice(EDGES)
    if kind == 1:
        return source.getrandbits(source.randrange(1, 65))
    if kind == 2:  # a boxed single with an interesting exponent
        exponent = source.choice((0, 1, 2, 126, 127, 128, 150, 158, 190, 253, 254, 255))
        fraction = source.choice((0, 1, 1 << 22, (1 << 23) - 1, source.getrandbits(23)))
        return mask(64) ^ mask(32) | source.getrandbits(1) << 31 | exponent << 23 | fraction
    if kind == 3:  # a double
        exponent = source.choice((0, 1, 897, 1022, 1023, 1024, 1075, 1086, 1150, 2046, 2047))
        fraction = source.choice((0, 1, 1 << 51, (1 << 52) - 1, source.getrandbits(52)))
        return source.getrandbits(1) << 63 | exponent << 52 | fraction
    return source.getrandbits(64)


@dataclass(frozen=True)
class Program:
    """Code, and the distances of its instructions from its start."""

    code: bytes
    starts: tuple[int, ...]


class ProgramMaker:
    """Makes programs.

    Args:
        instructions: the set.
        extensions: which of its extensions to use; all but jumps and what is `system`.
        seed: the same programs for the same seed.
        without: names of instructions to leave out.
    """

    def __init__(
        self,
        instructions: InstructionSet,
        extensions: Collection[str],
        seed: int,
        without: Collection[str] = (),
    ) -> None:
        self._set = instructions
        self._source = random.Random(seed)
        self._choices = [
            instruction
            for instruction in instructions
            if instruction.name not in without and self._usable(instruction, extensions)
        ]

    def _base(self, instruction: Instruction) -> Instruction:
        return self._set[instruction.base] if instruction.base else instruction

    def _usable(self, instruction: Instruction, extensions: Collection[str]) -> bool:
        base = self._base(instruction)
        if instruction.extension not in extensions or base.extension not in extensions:
            return False
        if instruction.sources.get("rd") in POINTERS:  # c.addi16sp
            return False
        return not base.system and base.name != "jalr"

    @property
    def names(self) -> list[str]:
        """The instructions that programs are made of."""
        return [instruction.name for instruction in self._choices]

    def program(self, count: int) -> Program:
        """A program of `count` instructions."""
        chosen = self._source.choices(self._choices, k=count)
        starts = [0]
        for instruction in chosen:
            starts.append(starts[-1] + instruction.pattern.length)
        code = bytearray()
        for index, instruction in enumerate(chosen):
            word = self._word(instruction, starts[index:])
            code += word.to_bytes(instruction.pattern.length, "little")
        return Program(bytes(code), tuple(starts[:-1]))

    def _word(self, instruction: Instruction, ahead: list[int]) -> int:
        while True:
            operands = {
                name: self._operand(instruction, name, operand, ahead)
                for name, operand in instruction.pattern.operands.items()
            }
            word = instruction.encode(**operands)
            if self._set.find(word) is instruction and self._keeps_pointers(word):
                return word

    def _keeps_pointers(self, word: int) -> bool:
        decoded = self._set.decode(word)
        assert decoded is not None
        name = decoded.instruction.assembly
        return not name.startswith("rd") or decoded.rd not in POINTERS

    def _operand(
        self, instruction: Instruction, name: str, operand: Operand, ahead: list[int]
    ) -> int:
        source, base = self._source, self._base(instruction)
        memory = "(rs1)" in base.assembly
        if name == "imm":
            if "target" in base.assembly:
                return self._distance(operand, ahead)
            if base.assembly.endswith("rm"):
                return source.choice((0, 1, 2, 3, 4, 7))
            bits = source.getrandbits(operand.width)
            value = signed(bits, operand.width) if operand.signed else bits
            return value & -operand.step
        if memory and name == "rs1":
            return source.choice([number for number in POINTERS if number >= operand.offset])
        width = 3 if operand.offset else 5
        return source.getrandbits(width) + operand.offset

    def _distance(self, operand: Operand, ahead: list[int]) -> int:
        reachable: Iterable[int] = (start - ahead[0] for start in ahead[1:9])
        limit = 1 << (operand.width - 1)
        return self._source.choice([distance for distance in reachable if distance < limit])

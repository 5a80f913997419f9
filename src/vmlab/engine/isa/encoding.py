"""Encodings beside meanings: patterns in the manual's notation, and the instruction sets they form.

A pattern lists an instruction's fields from bit 31 (15) down, as the RISC-V manual's tables do:
`imm[11:0] rs1 000 rd 0010011`, `imm[12|10:5] rs2 rs1 000 imm[4:1|11] 1100011`. `uimm` is an
immediate that is not sign-extended; `rd'` is a three-bit register x8 to x15; `csr`, `shamt` and
`rm` are unsigned immediates with the manual's names; `fm`, `pred`, `succ`, `aq` and `rl` take part
in no meaning. A compressed instruction has a pattern and the instruction that it stands for, and no
meaning of its own.

Two patterns that one word fits, a pattern that no word fits, a name given twice: errors at import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from vmlab.engine.isa.cpu import Cpu
from vmlab.engine.isa.values import Value, mask

Body = Callable[[Cpu], None]

# Fields that are an unsigned immediate under the manual's own name, and their widths in bits.
_NAMED_IMMEDIATES = {"csr": 12, "rm": 3}
_REGISTERS = ("rd", "rs1", "rs2", "rs3")
_IGNORED = {"fm": 4, "pred": 4, "succ": 4, "aq": 1, "rl": 1}
OPERANDS = ("rd", "rs1", "rs2", "rs3", "imm")


class EncodingError(Exception):
    """A pattern is wrong or collides with another one."""


@dataclass(frozen=True)
class Piece:
    """`width` bits of the instruction from bit `source` on: the operand's from `target` on."""

    source: int
    width: int
    target: int


@dataclass(frozen=True)
class Operand:
    """How an operand's value comes out of the instruction's bits."""

    pieces: tuple[Piece, ...]
    width: int
    signed: bool = False
    offset: int = 0  # 8 for the three-bit registers

    def extract(self, word: Value) -> Value:
        """The operand's 32 bits out of the instruction's 32."""
        gathered = Value(0, 32)
        for piece in self.pieces:
            gathered = gathered | (((word >> piece.source) & mask(piece.width)) << piece.target)
        if self.signed:
            unused = 32 - self.width
            gathered = (gathered << unused).shift_right_signed(unused)
        return gathered + self.offset

    def insert(self, value: int) -> int:
        """The instruction's bits that mean this value; the inverse of `extract`."""
        value -= self.offset
        return sum(
            ((value >> piece.target) & mask(piece.width)) << piece.source for piece in self.pieces
        )

    @property
    def step(self) -> int:
        """The value of the lowest bit that can be set."""
        return 1 << min(piece.target for piece in self.pieces)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern."""

    text: str
    length: int  # bytes
    fixed_mask: int
    fixed_bits: int
    operands: Mapping[str, Operand]

    def fits(self, word: int) -> bool:
        """Whether the word has this pattern's fixed bits."""
        return word & self.fixed_mask == self.fixed_bits


def _bit_list(text: str) -> list[int]:
    bits: list[int] = []
    for part in text.split("|"):
        first, _, last = part.partition(":")
        high, low = int(first), int(last or first)
        bits += range(high, low - 1, -1)
    return bits


def parse(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        EncodingError: an unknown field, or the fields do not fill 16 or 32 bits.
    """
    bits: list[tuple[str, int]] = []  # per bit, from the top: field and the bit's place in it
    primed: set[str] = set()
    for token in text.split():
        if re.fullmatch(r"[01]+", token):
            bits += [("", int(digit)) for digit in token]
        elif token.rstrip("'") in _REGISTERS:
            name = token.rstrip("'")
            width = 3 if token.endswith("'") else 5
            primed |= {name} if width == 3 else set()
            bits += [(name, place) for place in reversed(range(width))]
        elif found := re.fullmatch(r"(imm|uimm|shamt)\[([\d:|]+)\]", token):
            bits += [(found[1], place) for place in _bit_list(found[2])]
        elif width := {**_NAMED_IMMEDIATES, **_IGNORED}.get(token, 0):
            bits += [(token, place) for place in reversed(range(width))]
        else:
            raise EncodingError(f"{token!r} in {text!r} is no field")
    if len(bits) not in (16, 32):
        raise EncodingError(f"{text!r} has {len(bits)} bits, not 16 or 32")
    fixed_mask = fixed_bits = 0
    places: dict[str, list[tuple[int, int]]] = {}
    for position, (name, place) in zip(reversed(range(len(bits))), bits, strict=True):
        if name:
            places.setdefault(name, []).append((position, place))
        else:
            fixed_mask |= 1 << position
            fixed_bits |= place << position
    operands: dict[str, Operand] = {}
    for name, pairs in places.items():
        if name in _IGNORED:
            continue
        operand = "imm" if name not in _REGISTERS else name
        if operand in operands:
            raise EncodingError(f"{text!r} has two immediates")
        operands[operand] = Operand(
            tuple(_pieces(pairs)),
            max(place for _, place in pairs) + 1,
            signed=name == "imm",
            offset=8 if name in primed else 0,
        )
    return Pattern(text, len(bits) // 8, fixed_mask, fixed_bits, MappingProxyType(operands))


def _pieces(pairs: list[tuple[int, int]]) -> Iterator[Piece]:
    """Join neighbours; `pairs` are (position in the word, place in the field), from the top."""
    start = 0
    for end in range(1, len(pairs) + 1):
        position, place = pairs[end - 1]
        if end == len(pairs) or pairs[end] != (position - 1, place - 1):
            yield Piece(position, end - start, place)
            start = end


@dataclass(frozen=True)
class Instruction:
    """An instruction: its name, encoding and meaning, and how it is written in assembly.

    `without` are values that an operand may not have in this pattern (as encoded, an unprimed
    register or an immediate); another pattern has them, or none.
    """

    name: str
    pattern: Pattern
    body: Body
    extension: str
    assembly: str
    system: bool = False  # reads or changes more than registers and memory
    without: tuple[tuple[str, int], ...] = ()
    # A compressed instruction's base and where its operands come from: an operand of the pattern,
    # or a number.
    base: str | None = None
    sources: Mapping[str, str | int] = field(default_factory=dict)

    def fits(self, word: int) -> bool:
        """Whether the word is this instruction."""
        if not self.pattern.fits(word):
            return False
        if not self.without:
            return True
        value = Value(word, 32)
        return all(
            self.pattern.operands[name].extract(value).bits != Value(excluded, 32).bits
            for name, excluded in self.without
        )

    def operand(self, name: str, word: Value) -> Value:
        """The value of a base operand, 32 bits wide (immediates sign-extended to that)."""
        source = self.sources.get(name, name)
        if isinstance(source, int):
            return Value(source, 32)
        operand = self.pattern.operands.get(source)
        return operand.extract(word) if operand else Value(0, 32)

    def encode(self, **operands: int) -> int:
        """The word with these values of the pattern's own operands; those not given are 0."""
        word = self.pattern.fixed_bits
        for name, value in operands.items():
            word |= self.pattern.operands[name].insert(value)
        return word


@dataclass(frozen=True)
class Decoded:
    """An instruction with its operands; `instruction` is the base, also of a compressed word."""

    instruction: Instruction
    source: Instruction
    rd: int
    rs1: int
    rs2: int
    rs3: int
    imm: int  # signed
    length: int
    word: int


class Group:
    """The instructions of one extension, collected by decorators in the extension's module."""

    def __init__(self, extension: str) -> None:
        self.extension = extension
        self.instructions: list[Instruction] = []

    def instruction(
        self, name: str, pattern: str, assembly: str | None = None, *, system: bool = False
    ) -> Callable[[Body], Body]:
        """Register the body below as the meaning of a pattern.

        Args:
            name: as the manual writes it.
            pattern: see the module's head.
            assembly: its operands, as the assembler writes them; else made from the fields.
            system: the body uses more than registers and memory (CSRs, traps, address spaces).
        """

        def register(body: Body) -> Body:
            self.add(name, pattern, body, assembly, system=system)
            return body

        return register

    def add(
        self,
        name: str,
        pattern: str,
        body: Body,
        assembly: str | None = None,
        *,
        system: bool = False,
    ) -> None:
        """`instruction` for bodies that are made in a loop."""
        parsed = parse(pattern)
        if assembly is None:
            assembly = ",".join(operand for operand in OPERANDS if operand in parsed.operands)
        self.instructions.append(Instruction(name, parsed, body, self.extension, assembly, system))

    def compressed(
        self,
        name: str,
        pattern: str,
        base: Instruction | str,
        without: Iterable[tuple[str, int]] = (),
        **sources: str | int,
    ) -> None:
        """Register a short form of another instruction.

        Args:
            name: as the manual writes it.
            pattern: of 16 bits.
            base: what it stands for.
            without: (operand, value) pairs that this pattern leaves to others.
            sources: operands of the base that are not the pattern's of the same name.
        """
        if isinstance(base, Instruction):
            base = base.name
        self.instructions.append(
            Instruction(
                name,
                parse(pattern),
                _no_meaning,
                self.extension,
                "",
                without=tuple(without),
                base=base,
                sources=MappingProxyType(dict(sources)),
            )
        )


def _no_meaning(_cpu: Cpu) -> None:
    raise EncodingError("a compressed instruction is run as the one that it stands for")


class InstructionSet:
    """Groups that form one machine language, checked against each other."""

    def __init__(self, *groups: Group) -> None:
        self.instructions: dict[str, Instruction] = {}
        for group in groups:
            for instruction in group.instructions:
                if instruction.name in self.instructions:
                    raise EncodingError(f"{instruction.name} is there twice")
                self.instructions[instruction.name] = instruction
        for instruction in self.instructions.values():
            self._check(instruction)
        self._check_overlaps()
        self._long = self._by_mask(4)
        self._short = self._by_mask(2)
        self.decode = lru_cache(maxsize=65536)(self._decode)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @property
    def bases(self) -> list[Instruction]:
        """The instructions that have a meaning of their own."""
        return [instruction for instruction in self if instruction.base is None]

    def _check(self, instruction: Instruction) -> None:
        name, pattern = instruction.name, instruction.pattern
        short = pattern.fixed_bits & pattern.fixed_mask & 3 != 3
        if pattern.fixed_mask & 3 != 3 or short != (pattern.length == 2):
            raise EncodingError(f"{name}: the lowest two bits do not give the length")
        if instruction.base is not None:
            base = self.instructions.get(instruction.base)
            if base is None or base.base is not None:
                raise EncodingError(f"{name} stands for {instruction.base}, which is no base")
            for operand, source in instruction.sources.items():
                if operand not in base.pattern.operands:
                    raise EncodingError(f"{name} gives {operand}, which {base.name} has not")
                if isinstance(source, str) and source not in pattern.operands:
                    raise EncodingError(f"{name} takes {source}, which its pattern has not")
        for operand, _ in instruction.without:
            if operand not in pattern.operands:
                raise EncodingError(f"{name} excludes a value of {operand}, which it has not")

    def _check_overlaps(self) -> None:
        every = list(self)
        for index, one in enumerate(every):
            for other in every[index + 1 :]:
                common = one.pattern.fixed_mask & other.pattern.fixed_mask
                if (one.pattern.fixed_bits ^ other.pattern.fixed_bits) & common:
                    continue
                if one.pattern.length != other.pattern.length:
                    continue
                if not (_excludes(one, other) or _excludes(other, one)):
                    raise EncodingError(
                        f"{one.name} ({one.pattern.text}) and {other.name} ({other.pattern.text}) "
                        "fit the same word"
                    )

    def _by_mask(self, length: int) -> list[tuple[int, dict[int, list[Instruction]]]]:
        tables: dict[int, dict[int, list[Instruction]]] = {}
        for instruction in self:
            pattern = instruction.pattern
            if pattern.length == length:
                table = tables.setdefault(pattern.fixed_mask, {})
                table.setdefault(pattern.fixed_bits, []).append(instruction)
        return list(tables.items())

    def find(self, word: int) -> Instruction | None:
        """The instruction, possibly a compressed one, that a word is; the upper half of a
        compressed word's 32 bits is ignored."""
        short = word & 3 != 3
        if short:
            word &= 0xFFFF
        for bits, table in self._short if short else self._long:
            for instruction in table.get(word & bits, ()):
                if instruction.fits(word):
                    return instruction
        return None

    def _decode(self, word: int) -> Decoded | None:
        """The instruction at the start of 32 bits with its operands, or None for an illegal one."""
        instruction = self.find(word)
        if instruction is None:
            return None
        value = Value(word & mask(8 * instruction.pattern.length), 32)
        base = self[instruction.base] if instruction.base else instruction
        rd, rs1, rs2, rs3 = (instruction.operand(name, value).number for name in _REGISTERS)
        return Decoded(
            base,
            instruction,
            rd,
            rs1,
            rs2,
            rs3,
            instruction.operand("imm", value).signed_number,
            instruction.pattern.length,
            value.number,
        )


def _excludes(one: Instruction, other: Instruction) -> bool:
    """Whether `one` leaves to others all words that `other` has."""
    for name, excluded in one.without:
        operand = one.pattern.operands[name]
        places = operand.insert(mask(operand.width) + operand.offset)
        if (
            places & ~other.pattern.fixed_mask == 0
            and other.pattern.fixed_bits & places == operand.insert(excluded)
        ):
            return True
    return False

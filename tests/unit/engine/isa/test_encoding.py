"""Patterns are read as the manual means them, and collisions are found when a set is made."""

from __future__ import annotations

import pytest

from vmlab.engine.isa.cpu import Cpu
from vmlab.engine.isa.encoding import EncodingError, Group, InstructionSet, parse
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.isa.values import Value


def nothing(_cpu: Cpu) -> None:
    """No meaning."""


def group(*patterns: tuple[str, str]) -> Group:
    made = Group("test")
    for name, pattern in patterns:
        made.add(name, pattern, nothing)
    return made


def test_scattered_immediate_is_gathered_and_sign_extended() -> None:
    branch = parse("imm[12|10:5] rs2 rs1 000 imm[4:1|11] 1100011")
    # beq a0,a1,.-4 as GNU as writes it.
    word = Value(0xFEB50EE3, 32)
    assert branch.operands["imm"].extract(word).signed_number == -4
    assert branch.operands["rs1"].extract(word).number == 10
    assert branch.operands["rs2"].extract(word).number == 11
    assert branch.operands["imm"].step == 2


def test_primed_register_counts_from_x8() -> None:
    load = parse("011 uimm[5:3] rs1' uimm[7:6] rd' 00")
    word = Value(0x6504, 32)  # c.ld s1,8(a0)
    assert load.operands["rd"].extract(word).number == 9
    assert load.operands["rs1"].extract(word).number == 10
    assert load.operands["imm"].extract(word).number == 8


@pytest.mark.parametrize("instruction", list(RISCV64), ids=lambda one: one.name)
def test_encoding_is_the_inverse_of_decoding(instruction) -> None:
    for bits in (0, 1, 0x15, 0x2A, 0x7FFF, 0xFFFF_FFFF):
        operands = {}
        for name, operand in instruction.pattern.operands.items():
            value = operand.extract(Value(operand.insert(bits | operand.step), 32))
            operands[name] = value.signed_number
        word = instruction.encode(**operands)
        for name, operand in instruction.pattern.operands.items():
            assert operand.extract(Value(word, 32)).signed_number == operands[name]
        if instruction.fits(word):
            assert RISCV64.find(word) is instruction


def test_each_16_bit_word_is_at_most_one_instruction() -> None:
    short = [one for one in RISCV64 if one.pattern.length == 2]
    for word in range(0, 1 << 16, 7):
        if word & 3 != 3:
            assert sum(one.fits(word) for one in short) <= 1, hex(word)


def test_no_instruction_has_only_zeros_or_only_ones() -> None:
    assert RISCV64.decode(0) is None
    assert RISCV64.decode(0xFFFF_FFFF) is None


def test_overlapping_patterns_are_refused() -> None:
    both = group(("one", "0000000 rs2 rs1 000 rd 0110011"), ("two", "imm[11:0] rs1 000 rd 0110011"))
    with pytest.raises(EncodingError, match=r"one .* and two .* fit the same word"):
        InstructionSet(both)


def test_an_overlap_that_one_pattern_leaves_to_the_other_is_none() -> None:
    made = group(("base", "imm[11:0] rs1 000 rd 0110011"))
    made.compressed("c.one", "100 1 rd rs2 10", "base", without=[("rs2", 0)])
    made.compressed("c.two", "100 1 rd 00000 10", "base")
    assert InstructionSet(made).find(0x9002) is not None


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        ([("a", "0000000 rs2 rs1 000 rd 0110011")] * 2, "a is there twice"),
        ([("a", "0000000 rs2 rs1 000 rd 0110001")], "do not give the length"),
    ],
)
def test_an_instruction_that_cannot_be_reached_is_refused(patterns, problem) -> None:
    with pytest.raises(EncodingError, match=problem):
        InstructionSet(group(*patterns))


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("0000000 rs2 rs1 000 rd 011001", "has 31 bits"),
        ("0000000 rs9 rs1 000 rd 0110011", "'rs9' in .* is no field"),
        ("imm[11:5] rs2 rs1 000 uimm[4:0] 0100011", "two immediates"),
    ],
)
def test_a_wrong_pattern_is_refused(pattern, problem) -> None:
    with pytest.raises(EncodingError, match=problem):
        parse(pattern)


@pytest.mark.parametrize(
    ("name", "base", "sources", "problem"),
    [
        ("c.x", "nothing", {}, "stands for nothing"),
        ("c.x", "base", {"rs3": 1}, "gives rs3"),
        ("c.x", "base", {"rs1": "rs2"}, "takes rs2"),
    ],
)
def test_a_compressed_instruction_needs_a_base_that_it_fits(name, base, sources, problem) -> None:
    made = group(("base", "imm[11:0] rs1 000 rd 0110011"))
    made.compressed(name, "100 1 rd 00000 10", base, **sources)
    with pytest.raises(EncodingError, match=problem):
        InstructionSet(made)

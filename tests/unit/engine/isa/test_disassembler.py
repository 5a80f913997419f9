"""What the disassembler writes, GNU's assembler reads as the same instruction."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from vmlab.engine.cpu.csr import CSRS
from vmlab.engine.isa.disassembler import disassemble
from vmlab.engine.isa.encoding import Decoded
from vmlab.engine.isa.riscv64 import RISCV64

PREFIX = "riscv64-linux-gnu-"
MARCH = "rv64imafdc_zicsr_zifencei_zba_zbb_zbs_zicbom_zicboz_svinval"
NAMES = {number: csr.name for number, csr in CSRS.items()}


def words() -> list[int]:
    """Words of every instruction, of which the assembler can write each."""
    source = random.Random(1)
    found = []
    for instruction in RISCV64:
        if instruction.name == "c.mv":
            continue  # both write "mv", of which the assembler makes an addi
        for _ in range(40):
            operands = {}
            for name, operand in instruction.pattern.operands.items():
                bits = source.choice((0, 1, 7, source.getrandbits(20)))
                if name == "imm" and instruction.assembly.endswith("rm"):
                    # Where nothing is rounded, the assembler knows no mode but 0.
                    never = instruction.name in ("fcvt.d.s", "fcvt.d.w", "fcvt.d.wu")
                    bits = 0 if never else source.choice((0, 1, 2, 3, 4, 7))
                if name == "imm" and instruction.extension == "Zicsr":
                    bits = source.choice(list(NAMES))
                if instruction.name == "fence" and name in ("rd", "rs1"):
                    bits = 0
                operands[name] = bits + operand.offset
            word = instruction.encode(**operands)
            if instruction.extension == "A":
                word |= source.getrandbits(2) << 25
            if instruction.name == "fence":
                word |= source.randrange(1, 16) << 24 | source.randrange(1, 16) << 20
            if RISCV64.find(word) is instruction:
                found.append(word)
    return found


def meaning(word: int) -> tuple[object, ...]:
    """What two encodings of the same instruction have in common."""
    decoded = RISCV64.decode(word)
    assert isinstance(decoded, Decoded), hex(word)
    kept = (
        word if decoded.instruction.extension == "A" or decoded.instruction.name == "fence" else 0
    )
    operands = decoded.rd, decoded.rs1, decoded.rs2, decoded.rs3, decoded.imm
    return (decoded.instruction.name, *operands, kept)


@pytest.mark.skipif(
    shutil.which(PREFIX + "as") is None, reason="needs Debian's gcc-riscv64-linux-gnu"
)
def test_the_assembler_reads_what_the_disassembler_writes(tmp_path: Path) -> None:
    every = words()
    # A target is an address to the reader; to the assembler it is a distance.
    text = "\n".join(disassemble(word, 0, NAMES) for word in every)
    lines = [".option norvc"]
    for word, line in zip(every, text.splitlines(), strict=True):
        decoded = RISCV64.decode(word)
        assert decoded is not None
        if "target" in decoded.instruction.assembly:
            line = line.replace(f"{decoded.imm & (1 << 64) - 1:#x}", f".{decoded.imm:+d}")
        lines.append(line)
    (tmp_path / "all.s").write_text("\n".join(lines) + "\n")
    made, image = tmp_path / "all.o", tmp_path / "all.bin"
    command = [PREFIX + "as", f"-march={MARCH}", "-mno-relax", "-o", made, tmp_path / "all.s"]
    subprocess.run(command, check=True)
    copy = [PREFIX + "objcopy", "-O", "binary", "-j", ".text", made, image]
    subprocess.run(copy, check=True)
    code = image.read_bytes()
    assert len(code) == 4 * len(every) > 20_000
    for index, word in enumerate(every):
        theirs = int.from_bytes(code[4 * index : 4 * index + 4], "little")
        assert meaning(theirs) == meaning(word), (lines[index + 1], hex(word), hex(theirs))


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (0x00000013, "nop"),
        (0x00008067, "ret"),
        (0x8082, "ret"),
        (0xFE0518E3, "bnez a0,0x80000ff0"),
        (0x852E, "mv a0,a1"),
        (0x30529073, "csrw mtvec,t0"),
        (0x1605B52F, "lr.d.aqrl a0,(a1)"),
        (0x6522, "ld a0,8(sp)"),
        (0x00000000, ".2byte 0x0"),
        (0xFFFFFFFF, ".4byte 0xffffffff"),
        (0x0100000F, "pause"),
    ],
)
def test_pseudo_instructions_are_used_where_people_do(word: int, text: str) -> None:
    assert disassemble(word, 0x8000_1000, NAMES) == text

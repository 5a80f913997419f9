"""Random programs as an outside oracle can run them, many in one file, and jumps by hand.

Each program has a block of state: registers and `fcsr` before it, overwritten by those after it,
and the memory that its pointers point into.
"""

from __future__ import annotations

import random

from tests.unit.engine.oracles.code import DATA, FCSR, Code
from tests.unit.engine.oracles.differences import QEMU_FAULTS

from vmlab.engine.isa.disassembler import disassemble
from vmlab.engine.isa.encoding import Decoded
from vmlab.engine.isa.programs import POINTERS, REACH, ProgramMaker, random_number
from vmlab.engine.isa.riscv64 import RISCV64

BLOCK = 8192
_FLOATING, _FCSR = 256, 512
_POINTER = 4096 + REACH  # from a block's start

# A reservation's size: what a store-conditional of another size does is left open.
OTHER_SIZE = {"w": ("lr.d", "sc.d"), "d": ("lr.w", "sc.w")}

SETS = (
    "I",
    "I M",
    "I A",
    "I C",
    "I Zba",
    "I Zbb",
    "I Zbs",
    "F I",
    "D F",
    "I M A F D C Zba Zbb Zbs",
)
"""Extensions of which programs are made, one a test."""


class Batch:
    """Programs of a set of extensions in one file.

    Args:
        extensions: separated by blanks.
        seed: the same programs for the same seed.
        programs: how many.
        length: instructions of each.
    """

    def __init__(self, extensions: str, seed: int, programs: int, length: int = 200) -> None:
        source = random.Random(f"{extensions} {seed}")
        without = (*OTHER_SIZE["wd"[seed % 2]], *QEMU_FAULTS)
        maker = ProgramMaker(RISCV64, extensions.split(), source.getrandbits(32), without)
        self.code = Code()
        self.data = bytearray()
        self.bodies: list[bytes] = []
        self.size = programs * BLOCK
        self.instructions = programs * length
        for number in range(programs):
            block = DATA + number * BLOCK
            self.data += self._block(source, block)
            self._prologue(block)
            program = maker.program(length)
            self.bodies.append(program.code)
            for start in program.starts:
                word = int.from_bytes(program.code[start : start + 4], "little")
                instruction = RISCV64.find(word)
                assert instruction is not None
                self.code.word(word & ((1 << 8 * instruction.pattern.length) - 1), instruction)
            self._epilogue()
        self.code.finish(DATA, self.size)

    def _block(self, source: random.Random, block: int) -> bytes:
        x = [random_number(source) for _ in range(32)]
        for pointer in POINTERS:
            x[pointer] = block + _POINTER
        f = [random_number(source) for _ in range(32)]
        fcsr = source.randrange(5) << 5 | source.getrandbits(5)
        words = b"".join(word.to_bytes(8, "little") for word in (*x, *f, fcsr))
        return words.ljust(4096, b"\0") + source.randbytes(4096)

    def _prologue(self, block: int) -> None:
        put = self.code.put
        self.code.address(31, block)
        put("ld", rd=30, rs1=31, imm=_FCSR)
        put("csrrw", rs1=30, imm=FCSR)
        for number in range(32):
            put("fld", rd=number, rs1=31, imm=_FLOATING + 8 * number)
        for number in range(1, 32):
            put("ld", rd=number, rs1=31, imm=8 * number)

    def _epilogue(self) -> None:
        put, pointer = self.code.put, POINTERS[-1]
        for _ in range(_POINTER // 2048):
            put("addi", rd=pointer, rs1=pointer, imm=-2048)
        for number in range(1, 32):
            put("sd", rs1=pointer, rs2=number, imm=8 * number)
        for number in range(32):
            put("fsd", rs1=pointer, rs2=number, imm=_FLOATING + 8 * number)
        put("csrrs", rd=30, imm=FCSR)
        put("sd", rs1=pointer, rs2=30, imm=_FCSR)

    def difference(self, ours: bytes, theirs: bytes) -> str | None:
        """The first program that ended otherwise, and how; None where all ended alike."""
        if ours == theirs:
            return None
        assert len(ours) == len(theirs), (len(ours), len(theirs))
        first = next(at for at in range(len(ours)) if ours[at] != theirs[at])
        number = first // BLOCK
        found = []
        for at in range(number * BLOCK, (number + 1) * BLOCK, 8):
            values = (int.from_bytes(each[at : at + 8], "little") for each in (ours, theirs))
            one, other = values
            if one != other:
                found.append(f"{_name(at % BLOCK)}: {one:#x}, there {other:#x}")
        body = self.bodies[number]
        return "\n".join([f"program {number}", *found, *listing(body)])


def _name(offset: int) -> str:
    if offset < _FLOATING:
        return f"x{offset // 8}"
    if offset < _FCSR:
        return f"f{(offset - _FLOATING) // 8}"
    return "fcsr" if offset == _FCSR else f"memory {offset - _POINTER:+d}"


def listing(code: bytes) -> list[str]:
    """A program's instructions in assembly."""
    lines, at = [], 0
    while at < len(code):
        word = int.from_bytes(code[at : at + 4].ljust(4, b"\0"), "little")
        decoded = RISCV64.decode(word)
        assert isinstance(decoded, Decoded)
        lines.append(f"  {at:5x}: {disassemble(word, at, {FCSR: 'fcsr'})}")
        at += decoded.length
    return lines


# Instruction, its operands but for the base register x5, and what bit 0 of the sum is.
_BY_REGISTER: tuple[tuple[str, dict[str, int], int], ...] = (
    ("jalr", {"rd": 1, "imm": -7}, 1),
    ("jalr", {"rd": 5, "imm": 0}, 0),
    ("jalr", {"rd": 0, "imm": 2047}, 0),
    ("jalr", {"rd": 7, "imm": -2048}, 1),
    ("c.jr", {}, 0),
    ("c.jalr", {}, 1),
)
_RELATIVE = (("jal", 4094), ("jal", 4), ("jal", 100_000), ("c.j", 2046), ("c.j", 2))


def jumps() -> tuple[Code, int]:
    """Jumps to registers and over many distances, and the stack pointer's short `addi`.

    What is jumped over is no instruction. Returns the code and the size of its result: what was in
    the link registers after each jump, and in the stack pointer.
    """
    code, count = Code(), 0

    def note(register: int) -> None:
        nonlocal count
        code.put("sd", rs1=8, rs2=register)
        code.put("addi", rd=8, rs1=8, imm=8)
        count += 1

    code.address(8, DATA)
    for register in (1, 5, 7):
        code.number(register, register)
    for name, operands, odd in _BY_REGISTER:
        for hole in (0, 2, 64, 3000):
            target = code.here + 8 + RISCV64[name].pattern.length + hole
            code.address(5, target - operands.get("imm", 0) + odd)
            code.put(name, rs1=5, **operands)
            code.bytes += bytes(hole)
            for register in (1, 5, 7):
                note(register)
    for name, distance in _RELATIVE:
        target = code.here + distance
        code.put(name, imm=distance, **({"rd": 1} if name == "jal" else {}))
        code.bytes += bytes(target - code.here)
        note(1)
    code.address(2, DATA)
    for immediate in (-512, 496, 16, -16):
        code.put("c.addi16sp", imm=immediate)
        note(2)
    code.finish(DATA, 8 * count)
    return code, 8 * count

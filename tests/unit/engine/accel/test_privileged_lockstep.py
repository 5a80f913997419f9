"""Native code does to CSRs, privileges, fences and blocks what the reference does, in lock-step.

Programs are random instructions of one extension among accesses to CSRs, in whatever state they
bring about. A trap goes on behind the instruction, as long as a program has not moved its handler:
one that went astray is left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from tests.figures import note
from tests.unit.engine.accel.test_lockstep import BASE, DATA, FIGURES, SIZE, prepare

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.lockstep import Lockstep
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.csr import CSRS
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.pmp import OPEN
from vmlab.engine.isa.programs import random_number
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.isa.values import signed
from vmlab.engine.memory.ram import Ram

EXTENSIONS = ("Zicsr", "privileged", "Svinval", "Zicbom", "Zicboz", "Zifencei", "I C")
SYSTEM = [each for each in RISCV64 if (RISCV64[each.base] if each.base else each).system]
MEPC, MSTATUS = 0x341, 0x300
LENGTH, HANDLER = 60, BASE + SIZE - 256
ROUNDS = 10  # a program may go in a circle, with the handler that it has moved
C_NOP = b"\x01\x00"


@pytest.fixture
def pair() -> Iterator[tuple[ReferenceExecutor, InterpreterExecutor]]:
    harts = [Hart(Ram(SIZE, BASE)) for _ in range(2)]
    yield ReferenceExecutor(harts[0]), InterpreterExecutor(harts[1])
    for hart in harts:
        hart.ram.close()


def handler() -> bytes:
    """Go on behind the instruction that has trapped, at any privilege."""
    words = [
        RISCV64["csrrs"].encode(rd=5, imm=MEPC),
        RISCV64["addi"].encode(rd=5, rs1=5, imm=4),
        RISCV64["csrrw"].encode(rs1=5, imm=MEPC),
        RISCV64["mret"].encode(),
    ]
    return b"".join(word.to_bytes(4, "little") for word in words)


def instruction(source: random.Random, extensions: list[str]) -> bytes:
    """One of the extensions', or an access to a CSR; four bytes."""
    chosen = extensions if source.random() < 0.6 else ["Zicsr"]
    one = source.choice([each for each in SYSTEM if each.extension in chosen])
    operands = {}
    for name, operand in one.pattern.operands.items():
        bits = source.getrandbits(operand.width)
        if name == "imm" and one.extension == "Zicsr":
            bits = source.choice(sorted(CSRS)) if source.random() < 0.95 else bits
        operands[name] = signed(bits, operand.width) if operand.signed else bits
    if one.extension.startswith("Zicbo"):
        operands["rs1"] = source.choice((2, 8, 9, 10))
    word = one.encode(**operands).to_bytes(one.pattern.length, "little")
    return (word + C_NOP)[:4]


def begin(harts: list[Hart], source: random.Random, code: bytes) -> None:
    """A program at some privilege, with what firmware would have allowed or not."""
    prepare(harts, code, source)
    privilege, environment = source.choice((0, 1, 3)), source.getrandbits(64)
    opened = source.random() < 0.9
    for hart in harts:
        hart.ram.write(HANDLER, handler())
        hart[layout.MTVEC] = HANDLER
        hart[layout.STVEC] = HANDLER
        hart[layout.MENVCFG] = environment & (1 << 63 | 0xF1)
        hart[layout.SENVCFG] = environment >> 8 & 0xF1
        hart[layout.MCOUNTEREN] = environment >> 16 & 7
        if opened:
            hart[layout.PMPADDR[0]], hart[layout.PMPCFG0] = (1 << 54) - 1, 0x1F
            hart[layout.PMP_OPEN] = OPEN
        hart[layout.PRIVILEGE] = privilege
        hart.set_x(10, random_number(random.Random(environment)))
        hart.set_timer_compare(environment & 63)


def run(
    pair: tuple[ReferenceExecutor, InterpreterExecutor],
    extensions: str,
    count: int,
    single: float = 0.2,
) -> int:
    """Run programs until so many instructions have retired; that part of them in single steps."""
    source = random.Random(f"{extensions} {count}")
    harts = [executor.hart for executor in pair]
    done = 0
    while done < count:
        code = b"".join(instruction(source, extensions.split()) for _ in range(LENGTH))
        begin(harts, source, code)
        lockstep = Lockstep(*pair, single=source.random() < single)
        for _ in range(ROUNDS):
            retired = lockstep.run(LENGTH, host=lambda left, hart: None, compared=2 * LENGTH)
            done += retired
            # It has left, waits, or traps without end.
            if not BASE <= harts[0].pc < BASE + len(code) or retired < LENGTH // 2:
                break
        start = DATA - 4096
        assert harts[0].ram.read(start, 8192) == harts[1].ram.read(start, 8192)
    return done


@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_they_run_alike(pair, extensions: str) -> None:
    assert run(pair, extensions, 2000) >= 2000


@pytest.mark.soak
@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_a_million_run_alike(pair, extensions: str) -> None:
    began = time.process_time()
    # In single steps: where a program traps without end, thousands of traps would not be compared.
    done = run(pair, extensions, 1_000_000, single=1)
    title, seconds = f"system instructions of {extensions}", round(time.process_time() - began)
    note(FIGURES, title, {"instructions": done, "cpu_seconds": seconds})

"""Native code does what the reference does: random programs, in lock-step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from tests.figures import note

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.lockstep import Divergence, Lockstep
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.isa.programs import POINTERS, REACH, ProgramMaker, random_number
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.memory.ram import Ram

BASE, SIZE = 0x8000_0000, 1 << 20
# Next to a page's end, so that accesses cross it.
DATA = BASE + SIZE // 2
WFI = (0x10500073).to_bytes(4, "little")
FLOATING_ON = 3 << 13
FIGURES = "engine-lockstep.json"


@pytest.fixture
def pair() -> Iterator[tuple[ReferenceExecutor, InterpreterExecutor]]:
    harts = [Hart(Ram(SIZE, BASE)) for _ in range(2)]
    yield ReferenceExecutor(harts[0]), InterpreterExecutor(harts[1])
    for hart in harts:
        hart.ram.close()


def prepare(harts: list[Hart], code: bytes, source: random.Random) -> None:
    numbers = [random_number(source) for _ in range(64)]
    memory = source.randbytes(2 * REACH)
    for hart in harts:
        hart.reset(BASE)
        hart[layout.TIME_DIVISOR] = 10
        hart[layout.MSTATUS] = FLOATING_ON
        hart[layout.MTVEC] = BASE + SIZE - 64
        hart.ram.write(BASE + SIZE - 64, WFI)
        hart.ram.write(BASE, code + WFI)
        hart.ram.write(DATA - REACH, memory)
        for number in range(32):
            hart.set_x(number, numbers[number])
            hart.set_f(number, numbers[32 + number])
        for pointer in POINTERS:
            hart.set_x(pointer, DATA)


# Read before the tests get an environment of their own.
MILLION = ("I", "I M", "I A", "I C", "I Zba", "I Zbb", "I Zbs", "F", "D")
EXTENSIONS = ("I", "I M", "I A", "I C", "I Zba Zbb Zbs", "F", "D", "F D C I", "I M A F D C Zbb")


@pytest.mark.parametrize("single", [False, True], ids=["blocks", "instructions"])
@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_random_programs_run_alike(pair, extensions: str, single: bool) -> None:
    source = random.Random(extensions)
    maker = ProgramMaker(RISCV64, extensions.split(), seed=len(extensions))
    harts = [executor.hart for executor in pair]
    for _ in range(4):
        program = maker.program(150 if single else 600)
        prepare(harts, program.code, source)
        Lockstep(*pair, single=single).run(1 << 20, host=lambda _exit, _hart: None)
        assert harts[0].pc == BASE + len(program.code) + len(WFI), "the program trapped"
        start = DATA - REACH
        assert harts[0].ram.read(start, 2 * REACH) == harts[1].ram.read(start, 2 * REACH)


@pytest.mark.soak
@pytest.mark.parametrize("extensions", [*MILLION, "F D C I"])
def test_a_million_instructions_run_alike(pair, extensions: str) -> None:
    source = random.Random(f"{extensions}soak")
    maker = ProgramMaker(RISCV64, extensions.split(), seed=77)
    harts = [executor.hart for executor in pair]
    done, began = 0, time.process_time()
    while done < 1_000_000:
        program = maker.program(1000)
        prepare(harts, program.code, source)
        done += Lockstep(*pair, stride=50).run(1 << 20, host=lambda _exit, _hart: None)
        assert harts[0].pc == BASE + len(program.code) + len(WFI), "the program trapped"
        start = DATA - REACH
        assert harts[0].ram.read(start, 2 * REACH) == harts[1].ram.read(start, 2 * REACH)
    seconds = round(time.process_time() - began)
    note(FIGURES, extensions, {"instructions": done, "cpu_seconds": seconds})


@pytest.mark.parametrize("single", [False, True], ids=["blocks", "instructions"])
def test_programs_run_alike_where_protection_differs_within_their_page(pair, single) -> None:
    """Four bytes of the page are nobody's; the timer's interrupt comes in the midst."""
    source = random.Random(4)
    maker = ProgramMaker(RISCV64, ["I", "C"], seed=4)
    harts = [executor.hart for executor in pair]
    for _ in range(2):
        program = maker.program(200)
        prepare(harts, program.code, source)
        moment = source.randrange(4, 12)
        for hart in harts:
            hart.ram.write(BASE + SIZE - 64, bytes.fromhex("73104030") + WFI)  # csrw mie, zero
            hart[layout.PRIVILEGE] = 1
            hart[layout.MIE] = 1 << 7
            hart.set_timer_compare(moment)
            hart[layout.PMPADDR[0]] = BASE + 4092 >> 2
            hart[layout.PMPADDR[1]] = (1 << 54) - 1
            hart[layout.PMPCFG0] = 0x1F10
            hart[layout.PMP_OPEN] = 0
        Lockstep(*pair, single=single).run(1 << 20, host=lambda _exit, _hart: None)
        assert harts[0][layout.MCAUSE] == 1 << 63 | 7
        assert BASE < harts[0][layout.MEPC] < BASE + len(program.code)
    for hart in harts:
        hart.set_timer_compare(layout.WORD)


def test_random_words_trap_alike(pair) -> None:
    """Any 32 bits do the same in both, be they illegal, a jump into nothing or a CSR access."""
    source = random.Random(3)
    harts = [executor.hart for executor in pair]
    for _ in range(60):
        prepare(harts, source.randbytes(400), source)
        Lockstep(*pair, single=True).run(40, host=complete)


def complete(left, hart: Hart) -> None:
    """A device that answers everything."""
    if left.reason.name == "READ":
        hart.complete_read(0x1122_3344_5566_7788)


def test_a_difference_is_named_with_its_instruction(pair) -> None:
    harts = [executor.hart for executor in pair]
    prepare(harts, bytes.fromhex("13051500"), random.Random(1))  # addi a0,a0,1
    harts[1].set_x(10, harts[0].x(10) ^ 1)
    with pytest.raises(Divergence, match="addi a0,a0,1") as caught:
        Lockstep(*pair, single=True).run(1, host=complete)
    assert set(caught.value.differences) == {"x10"}

"""Where runs end and interrupts are taken does not depend on who executes or how a run is cut.

Random programs in an endless loop, interrupted by a timer that they arm themselves, for random
budgets: both executors must agree at each end. Their counts are exact: so many single steps lead
to the same state.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.polling import SLICE
from vmlab.engine.isa.programs import POINTERS, REACH, ProgramMaker, random_number
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.memory.ram import Ram

BASE, SIZE = 0x8000_0000, 1 << 20
DATA = BASE + SIZE // 2
HANDLER = BASE + SIZE - 256
PER_TICK = 10
EXTENSIONS = (["I", "C"], ["I", "M", "A", "C", "Zba", "Zbb"], ["I", "F", "D", "C"])
STIE, STCE, MIE, FLOATING_ON = 1 << 5, 1 << 63, 1 << 3, 3 << 13
T0 = 5
MSCRATCH, STIMECMP, TIME = 0x340, 0x14D, 0xC01


def word(name: str, **operands: int) -> bytes:
    return RISCV64[name].encode(**operands).to_bytes(4, "little")


def handler(ticks: int) -> bytes:
    """Arm the timer again and go on; no register is changed."""
    return (
        word("csrrw", rd=T0, rs1=T0, imm=MSCRATCH)
        + word("csrrs", rd=T0, rs1=0, imm=TIME)
        + word("addi", rd=T0, rs1=T0, imm=ticks)
        + word("csrrw", rd=0, rs1=T0, imm=STIMECMP)
        + word("csrrw", rd=T0, rs1=T0, imm=MSCRATCH)
        + word("mret")
    )


@pytest.fixture(scope="module")
def executors() -> Iterator[tuple[Executor, Executor, Executor]]:
    harts = [Hart(Ram(SIZE, BASE)) for _ in range(3)]
    yield (
        ReferenceExecutor(harts[0]),
        InterpreterExecutor(harts[1]),
        InterpreterExecutor(harts[2]),
    )
    for hart in harts:
        hart.ram.close()


def prepare(harts: list[Hart], seed: int, ticks: int) -> None:
    """The same random program for all, about to begin."""
    source = random.Random(seed)
    maker = ProgramMaker(RISCV64, EXTENSIONS[seed % len(EXTENSIONS)], seed=seed)
    code = maker.program(source.randrange(3, 400)).code
    back = -len(code)
    numbers = [random_number(source) for _ in range(64)]
    memory = source.randbytes(2 * REACH)
    for hart in harts:
        hart.reset(BASE)
        hart[layout.TIME_DIVISOR] = PER_TICK
        hart[layout.MSTATUS] = FLOATING_ON | MIE
        hart[layout.MIE] = STIE
        hart[layout.MENVCFG] = STCE
        hart[layout.STIMECMP] = ticks
        hart[layout.MTVEC] = HANDLER
        hart.ram.write(HANDLER, handler(ticks))
        hart.ram.write(BASE, code + word("jal", rd=0, imm=back))
        hart.ram.write(DATA - REACH, memory)
        for number in range(32):
            hart.set_x(number, numbers[number])
            hart.set_f(number, numbers[32 + number])
        for pointer in POINTERS:
            hart.set_x(pointer, DATA)


BUDGETS = st.lists(st.integers(1, 3000), min_size=1, max_size=6)
SEEDS = st.integers(0, 1 << 32)
TICKS = st.integers(20, 500)
ONCE = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@ONCE
@given(SEEDS, TICKS, BUDGETS)
def test_runs_end_at_the_same_instruction(executors, seed: int, ticks: int, budgets) -> None:
    reference, native, _ = executors
    harts = [reference.hart, native.hart]
    prepare(harts, seed, ticks)
    for budget in budgets:
        before = harts[0].retired
        assert reference.run(budget) == native.run(budget)
        assert harts[0].architectural() == harts[1].architectural()
        # A page has no more than 2048 instructions between two poll points.
        assert budget <= harts[0].retired - before < budget + 2048
    assert harts[0].ram.read(BASE, SIZE) == harts[1].ram.read(BASE, SIZE)


@ONCE
@given(SEEDS, st.integers(50, 4000), st.lists(st.integers(1, 200 * SLICE), min_size=1, max_size=4))
def test_where_a_run_is_cut_makes_no_difference(executors, seed: int, ticks: int, budgets) -> None:
    """A run that another thread asks to end, and that is taken up again, ends as any other."""
    _, whole, cut = executors
    prepare([whole.hart, cut.hart], seed, ticks)
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.0002):
            cut.hart.request_exit()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for budget in budgets:
            until = whole.hart.retired + budget
            assert whole.run(budget).reason is Reason.BUDGET
            cut.hart.request_exit()
            reasons = []
            while (left := until - cut.hart.retired) > 0:
                reasons.append(cut.run(left).reason)
                cut.hart.clear_request()
            assert reasons[0] is Reason.REQUEST
            assert cut.hart.architectural() == whole.hart.architectural()
    finally:
        over.set()
        asking.join()
        # What it asked for last.
        cut.hart.clear_request()


@ONCE
@given(SEEDS, st.integers(1, 2000))
def test_the_count_at_an_exit_is_the_number_of_instructions(
    executors, seed: int, budget: int
) -> None:
    _, native, stepped = executors
    prepare([native.hart, stepped.hart], seed, 2000)
    for hart in (native.hart, stepped.hart):
        hart[layout.MIE] = 0
    native.run(budget)
    steps = native.hart.retired
    for _ in range(steps):
        assert stepped.step().reason is Reason.BUDGET
    assert stepped.hart.retired == steps
    assert stepped.hart.architectural() == native.hart.architectural()

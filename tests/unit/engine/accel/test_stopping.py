"""Breakpoints, watchpoints and steps under each executor.

Each program ends with `wfi`. RAM begins at 0x80000000.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.accel.stopping import NO_POINTS, Points, Watchpoint
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.layout import WATCH_READS, WATCH_WRITES
from vmlab.machine.errors import VmlabError

BASE = 0x8000_0000
DATA = BASE + 0x1_0000
BUDGET = 100_000
ADD_ONE = 0x0015_0513.to_bytes(4, "little")  # addi a0, a0, 1
Assemble = Callable[[str], bytes]


def load(executor: Executor, code: bytes) -> None:
    executor.hart.ram.write(BASE, code)


def until_it_waits(executor: Executor) -> list[int]:
    """Run to the end; where breakpoints were hit before, each of which is stepped over."""
    hits = []
    for _ in range(1000):
        left = executor.run(BUDGET)
        if left.reason is Reason.WAIT:
            return hits
        assert left.reason is Reason.BREAKPOINT, left
        hits.append(executor.hart.pc)
        executor.step()
    raise AssertionError("it never comes")


def breakpoints(*addresses: int) -> Points:
    return Points(frozenset(addresses))


def watch(address: int, size: int, kinds: int) -> Points:
    return Points(watchpoints=frozenset({Watchpoint(address, size, kinds)}))


def test_a_breakpoint_stops_before_its_instruction(executor: Executor, assemble: Assemble) -> None:
    load(executor, assemble(".option norvc\n addi a0, a0, 1\n addi a0, a0, 2\n wfi"))
    executor.stop_at(breakpoints(BASE + 4))
    assert executor.run(BUDGET) == Exit(Reason.BREAKPOINT)
    assert (executor.hart.pc, executor.hart.x(10), executor.hart.retired) == (BASE + 4, 1, 1)
    # It is still there, until it is stepped over.
    assert executor.run(BUDGET).reason is Reason.BREAKPOINT
    assert executor.step().reason is Reason.BUDGET
    assert (executor.hart.pc, executor.hart.x(10), executor.hart.retired) == (BASE + 8, 3, 2)
    assert executor.run(BUDGET).reason is Reason.WAIT


def test_a_breakpoint_in_a_loop_is_hit_each_time(executor: Executor, assemble: Assemble) -> None:
    code = assemble("""
        .option norvc
        li t0, 5
    1:  addi a0, a0, 1
        addi t0, t0, -1
        bnez t0, 1b
        wfi
    """)
    load(executor, code)
    executor.stop_at(breakpoints(BASE + 4, BASE + 12))
    assert until_it_waits(executor) == [BASE + 4, BASE + 12] * 5
    assert executor.hart.x(10) == 5


def test_breakpoints_come_and_go_while_code_is_decoded(
    executor: Executor, assemble: Assemble
) -> None:
    load(executor, assemble(".option norvc\n1: addi a0, a0, 1\n j 1b"))
    assert executor.run(10).reason is Reason.BUDGET
    executor.stop_at(breakpoints(BASE))
    assert executor.run(BUDGET).reason is Reason.BREAKPOINT
    executor.stop_at(NO_POINTS)
    assert executor.run(10).reason is Reason.BUDGET
    executor.stop_at(breakpoints(BASE + 4))
    assert executor.run(BUDGET).reason is Reason.BREAKPOINT
    assert executor.hart.pc == BASE + 4


def test_a_breakpoint_survives_that_its_page_is_rewritten(
    executor: Executor, assemble: Assemble
) -> None:
    """The guest replaces the very instruction, fences, and comes there again."""
    code = assemble("""
        .option norvc
        li t0, 3
        la t1, place
        lw t2, patch
    place:
        addi a0, a0, 1
        sw t2, 0(t1)
        fence.i
        addi t0, t0, -1
        bnez t0, place
        wfi
    patch:
        addi a0, a0, 16
    """)
    load(executor, code)
    place = BASE + code.index(ADD_ONE)
    executor.stop_at(breakpoints(place))
    assert until_it_waits(executor) == [place] * 3
    assert executor.hart.x(10) == 33


def test_a_breakpoint_is_met_where_code_crosses_a_page(
    executor: Executor, assemble: Assemble
) -> None:
    load(executor, assemble(".option norvc\n j 1f\n .fill 4090, 1, 0\n1:"))
    ends = assemble(".option norvc\n addi a0, a0, 1\n addi a0, a0, 2\n wfi")
    first = BASE + 4094
    executor.hart.ram.write(first, ends)
    executor.stop_at(breakpoints(first, first + 4))
    assert until_it_waits(executor) == [first, first + 4]
    assert executor.hart.x(10) == 3


# RAM is seen at 0x40000000, too, by a page of a gigabyte; `main` runs at both places, in S mode.
ALIAS = 0x4000_0000
PAGED = f"""
    .option norvc
    li t0, -1
    srli t0, t0, 10
    csrw pmpaddr0, t0
    li t0, 0x1f
    csrw pmpcfg0, t0
    la t0, table
    li t1, 0xcf | (0x80000 << 10)
    sd t1, 8(t0)
    sd t1, 16(t0)
    srli t0, t0, 12
    li t1, 8 << 60
    or t0, t0, t1
    csrw satp, t0
    li t0, 1 << 11
    csrs mstatus, t0
    la t0, main
    csrw mepc, t0
    mret
    .balign 4096
table:
    .fill 4096, 1, 0
main:
    addi a0, a0, 1
    la t0, main
    li t1, {BASE}
    bltu t0, t1, done
    li t1, {BASE - ALIAS}
    sub t0, t0, t1
    jr t0
done:
    wfi
"""


@pytest.mark.parametrize("there", [BASE, ALIAS])
def test_a_breakpoint_is_a_virtual_address(
    there: int, executor: Executor, assemble: Assemble
) -> None:
    load(executor, assemble(PAGED))
    executor.stop_at(breakpoints(there + 0x2000))
    assert until_it_waits(executor) == [there + 0x2000]
    assert executor.hart.x(10) == 2


def test_a_breakpoint_is_met_in_a_page_that_protection_divides(
    executor: Executor, assemble: Assemble
) -> None:
    """Four bytes of the page are nobody's, not even M mode's."""
    code = assemble("""
        .option norvc
        la t0, nobodys
        srli t0, t0, 2
        csrw pmpaddr0, t0
        li t0, 0x90
        csrw pmpcfg0, t0
        li t1, 3
    1:  addi a0, a0, 1
        addi t1, t1, -1
        bnez t1, 1b
        wfi
    nobodys:
        .word 0
    """)
    load(executor, code)
    place = BASE + code.index(ADD_ONE)
    executor.stop_at(breakpoints(place, place + 8))
    assert until_it_waits(executor) == [place, place + 8] * 3
    assert executor.hart.x(10) == 3


def test_a_page_that_only_looks_like_one_with_a_breakpoint_runs_on(
    executor: Executor, assemble: Assemble
) -> None:
    """The filter of pages with breakpoints goes by six bits of the page's number."""
    load(executor, assemble("li t0, 0x80042000\n jr t0"))
    executor.hart.ram.write(BASE + 0x4_2000, assemble(".option norvc\n addi a0, a0, 1\n wfi"))
    executor.stop_at(breakpoints(BASE + 0x2000))
    assert until_it_waits(executor) == []
    assert executor.hart.x(10) == 1


def test_a_watchpoint_is_a_virtual_address(executor: Executor, assemble: Assemble) -> None:
    """As a real hart's triggers are: what comes by another address is not seen."""
    stores = f"""
    addi a0, a0, 1
    li t3, {DATA - BASE + ALIAS}
    sw a0, 0(t3)
    li t3, {DATA}
    sw a0, 4(t3)
"""
    load(executor, assemble(PAGED.replace("    addi a0, a0, 1\n", stores)))
    executor.stop_at(watch(DATA, 8, WATCH_WRITES))
    for _ in range(2):
        assert executor.run(BUDGET) == Exit(Reason.WATCHPOINT, DATA + 4, 4, WATCH_WRITES)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert executor.hart.ram.read(DATA, 8) == bytes((2, 0, 0, 0, 2, 0, 0, 0))


@pytest.mark.parametrize(
    ("instruction", "kinds", "size"),
    [
        ("sw t1, 4(t0)", WATCH_WRITES, 4),
        ("lw a0, 4(t0)", WATCH_READS, 4),
        ("sd t1, 0(t0)", WATCH_WRITES, 8),
        ("ld a0, 1(t0)", WATCH_READS, 8),
        ("fsw ft0, 4(t0)", WATCH_WRITES, 4),
        ("amoadd.w a0, t1, (t3)", WATCH_READS | WATCH_WRITES, 4),
        ("lr.w a0, (t3)", WATCH_READS, 4),
        ("sc.w a0, t1, (t3)", WATCH_WRITES, 4),
        (".word 0x0042a00f  # cbo.zero (t0)", WATCH_WRITES, 64),
    ],
)
def test_a_watchpoint_stops_after_the_access(
    instruction: str, kinds: int, size: int, executor: Executor, assemble: Assemble
) -> None:
    code = assemble(f"""
        .option norvc
        li t0, 3 << 13
        csrs mstatus, t0
        li t0, {DATA}
        li t1, 7
        addi t3, t0, 4
        lw t2, 4(t0)
        sw t2, 4(t0)
        {instruction}
        wfi
    """)
    load(executor, code)
    last = BASE + len(code) - 4
    # The two accesses in front of the instruction fill the TLB.
    executor.stop_at(breakpoints(last - 4))
    assert executor.run(BUDGET).reason is Reason.BREAKPOINT
    executor.stop_at(watch(DATA + 4, 4, WATCH_READS | WATCH_WRITES))
    left = executor.run(BUDGET)
    assert (left.reason, left.size, left.data) == (Reason.WATCHPOINT, size, kinds)
    assert left.address <= DATA + 4 < left.address + size
    assert executor.hart.pc == last
    assert executor.run(BUDGET).reason is Reason.WAIT


@pytest.mark.parametrize(
    ("kinds", "hits"), [(WATCH_READS, 1), (WATCH_WRITES, 2), (WATCH_READS | WATCH_WRITES, 3)]
)
def test_a_watchpoint_is_for_kinds_of_access(
    kinds: int, hits: int, executor: Executor, assemble: Assemble
) -> None:
    code = assemble(f"""
        li t0, {DATA}
        sw t0, 0(t0)
        lw t1, 0(t0)
        sb t0, 1(t0)
        lw t1, 4(t0)
        sd t0, -8(t0)
        wfi
    """)
    load(executor, code)
    executor.stop_at(watch(DATA, 4, kinds))
    found = 0
    while (left := executor.run(BUDGET)).reason is Reason.WATCHPOINT:
        found += 1
    assert left.reason is Reason.WAIT
    assert found == hits


def test_what_is_not_watched_in_a_watched_page_is_no_hit(
    executor: Executor, assemble: Assemble
) -> None:
    code = assemble(f"""
        li t0, {DATA}
        li t1, 50
    1:  sd t1, 0(t0)
        ld t2, 16(t0)
        addi t1, t1, -1
        bnez t1, 1b
        sd t1, 8(t0)
        wfi
    """)
    load(executor, code)
    executor.stop_at(watch(DATA + 8, 8, WATCH_READS | WATCH_WRITES))
    left = executor.run(BUDGET)
    assert (left.reason, left.address) == (Reason.WATCHPOINT, DATA + 8)
    assert executor.hart.x(6) == 0
    executor.stop_at(NO_POINTS)
    assert executor.run(BUDGET).reason is Reason.WAIT


def test_an_access_that_traps_is_no_hit(executor: Executor, assemble: Assemble) -> None:
    code = assemble(f"""
        la t0, trap
        csrw mtvec, t0
        li t0, {DATA + 1}
        lr.w a0, (t0)
        .balign 4
    trap:
        csrr a1, mcause
        wfi
    """)
    load(executor, code)
    executor.stop_at(watch(DATA, 8, WATCH_READS))
    while (left := executor.run(BUDGET)).reason is Reason.BUDGET:
        pass
    assert left.reason is Reason.WAIT
    assert executor.hart.x(11) == 4


def test_a_watched_device_is_answered_once_and_then_told(
    executor: Executor, assemble: Assemble
) -> None:
    load(executor, assemble("li t0, 0x10000000\n lw a0, 0(t0)\n addi a0, a0, 1\n wfi"))
    executor.stop_at(watch(0x1000_0000, 4, WATCH_READS))
    left = executor.run(BUDGET)
    assert (left.reason, left.address) == (Reason.READ, 0x1000_0000)
    executor.hart.complete_read(41)
    assert executor.run(BUDGET) == Exit(Reason.WATCHPOINT, 0x1000_0000, 4, WATCH_READS)
    assert executor.hart.x(10) == 41
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert executor.hart.x(10) == 42


def test_a_store_to_watched_code_is_a_hit_and_takes_effect(
    executor: Executor, assemble: Assemble
) -> None:
    code = assemble("""
        .option norvc
        la t0, place
        lw t1, patch
        sw t1, 0(t0)
    place:
        addi a0, a0, 1
        wfi
    patch:
        addi a0, a0, 16
    """)
    load(executor, code)
    place = BASE + code.index(ADD_ONE)
    executor.stop_at(watch(place, 4, WATCH_WRITES))
    assert executor.run(BUDGET).reason is Reason.WATCHPOINT
    assert executor.hart.pc == place
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert executor.hart.x(10) == 16


def test_a_hart_has_so_many_watchpoints() -> None:
    many = frozenset(Watchpoint(DATA + 8 * place, 8, WATCH_WRITES) for place in range(9))
    with pytest.raises(VmlabError, match="a hart has 8 watchpoints, not 9"):
        Points(watchpoints=many)


def test_every_one_of_them_watches(executor: Executor, assemble: Assemble) -> None:
    stores = "\n".join(f"sb t0, {16 * place}(t0)" for place in range(8))
    load(executor, assemble(f"li t0, {DATA}\n{stores}\n wfi"))
    every = [Watchpoint(DATA + 16 * place, 1, WATCH_WRITES) for place in range(8)]
    executor.stop_at(Points(watchpoints=frozenset(every)))
    for one in every:
        left = executor.run(BUDGET)
        assert (left.reason, left.address) == (Reason.WATCHPOINT, one.address)
    assert executor.run(BUDGET).reason is Reason.WAIT


def test_a_masked_step_takes_no_interrupt(executor: Executor, assemble: Assemble) -> None:
    code = assemble("""
        .option norvc
        la t0, handler
        csrw mtvec, t0
        li t0, 1 << 3
        csrw mie, t0
        csrs mstatus, t0
        nop
        nop
        wfi
        .balign 4
    handler:
        addi a1, a1, 1
        wfi
    """)
    load(executor, code)
    nops = BASE + code.index(0x13.to_bytes(4, "little"))
    executor.stop_at(breakpoints(nops))
    assert executor.run(BUDGET).reason is Reason.BREAKPOINT
    executor.hart.set_pending(3, True)
    executor.step(masked=True)
    assert executor.hart.pc == nops + 4
    executor.step()
    assert executor.hart.x(11) == 1


def test_a_step_executes_one_instruction_of_a_page_that_it_writes(
    executor: Executor, assemble: Assemble
) -> None:
    load(executor, assemble(".option norvc\n la t0, 0f\n sw t0, 64(t0)\n0: nop\n nop\n wfi"))
    executor.stop_at(breakpoints(BASE + 8))
    assert executor.run(BUDGET).reason is Reason.BREAKPOINT
    executor.step()
    assert (executor.hart.retired, executor.hart.pc) == (3, BASE + 12)


def test_a_reset_hart_stops_where_it_did(executor: Executor, assemble: Assemble) -> None:
    load(executor, assemble(f".option norvc\n li t0, {DATA}\n sw t0, 0(t0)\n nop\n wfi"))
    watched = Watchpoint(DATA, 4, WATCH_READS | WATCH_WRITES)
    executor.stop_at(Points(frozenset({BASE}), frozenset({watched})))
    for _ in range(2):
        assert executor.run(BUDGET).reason is Reason.BREAKPOINT
        executor.step()
        assert executor.run(BUDGET).reason is Reason.WATCHPOINT
        executor.hart.reset(BASE)
        executor.hart[layout.TIME_DIVISOR] = 10


@pytest.mark.parametrize("executor", ["interpreter"], indirect=True)
def test_hits_are_counted_when_that_is_wanted(
    executor: InterpreterExecutor, assemble: Assemble
) -> None:
    code = assemble(f"""
        .option norvc
        li t0, {DATA}
        li t1, 100
        la t3, 2f
        j 1f
        .balign 4096
    1:  sd t1, 0(t0)
        ld t2, 8(t0)
        ld t2, 16(t0)
        jalr t3
        addi t1, t1, -1
        bnez t1, 1b
        wfi
        .balign 4096
    2:  ret
    """)
    load(executor, code)
    for wanted in (False, True):
        before = [sum(counts) for counts in zip(*executor.set_counters(), strict=True)]
        executor.count_hits(wanted)
        executor.hart.pc = BASE
        assert executor.run(BUDGET).reason is Reason.WAIT
        after = [sum(counts) for counts in zip(*executor.set_counters(), strict=True)]
        counts = [new - old for new, old in zip(after, before, strict=True)]
        assert counts[layout.READ_MISSES] == 1
        assert counts[layout.WRITE_MISSES] == 1
        assert counts[layout.SET_FILLS] == 2
        assert counts[layout.CODE_MISSES] == 3
        assert counts[layout.READ_HITS] == (199 if wanted else 0)
        assert counts[layout.WRITE_HITS] == (99 if wanted else 0)
        # There and back, but for the first time to each page.
        assert counts[layout.CODE_HITS] == (199 if wanted else 0)

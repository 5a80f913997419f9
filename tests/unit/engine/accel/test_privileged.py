"""The privileged architecture under each executor, by programs in assembly.

Each program ends with `wfi`, or says what went wrong in a0 first. RAM begins at 0x80000000.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Exit, Reason

BUDGET = 20_000
Assemble = Callable[[str], bytes]

# Everything is open to S and U mode, and M mode's traps go to `trap`, which ends the program.
PRELUDE = """
    la t0, trap
    csrw mtvec, t0
    li t0, -1
    srli t0, t0, 10
    csrw pmpaddr0, t0
    li t0, 0x1f
    csrw pmpcfg0, t0
    j main
    .balign 4
trap:
    csrr s2, mcause
    csrr s3, mepc
    csrr s4, mtval
    csrr s5, mstatus
    csrw mie, zero
    wfi
    .macro enter mode, where
    li t0, 3 << 11
    csrc mstatus, t0
    li t0, \\mode << 11
    csrs mstatus, t0
    la t0, \\where
    csrw mepc, t0
    mret
    .endm
main:
"""


def run(executor: Executor, code: bytes) -> Exit:
    executor.hart.ram.write(0x8000_0000, code)
    return executor.run(BUDGET)


def trap_of(executor: Executor) -> tuple[int, int]:
    """The cause and the value of the trap that ended a program."""
    return executor.hart.x(18), executor.hart.x(20)


@pytest.mark.parametrize(
    ("instruction", "cause", "value"),
    [
        (".2byte 0", 2, 0),
        (".4byte 0xffffffff", 2, 0xFFFF_FFFF),
        ("ebreak", 3, None),
        ("csrr a0, 0x7a0", 2, 0x7A00_2573),
        ("csrw mhartid, a0", 2, 0xF145_1073),
        ("lr.w a0, (a1)", 4, 0x8000_2001),
        ("amoadd.w a0, a0, (a1)", 6, 0x8000_2001),
        ("ecall", 11, 0),
        ("fadd.s f0, f0, f0", 2, 0x0000_7053),
        ("jr a2", 1, 0x1000),
        ("amoadd.w a0, a0, (a2)", 7, 0x1000),
    ],
)
def test_exceptions_of_m_mode(executor, assemble, instruction, cause, value) -> None:
    code = assemble(
        PRELUDE + f"li a1, 0x80002001\n li a2, 0x1000\n la s6, 1f\n 1: {instruction}\n li a0, 77"
    )
    assert run(executor, code).reason is Reason.WAIT
    hart = executor.hart
    assert trap_of(executor)[0] == cause
    expected = hart.x(22) if cause == 3 else value
    assert trap_of(executor)[1] == expected
    assert hart.x(19) == (0x1000 if cause == 1 else hart.x(22))
    assert hart.x(21) >> 11 & 3 == 3


@pytest.mark.parametrize(
    ("instruction", "cause"),
    [
        ("csrr a0, mstatus", 2),
        ("mret", 2),
        ("ecall", 9),
        ("csrr a0, sstatus", None),
        ("sfence.vma", None),
        ("csrr a0, cycle", 2),
        ("csrr a0, stimecmp", 2),
        ("cbo.zero (sp)", 2),
    ],
)
def test_what_s_mode_may(executor, assemble, instruction, cause) -> None:
    instruction = instruction.replace("stimecmp", "0x14d").replace(
        "cbo.zero (sp)", ".4byte 0x0041200f"
    )
    code = assemble(PRELUDE + f"enter 1, 1f\n1: {instruction}\n ebreak")
    assert run(executor, code).reason is Reason.WAIT
    assert trap_of(executor)[0] == (3 if cause is None else cause)


@pytest.mark.parametrize(
    ("instruction", "cause"),
    [("csrr a0, sstatus", 2), ("sret", 2), ("wfi", 2), ("sfence.vma", 2), ("ecall", 8)],
)
def test_what_u_mode_may_not(executor, assemble, instruction, cause) -> None:
    code = assemble(PRELUDE + f"enter 0, 1f\n1: {instruction}\n ebreak")
    assert run(executor, code).reason is Reason.WAIT
    assert trap_of(executor)[0] == cause


@pytest.mark.parametrize(("bit", "instruction"), [(20, "sfence.vma"), (22, "sret"), (21, "wfi")])
def test_m_mode_can_watch_what_s_mode_does(executor, assemble, bit, instruction) -> None:
    code = assemble(
        PRELUDE + f"li t0, 1 << {bit}\n csrs mstatus, t0\n enter 1, 1f\n1: {instruction}"
    )
    assert run(executor, code).reason is Reason.WAIT
    assert trap_of(executor)[0] == 2


@pytest.mark.parametrize(
    ("csr", "written", "kept"),
    [
        ("mstatus", -1, 0x8000_000A_007E_79AA),
        ("sstatus", -1, 0x8000_0002_000C_6122),
        ("misa", 0, 0x8000_0000_0014_112D),
        ("mtvec", 0x8000_0003, None),
        ("stvec", 0x8000_0101, 0x8000_0101),
        ("mepc", -1, (1 << 64) - 2),
        ("medeleg", -1, 0xB3FF),
        ("mideleg", -1, 0x222),
        ("mie", -1, 0xAAA),
        ("satp", 0x7 << 60, 0),
        ("satp", 0x8 << 60 | 0xFFFF << 44 | 0x8_0000, 0x8 << 60 | 0xFFFF << 44 | 0x8_0000),
        ("satp", 0x9 << 60 | 1, 0x9 << 60 | 1),
        ("mcounteren", -1, 7),
        ("menvcfg", -1, 0x8000_0000_0000_00F1),
        ("pmpaddr5", -1, (1 << 54) - 1),
        ("pmpcfg2", 0x62, 0),  # W without R is reserved: the byte stays as it was
        ("mhpmcounter3", -1, 0),
    ],
)
def test_writes_keep_what_is_legal(executor, assemble, csr, written, kept) -> None:
    code = assemble(code_text(csr, written))
    assert run(executor, code).reason is Reason.WAIT
    hart = executor.hart
    assert hart.x(10) == (hart.x(11) if kept is None else kept)


def code_text(csr: str, written: int) -> str:
    names = {"menvcfg": "0x30a"}
    name = names.get(csr, csr)
    return f"csrr a1, {name}\n li a0, {written}\n csrw {name}, a0\n csrr a0, {name}\n wfi"


def test_minstret_reads_what_was_written(executor, assemble) -> None:
    code = assemble("li a0, 1000\n csrw minstret, a0\n csrr a1, minstret\n csrr a2, minstret\n wfi")
    assert run(executor, code).reason is Reason.WAIT
    assert (executor.hart.x(11), executor.hart.x(12)) == (1000, 1001)


def test_delegated_exception_goes_to_s_mode_and_back(executor, assemble) -> None:
    code = assemble(
        PRELUDE
        + """
        li t0, 1 << 8
        csrw medeleg, t0
        la t0, handler
        csrw stvec, t0
        enter 0, user
        user: ecall
        li a0, 5
        .2byte 0
        .balign 4
        handler: csrr s7, scause
        csrr t0, sepc
        addi t0, t0, 4
        csrw sepc, t0
        csrr s8, sstatus
        sret
        """
    )
    assert run(executor, code).reason is Reason.WAIT
    hart = executor.hart
    assert hart.x(23) == 8
    assert hart.x(24) >> 8 & 1 == 0  # SPP: it came from U mode
    assert hart.x(10) == 5
    assert trap_of(executor)[0] == 2


def test_software_interrupt_is_taken_when_it_is_enabled(executor, assemble) -> None:
    code = assemble(
        PRELUDE
        + """
        li t0, 1 << 1
        csrs mie, t0
        csrs mip, t0
        li a0, 1
        csrsi mstatus, 8
        li a0, 2
        """
    )
    assert run(executor, code).reason is Reason.WAIT
    assert trap_of(executor)[0] == 1 << 63 | 1
    assert executor.hart.x(10) == 1


def test_vectored_interrupt_enters_by_its_number(executor, assemble) -> None:
    code = assemble(
        """
        la t0, vectors
        ori t0, t0, 1
        csrw mtvec, t0
        li t0, 1 << 9
        csrs mie, t0
        csrsi mstatus, 8
        1: j 1b
        .balign 4
        vectors:
        .rept 9
        .4byte 0
        .endr
        csrw mie, zero
        wfi
        """
    )
    executor.hart.set_pending(9, True)
    assert run(executor, code).reason is Reason.WAIT
    assert executor.hart[layout.MCAUSE] == 1 << 63 | 9


def test_supervisor_timer_of_sstc_ends_a_loop(executor, assemble) -> None:
    code = assemble(
        PRELUDE
        + """
        li t0, 1
        slli t0, t0, 63
        csrw 0x30a, t0
        li t0, 7
        csrw mcounteren, t0
        li t0, 0x222
        csrw mideleg, t0
        la t0, handler
        csrw stvec, t0
        enter 1, supervisor
        supervisor: rdtime t0
        addi t0, t0, 100
        csrw 0x14d, t0
        li t1, 1 << 5
        csrs sie, t1
        csrsi sstatus, 2
        1: addi a0, a0, 1
        j 1b
        .balign 4
        handler: csrr s7, scause
        ebreak
        """
    )
    assert run(executor, code).reason is Reason.WAIT
    assert executor.hart.x(23) == 1 << 63 | 5
    assert executor.hart.x(10) >= 100


def test_waiting_ends_with_a_line_even_if_interrupts_are_off(executor, assemble) -> None:
    code = assemble("li t0, 1 << 11\n csrs mie, t0\n wfi\n li a0, 9\n 1: j 1b")
    assert run(executor, code).reason is Reason.WAIT
    assert executor.hart.x(10) == 0
    executor.hart.set_pending(11, True)
    assert executor.run(3).reason is Reason.BUDGET
    assert executor.hart.x(10) == 9


def test_a_request_ends_a_loop_from_another_thread(executor, assemble) -> None:
    import threading

    timer = threading.Timer(0.05, executor.hart.request_exit)
    timer.start()
    executor.hart.ram.write(0x8000_0000, assemble("1: addi a0, a0, 1\n j 1b"))
    try:
        assert executor.run(1 << 60).reason is Reason.REQUEST
    finally:
        timer.join()
    executor.hart.clear_request()
    assert executor.run(100).reason is Reason.BUDGET


def test_a_guest_that_only_traps_is_told(executor, assemble) -> None:
    assert (
        run(executor, assemble("li t0, 0\n csrw mtvec, t0\n .2byte 0")).reason is Reason.TRAP_LOOP
    )


def test_call_from_s_mode_leaves_for_firmware_where_there_is_some(executor, assemble) -> None:
    executor.hart[layout.FIRMWARE_CALLS] = 1
    code = assemble(PRELUDE + "enter 1, 1f\n1: li a7, 8\n ecall\n ebreak")
    assert run(executor, code).reason is Reason.FIRMWARE_CALL
    assert executor.hart.x(17) == 8
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert trap_of(executor)[0] == 3


def test_a_device_load_is_completed_once(executor, assemble) -> None:
    code = assemble("li a0, 0x10000000\n lb a1, 5(a0)\n lhu a2, 2(a0)\n sw a1, 8(a0)\n wfi")
    left = run(executor, code)
    assert left == Exit(Reason.READ, 0x1000_0005, 1, 0)
    retired = executor.hart.retired
    executor.hart.complete_read(0x80)
    left = executor.run(BUDGET)
    assert left == Exit(Reason.READ, 0x1000_0002, 2, 0)
    assert executor.hart.retired == retired + 1
    executor.hart.complete_read(0xFFFF)
    assert executor.run(BUDGET) == Exit(Reason.WRITE, 0x1000_0008, 4, 0xFFFF_FF80)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert executor.hart.x(11) == (1 << 64) - 0x80
    assert executor.hart.x(12) == 0xFFFF

"""Two harts on two threads: atomics, reservations, interrupts, code changed under the other."""

from __future__ import annotations

import threading

import pytest

from vmlab.engine.accel.interpreter import CodePages, InterpreterExecutor, native_code
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.interrupts import MSWI_BASE, InterruptBlock
from vmlab.engine.memory.ram import Ram

# Of two that wait for each other one may stand still.
pytestmark = pytest.mark.timeout(1800)

BASE, CLINT = 0x8000_0000, 0x200_0000
COUNTER, LOCK, GUARDED = BASE + 0x2000, BASE + 0x2040, BASE + 0x2080
ROUNDS = 10_000_000  # enough that the two overlap on a busy host


def run_both(ram: Ram) -> list[Exit]:
    """Run two harts, a0 their number, until both leave."""
    pages = CodePages(ram, native_code())
    block = InterruptBlock(2)
    block.words[MSWI_BASE] = CLINT
    harts = [Hart(ram, number, block) for number in range(2)]
    executors = [InterpreterExecutor(hart, pages) for hart in harts]
    exits: list[Exit | None] = [None, None]

    def run(number: int) -> None:
        harts[number].set_x(10, number)
        exits[number] = executors[number].run(1 << 40)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [left for left in exits if left is not None]


TOGETHER = f"""
    li s4, {GUARDED + 64}
    li t1, 1
    li t2, 2
    amoadd.d zero, t1, (s4)
    together: ld t3, (s4)
    bne t3, t2, together
    li s3, {ROUNDS}
"""


def test_no_increment_is_lost(ram, assemble) -> None:
    ram.write(
        BASE,
        assemble(
            f"""
            {TOGETHER}
            li s0, {COUNTER}
            1: amoadd.d zero, t1, (s0)
            2: lr.d t2, (s0)
            add t2, t2, t1
            sc.d t3, t2, (s0)
            bnez t3, 2b
            addi s3, s3, -1
            bnez s3, 1b
            wfi
            """
        ),
    )
    assert [left.reason for left in run_both(ram)] == [Reason.WAIT] * 2
    assert ram.load64(COUNTER) == 4 * ROUNDS


@pytest.mark.parametrize(
    "acquire",
    [
        "amoswap.w.aq t2, t1, (s1)\n bnez t2, acquire",
        "lr.w.aq t2, (s1)\n bnez t2, acquire\n sc.w t2, t1, (s1)\n bnez t2, acquire",
    ],
    ids=["amo", "reservation"],
)
def test_a_lock_keeps_others_out(ram, assemble, acquire: str) -> None:
    ram.write(
        BASE,
        assemble(
            f"""
            {TOGETHER}
            li s1, {LOCK}
            li s2, {GUARDED}
            acquire: {acquire}
            ld t3, (s2)
            addi t3, t3, 1
            sd t3, (s2)
            amoswap.w.rl zero, zero, (s1)
            addi s3, s3, -1
            bnez s3, acquire
            wfi
            """
        ),
    )
    assert [left.reason for left in run_both(ram)] == [Reason.WAIT] * 2
    assert ram.load64(GUARDED) == 2 * ROUNDS


TURNS = 1000


def test_harts_take_turns_by_interrupts(ram, assemble) -> None:
    """Whoever has its turn counts, and gives it to the other one by MSWI; neither leaves."""
    ram.write(
        BASE,
        assemble(
            f"""
            li s0, {CLINT}
            slli t0, a0, 2
            add s1, s0, t0
            xori t0, a0, 1
            slli t0, t0, 2
            add s2, s0, t0
            li s3, {COUNTER}
            li s4, {TURNS}
            li t1, 1
            bnez a0, 2f
            1: ld t0, (s3)
            addi t0, t0, 1
            sd t0, (s3)
            fence w, o
            sw t1, (s2)
            2: csrr t0, mip
            andi t0, t0, 8
            beqz t0, 2b
            sw zero, (s1)
            addi s4, s4, -1
            bnez s4, 1b
            sw t1, (s2)
            wfi
            """
        ),
    )
    assert [left.reason for left in run_both(ram)] == [Reason.WAIT] * 2
    assert ram.load64(COUNTER) == 2 * TURNS - 1


def test_code_that_another_hart_changes_is_executed_as_changed(ram, assemble) -> None:
    """Hart 1 waits in a loop that hart 0 overwrites with the way out."""
    ram.write(
        BASE,
        assemble(
            """
            .option norvc
            lla t0, loop
            lw t1, way_out
            bnez a0, loop
            li t2, 100000
            1: addi t2, t2, -1
            bnez t2, 1b
            sw t1, (t0)
            fence
            wfi
            way_out: j done
            .balign 4096
            loop: addi a1, a1, 1
            j loop
            .balign 64
            done: wfi
            """
        ),
    )
    code = bytearray(ram.read(BASE, 0x1100))
    # The way out is a jump from `loop`, not from where it is kept: 64 bytes ahead.
    place = code.index((0x10500073).to_bytes(4, "little")) + 4
    ram.write(BASE + place, (0x0400_006F).to_bytes(4, "little"))
    assert [left.reason for left in run_both(ram)] == [Reason.WAIT] * 2

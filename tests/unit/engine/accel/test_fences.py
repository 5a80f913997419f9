"""Fences that one hart asks another one for: what is done without leaving, and what is not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from tests.unit.engine.accel.test_memory import OPEN_PMP, SUPERVISOR, A, D, R, Tables, V, W, X

from vmlab.engine.accel.interpreter import CodePages, InterpreterExecutor, native_code
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.interrupts import TOLD, InterruptBlock
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.memory.ram import CODE, Ram

BASE = 0x8000_0000
PROGRAMS = BASE, BASE + 0x1000
FRAMES = BASE + 0x2000, BASE + 0x3000
STOP = BASE + 0x4000
SEEN = 0x4000_0000
ALL = V | R | W | X | A | D
REMOTE_FENCE, FENCE_I, SFENCE_VMA, SFENCE_VMA_ASID = 0x5246_4E43, 0, 1, 2
A0, A1, A6, A7, S0, S1, S2, S3, S4, S5 = 10, 11, 16, 17, 8, 9, 18, 19, 20, 21
ROUNDS = 10_000
WORD = (1 << 64) - 1


class Pair:
    """Two harts in S mode, with one address space; both see all of RAM where it is."""

    def __init__(self, ram: Ram, kind: type[ReferenceExecutor] | type[InterpreterExecutor]) -> None:
        self.ram = ram
        self.block = InterruptBlock(2)
        self.harts = [Hart(ram, number, self.block) for number in range(2)]
        self.executors: list[ReferenceExecutor | InterpreterExecutor]
        if kind is ReferenceExecutor:
            self.executors = [ReferenceExecutor(hart) for hart in self.harts]
        else:
            pages = CodePages(ram, native_code())
            self.executors = [InterpreterExecutor(hart, pages) for hart in self.harts]
        tables = Tables(self.harts[0])
        tables.map(BASE, BASE, ALL, level=2)
        self.entry = tables.map(SEEN, FRAMES[0], ALL)
        for hart, place in zip(self.harts, PROGRAMS, strict=True):
            hart[layout.MTVEC] = BASE + 0x800
            hart[layout.PMPADDR[0]] = OPEN_PMP
            hart[layout.PMPCFG0] = 0x1F
            hart[layout.PMP_OPEN] = 1
            hart[layout.SATP] = tables.satp
            hart[layout.PRIVILEGE] = SUPERVISOR
            hart[layout.FIRMWARE_CALLS] = 1
            hart.pc = place

    def load(self, number: int, *words: int) -> None:
        """Let a hart begin with these instructions, and then sleep."""
        code = [*words, RISCV64["wfi"].encode()]
        self.ram.write(PROGRAMS[number], b"".join(word.to_bytes(4, "little") for word in code))
        self.harts[number].pc = PROGRAMS[number]

    def sees(self) -> int:
        """What hart 1 reads by the address space."""
        hart = self.harts[1]
        self.load(1, RISCV64["ld"].encode(rd=A0, rs1=S0))
        hart.set_x(S0, SEEN)
        assert self.executors[1].run(100).reason is Reason.WAIT
        return hart.x(A0)

    def ask(self, function: int, mask: int = 0b10, first: int = 0) -> Reason:
        """Hart 0 asks for a fence; how it left."""
        hart = self.harts[0]
        self.load(0, RISCV64["ecall"].encode())
        for register, value in ((A0, mask), (A1, first), (A6, function), (A7, REMOTE_FENCE)):
            hart.set_x(register, value)
        reason = self.executors[0].run(100).reason
        answered = (hart.x(A0), hart.x(A1)) == (0, 0)
        assert answered == (reason is Reason.WAIT)
        return reason

    def put(self, frame: int) -> int:
        """Map the page that is seen to a frame; what is in that."""
        self.ram.write(self.entry, (frame >> 12 << 10 | ALL).to_bytes(8, "little"))
        self.ram.write(frame, frame.to_bytes(8, "little"))
        return frame


@pytest.fixture(params=["reference", "interpreter"])
def pair(request: pytest.FixtureRequest, ram: Ram) -> Iterator[Pair]:
    return Pair(ram, ReferenceExecutor if request.param == "reference" else InterpreterExecutor)


@pytest.fixture
def native(ram: Ram) -> Pair:
    return Pair(ram, InterpreterExecutor)


@pytest.mark.parametrize("mask", [0b10, 0b11], ids=["another", "both"])
@pytest.mark.parametrize("function", [SFENCE_VMA, SFENCE_VMA_ASID], ids=["all", "asid"])
def test_a_hart_that_is_outside_fences_before_it_accesses_anything(
    pair: Pair, function: int, mask: int
) -> None:
    pair.put(FRAMES[0])
    assert pair.sees() == FRAMES[0]
    for frame in (FRAMES[1], FRAMES[0]):
        pair.put(frame)
        if isinstance(pair.executors[1], InterpreterExecutor):
            assert pair.sees() != frame, "or this test shows nothing"
        assert pair.ask(function, mask) is Reason.WAIT
        assert pair.sees() == frame


def test_code_needs_no_fence_but_its_call_is_answered(pair: Pair) -> None:
    assert pair.ask(FENCE_I) is Reason.WAIT
    assert pair.ask(FENCE_I, 0b100) is Reason.FIRMWARE_CALL


@pytest.mark.parametrize(
    ("mask", "first"), [(0b100, 0), (0b11, 1), (1, 2), (0, WORD)], ids=["2", "1+1", "2+0", "all"]
)
def test_harts_that_are_not_named_plainly_are_firmwares(pair: Pair, mask: int, first: int) -> None:
    assert pair.ask(SFENCE_VMA, mask, first) is Reason.FIRMWARE_CALL


def test_other_functions_and_calls_that_are_counted_are_firmwares(pair: Pair) -> None:
    assert pair.ask(3) is Reason.FIRMWARE_CALL
    pair.block.words[TOLD] = 1
    for function in (FENCE_I, SFENCE_VMA):
        assert pair.ask(function) is Reason.FIRMWARE_CALL


def test_who_asks_does_not_wait_for_ever(native: Pair) -> None:
    """Hart 1 is inside, but its thread does not run."""
    shared = native.harts[1].shared
    shared[layout.SHARED_INSIDE] = 1
    assert native.ask(SFENCE_VMA) is Reason.FIRMWARE_CALL
    assert shared[layout.SHARED_FENCED] != shared[layout.SHARED_FENCES]


def test_a_fence_waits_for_a_store_that_the_host_completes(
    native: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store to a page of code leaves with the address that it was translated to."""
    frame = native.put(FRAMES[0])
    native.ram.protect((frame - BASE) >> 12, 1, CODE)
    asked: list[Reason] = []
    write = native.ram.write

    def ask_first(address: int, data: bytes) -> None:
        if address == frame and not asked:
            asked.append(Reason.WAIT)  # the fence's own program is written as well
            asked[:] = [native.ask(SFENCE_VMA)]
        write(address, data)

    monkeypatch.setattr(native.ram, "write", ask_first)
    native.load(1, RISCV64["sd"].encode(rs1=S0, rs2=S1))
    native.harts[1].set_x(S0, SEEN)
    native.harts[1].set_x(S1, 77)
    assert native.executors[1].run(100).reason is Reason.WAIT
    assert asked == [Reason.FIRMWARE_CALL]
    assert native.ram.load64(frame) == 77
    assert native.ask(SFENCE_VMA) is Reason.WAIT


# ------------------------------------------------------------------------------- at the same time


def run_both(pair: Pair) -> None:
    """Run both until they sleep; what they leave to firmware is done as the host does it."""

    def run(number: int) -> None:
        hart, executor = pair.harts[number], pair.executors[number]
        while (reason := executor.run(1 << 40).reason) is Reason.FIRMWARE_CALL:
            for other in pair.executors:
                assert isinstance(other, InterpreterExecutor)
                other.fence()
            hart.set_x(A0, 0)
            hart.set_x(A1, 0)
        assert reason is Reason.WAIT
        left.append(number)

    left: list[int] = []
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(left) == [0, 1]


ASKS = f"""
    li a7, {REMOTE_FENCE}
    li a6, {SFENCE_VMA}
    li a0, 3
    li a1, 0
    ecall
    bnez a0, failed
"""


def test_nothing_is_written_to_a_frame_after_the_fence(
    native: Pair, assemble: Callable[[str], bytes]
) -> None:
    """Hart 1 writes to one page without an end; hart 0 takes its frame away again and again."""
    native.put(FRAMES[0])
    native.ram.write(
        BASE,
        assemble(
            f"""
            li s6, {ROUNDS}
            ld t0, (s4)
            1: ld t1, (s4)
            beq t0, t1, 1b
            next: sd s3, (s1)
            {ASKS}
            ld t0, (s4)
            li t2, 100
            1: ld t1, (s4)
            bne t0, t1, failed
            addi t2, t2, -1
            bnez t2, 1b
            mv t0, s2
            mv s2, s3
            mv s3, t0
            mv t0, s4
            mv s4, s5
            mv s5, t0
            addi s6, s6, -1
            bnez s6, next
            failed: li t0, {STOP}
            sd t0, (t0)
            wfi
            .balign 4096
            li t2, {STOP}
            1: addi t0, t0, 1
            sd t0, (s0)
            ld t1, (t2)
            beqz t1, 1b
            wfi
            """
        ),
    )
    first, second = native.harts
    entries = [frame >> 12 << 10 | ALL for frame in FRAMES]
    registers = (S1, native.entry), (S2, entries[0]), (S3, entries[1])
    for register, value in (*registers, (S4, FRAMES[0]), (S5, FRAMES[1])):
        first.set_x(register, value)
    second.set_x(S0, SEEN)
    run_both(native)
    assert first.x(22) == 0, "s6: all rounds were done"
    assert second.x(5) > 0
    assert [hart.shared[layout.SHARED_INSIDE] for hart in native.harts] == [0, 0]


def test_two_harts_ask_each_other(native: Pair, assemble: Callable[[str], bytes]) -> None:
    both = f"""
        li t0, {STOP}
        li t1, 1
        li t2, 2
        amoadd.d zero, t1, (t0)
        1: ld t1, (t0)
        bne t1, t2, 1b
        li s6, {ROUNDS}
        1: {ASKS}
        addi s6, s6, -1
        bnez s6, 1b
        wfi
    """
    code = assemble(f"{both} failed: wfi").ljust(0x1000, b"\0")
    native.ram.write(BASE, code + code)
    run_both(native)
    assert [hart.x(22) for hart in native.harts] == [0, 0]

"""The interrupt controllers beside a model: from devices, from the bus, and from harts' loads.

The model is written after the specification (RISC-V PLIC 1.0.0) with sets and without bits.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vmlab.engine import board as virt
from vmlab.engine.accel.interpreter import CodePages, InterpreterExecutor, native_code
from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.accel.reference import ReferenceExecutor
from vmlab.engine.cpu import layout, sleeping
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.interrupts import LOCK, MSWI_BASE, NOWHERE, TOLD
from vmlab.engine.cpu.pmp import OPEN
from vmlab.engine.devices.aclint import CLINT_SIZE, Aclint
from vmlab.engine.devices.bus import Bus, Device, Window
from vmlab.engine.devices.clock import ManualClock
from vmlab.engine.devices.plic import SIZE, Plic
from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.memory.ram import Ram

BASE, PLIC, CLINT = 0x8000_0000, 0xC00_0000, 0x200_0000
HARTS = 2
SOURCES = range(1, 97)
MSIP, SEIP, MEIP = 3, 9, 11
SLEEPS = RISCV64["wfi"].encode()


@dataclass
class Model:
    """The controller of the specification."""

    level: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    serving: set[int] = field(default_factory=set)
    priority: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(97), 0))
    enabled: list[set[int]] = field(default_factory=lambda: [set() for _ in range(2 * HARTS)])
    threshold: list[int] = field(default_factory=lambda: [0] * (2 * HARTS))

    def drive(self, source: int, level: bool) -> None:
        if level and source not in self.level and source not in self.serving:
            self.pending.add(source)
        (self.level.add if level else self.level.discard)(source)

    def best(self, context: int) -> int:
        candidates = [
            source for source in self.pending & self.enabled[context] if self.priority[source]
        ]
        return min(candidates, key=lambda source: (-self.priority[source], source), default=0)

    def line(self, context: int) -> bool:
        return self.priority[self.best(context)] > self.threshold[context]

    def claim(self, context: int) -> int:
        if source := self.best(context):
            self.pending.discard(source)
            self.serving.add(source)
        return source

    def complete(self, context: int, source: int) -> None:
        if source in self.enabled[context]:
            self.serving.discard(source)
            if source in self.level:
                self.pending.add(source)

    def read(self, offset: int) -> int:
        if offset < 4 * 97:
            return self.priority[offset // 4]
        part = offset % 0x80 // 4
        if 0x1000 <= offset < 0x1010:
            return word_of(self.pending, part)
        if 0x2000 <= offset < 0x2000 + 0x80 * len(self.enabled):
            return word_of(self.enabled[(offset - 0x2000) // 0x80], part)
        context, register = divmod(offset - 0x20_0000, 0x1000)
        if 0 <= context < len(self.enabled) and register in (0, 4):
            return self.claim(context) if register else self.threshold[context]
        return 0

    def write(self, offset: int, value: int) -> None:
        if 4 <= offset < 4 * 97:
            self.priority[offset // 4] = value & 7
        elif 0x2000 <= offset < 0x2000 + 0x80 * len(self.enabled):
            enabled = self.enabled[(offset - 0x2000) // 0x80]
            first = offset % 0x80 // 4 * 32
            for source in SOURCES:
                if first <= source < first + 32:
                    there = value >> (source - first) & 1
                    (enabled.add if there else enabled.discard)(source)
        else:
            context, register = divmod(offset - 0x20_0000, 0x1000)
            if 0 <= context < len(self.enabled) and register == 0:
                self.threshold[context] = value & 7
            elif 0 <= context < len(self.enabled) and register == 4:
                self.complete(context, value)


def word_of(sources: set[int], word: int) -> int:
    return sum(1 << (source - 32 * word) for source in sources if source // 32 == word)


def any_offset(chance: random.Random) -> int:
    context = chance.randrange(2 * HARTS + 1)
    return chance.choice(
        (
            4 * chance.randrange(100),
            0x1000 + 4 * chance.randrange(6),
            0x2000 + 0x80 * context + 4 * chance.randrange(6),
            0x20_0000 + 0x1000 * context,
            0x20_0004 + 0x1000 * context,
            0x20_0004 + 0x1000 * context,
            0x20_0004 + 0x1000 * context,
            4 * chance.randrange(SIZE // 4),
        )
    )


def any_value(chance: random.Random) -> int:
    return chance.choice(
        (chance.randrange(8), chance.randrange(100), 0xFFFF_FFFF, chance.getrandbits(32))
    )


class Board:
    """Harts of one kind with a controller between them."""

    def __init__(self, kind: type[ReferenceExecutor] | type[InterpreterExecutor]) -> None:
        self.told: dict[tuple[int, int], bool] = {}
        self.plic = Plic(HARTS, lambda *line: self.told.update({line[:2]: line[2]}))
        self.bus = Bus()
        self.bus.attach(Window("plic", PLIC, SIZE, frozenset({4})), self.plic)
        self.bus.tell(
            "plic", lambda device: self.plic.answer_at(PLIC if self.own(device) else None)
        )
        block = self.plic.block
        self.aclint = Aclint(
            HARTS,
            ManualClock(),
            lambda *line: None,
            software=block.software,
            software_changed=lambda *line: self.told.update({line[:2]: line[2]}),
        )
        self.bus.attach(Window("aclint", CLINT, CLINT_SIZE, frozenset({4, 8})), self.aclint)
        block.words[MSWI_BASE] = CLINT
        self.ram = Ram(1 << 20, BASE)
        harts = [Hart(self.ram, number, self.plic.block) for number in range(HARTS)]
        self.executors: list[Executor]
        if kind is ReferenceExecutor:
            self.executors = [ReferenceExecutor(hart) for hart in harts]
        else:
            pages = CodePages(self.ram, native_code())
            self.executors = [InterpreterExecutor(hart, pages) for hart in harts]
        code = [
            RISCV64["lw"].encode(rd=10, rs1=11, imm=0),
            SLEEPS,
            RISCV64["sw"].encode(rs1=11, rs2=10, imm=0),
            SLEEPS,
            RISCV64["csrrs"].encode(rd=12, rs1=0, imm=0x344),
            SLEEPS,
        ]
        self.ram.write(BASE, b"".join(word.to_bytes(4, "little") for word in code))
        self.exits = 0

    def own(self, device: Device) -> bool:
        return device is self.plic

    def run(self, number: int, place: int) -> Hart:
        executor = self.executors[number]
        executor.hart.pc = BASE + place
        executor.hart[layout.TIME_DIVISOR] = 10
        while (left := executor.run(10)).reason is not Reason.WAIT:
            self.exits += 1
            self.answer(executor.hart, left)
        return executor.hart

    def answer(self, hart: Hart, left: Exit) -> None:
        if left.reason is Reason.READ:
            hart.complete_read(self.bus.read(left.address, left.size))
        elif left.reason is Reason.WRITE:
            self.bus.write(left.address, left.size, left.data)
        else:
            raise AssertionError(left)

    def load(self, number: int, offset: int, base: int = PLIC) -> int:
        self.executors[number].hart.set_x(11, base + offset)
        return self.run(number, 0).x(10) & 0xFFFF_FFFF

    def store(self, number: int, offset: int, value: int, base: int = PLIC) -> None:
        hart = self.executors[number].hart
        hart.set_x(11, base + offset)
        hart.set_x(10, value | 0xABCD_0000_0000_0000)
        self.run(number, 8)

    def lines(self) -> list[bool]:
        pending = [self.run(number, 16).x(12) for number in range(HARTS)]
        return [bool(bits >> bit & 1) for bits in pending for bit in (MEIP, SEIP)]

    def close(self) -> None:
        self.ram.close()


@pytest.fixture(params=["reference", "interpreter"])
def board(request: pytest.FixtureRequest) -> Iterator[Board]:
    made = Board(ReferenceExecutor if request.param == "reference" else InterpreterExecutor)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(4))
def test_the_controller_is_the_specifications(board: Board, seed: int) -> None:
    chance = random.Random(seed)
    model = Model()
    for offset in (*(4 * source for source in SOURCES), *range(0x2000, 0x2200, 4)):
        value = any_value(chance)
        board.bus.write(PLIC + offset, 4, value)
        model.write(offset, value)
    for step in range(600):
        kind, number = chance.randrange(5), chance.randrange(HARTS)
        if kind == 0:
            source, level = chance.choice(SOURCES), chance.random() < 0.6
            board.plic.set_level(source, level)
            model.drive(source, level)
            continue
        offset, value = any_offset(chance), any_value(chance)
        if kind == 1:
            board.bus.write(PLIC + offset, 4, value)
            model.write(offset, value)
        elif kind == 2:
            board.store(number, offset, value)
            model.write(offset, value)
        elif kind == 3:
            assert board.load(number, offset) == model.read(offset), f"{step}: {offset:#x}"
        else:
            assert board.bus.read(PLIC + offset, 4) == model.read(offset), f"{step}: {offset:#x}"
        assert board.lines() == [model.line(context) for context in range(2 * HARTS)], step
    state = board.plic.state
    for words, sources in (
        (state.pending, model.pending),
        (state.level, model.level),
        (state.in_service, model.serving),
    ):
        assert words.tolist() == [word_of(sources, word) for word in range(4)]


def ready(board: Board, source: int = 5) -> None:
    """A source that S mode of hart 0 takes."""
    board.bus.write(PLIC + 4 * source, 4, 1)
    board.bus.write(PLIC + 0x2080, 4, 1 << source)


def test_claim_and_complete_leave_no_hart(board: Board) -> None:
    ready(board)
    for _ in range(3):
        board.plic.set_level(5, True)
        assert board.told[0, SEIP] is True
        assert board.load(0, 0x20_1004) == 5
        board.plic.set_level(5, False)
        board.store(0, 0x20_1004, 5)
        assert board.load(0, 0x2080) == 1 << 5
        board.store(0, 0x2080, 1 << 5)
    assert board.exits == 0
    assert not any(board.lines())


def test_a_completion_that_raises_a_line_is_told(board: Board) -> None:
    """Another hart may be asleep that has to be woken."""
    ready(board)
    board.plic.set_level(5, True)
    assert board.load(1, 0x20_1004) == 5  # any hart may read any context
    board.told.clear()
    board.store(1, 0x20_1004, 5)
    assert board.told[0, SEIP] is True
    assert board.exits == 1


def test_something_between_the_harts_and_the_controller_sees_every_access(board: Board) -> None:
    class Deaf:
        def read(self, offset: int, size: int) -> int:
            return 77

        def write(self, offset: int, size: int, value: int) -> None:
            """Nothing comes through."""

    restore = board.bus.interpose("plic", lambda device: Deaf())
    assert board.load(0, 0x20_1004) == 77
    assert board.exits == 1
    restore()
    assert board.load(0, 0x20_1004) == 0
    assert board.exits == 1


@pytest.mark.parametrize("address", [0, 4, 0x10_0000], ids=hex)
def test_registers_that_the_host_answers_for_are_nowhere_else(board: Board, address: int) -> None:
    board.plic.answer_at(None)
    board.plic.block.words[MSWI_BASE] = NOWHERE
    hart = board.executors[0].hart
    hart.set_x(11, address)
    hart.set_x(10, 1)
    for place, left in ((0, Exit(Reason.READ, address, 4)), (8, Exit(Reason.WRITE, address, 4, 1))):
        hart.pc = BASE + place
        assert board.executors[0].run(10) == left


def test_a_hart_does_not_wait_for_the_lock() -> None:
    board = Board(InterpreterExecutor)
    ready(board)
    board.plic.set_level(5, True)
    words = board.plic.block.words
    executor = board.executors[0]
    executor.hart.set_x(11, PLIC + 0x20_1004)
    executor.hart.pc = BASE
    words[LOCK] = 1
    assert executor.run(10).reason is Reason.READ
    words[LOCK] = 0
    executor.hart.complete_read(board.bus.read(PLIC + 0x20_1004, 4))
    assert executor.hart.x(10) == 5
    assert words[LOCK] == 0
    board.close()


def test_a_copy_of_a_machine_is_not_locked_by_the_original() -> None:
    board = Board(InterpreterExecutor)
    ready(board)
    board.plic.set_level(5, True)
    board.told.clear()
    board.plic.block.words[LOCK] = 1
    board.plic.refresh()
    assert board.told[0, SEIP] is True
    assert board.load(0, 0x20_1004) == 5
    assert board.exits == 0
    board.close()


def test_an_interrupt_that_is_due_is_taken(board: Board) -> None:
    ready(board)
    hart = board.executors[0].hart
    hart[layout.MIDELEG] = 1 << SEIP
    hart[layout.MIE] = 1 << SEIP
    hart[layout.STVEC] = BASE + 0x100
    hart[layout.MSTATUS] = 1 << 1  # SIE
    hart[layout.PRIVILEGE] = 1
    hart[layout.PMP_OPEN] = OPEN
    hart.pc = BASE + 4
    board.plic.set_level(5, True)
    board.executors[0].run(1)
    assert hart[layout.SCAUSE] == 1 << 63 | SEIP


# --------------------------------------------------------------------------- the UART's line status

UART = 0x1000_0000


@pytest.mark.parametrize("kind", ["reference", "interpreter"])
def test_the_line_status_is_read_without_leaving(kind: str) -> None:
    ram = Ram(1 << 20, BASE)
    board = virt.Board(ram, 1, ManualClock(), lambda *_: None, lambda *_: None)
    hart = Hart(ram, 0, board.plic.block)
    executor = ReferenceExecutor(hart) if kind == "reference" else InterpreterExecutor(hart)
    loads = RISCV64["lb"].encode(rd=10, rs1=11, imm=0)
    ram.write(BASE, loads.to_bytes(4, "little") + SLEEPS.to_bytes(4, "little"))

    def status() -> tuple[int, bool]:
        """What a hart reads, and whether it had to leave for that."""
        hart.pc = BASE
        hart.set_x(11, UART + 5)
        left = executor.run(10)
        if left.reason is Reason.READ:
            hart.complete_read(board.bus.read(left.address, left.size))
        return hart.x(10), left.reason is Reason.READ

    assert status() == (0x60, False)
    board.bus.write(UART + 2, 1, 1)
    board.uart.receive(b"ab")
    assert status() == (0x61, False)
    assert bytes(board.bus.read(UART, 1) for _ in range(2)) == b"ab"
    assert status() == (0x60, False)
    board.uart.break_()
    assert status() == (0x71, True), "reading it clears the error"
    assert status() == (0x61, False)
    restore = board.bus.interpose("uart", lambda device: device_that_reads(0x42))
    assert status() == (0x42, True)
    board.uart.break_()
    restore()
    assert status() == (0x71, True)
    board.reset()
    assert status() == (0x60, False)
    ram.close()


def device_that_reads(value: int) -> Device:
    class Same:
        def read(self, offset: int, size: int) -> int:
            return value

        def write(self, offset: int, size: int, value: int) -> None:
            """Nothing comes through."""

    return Same()


# --------------------------------------------------------------------- interrupts between harts

SSIP = 1
SIP = 0x144


def supervisor(board: Board, number: int, code: list[int]) -> Hart:
    """A hart in S mode with code of its own."""
    hart = board.executors[number].hart
    hart[layout.PRIVILEGE] = 1
    hart[layout.MIDELEG] = 1 << SSIP
    hart[layout.FIRMWARE_CALLS] = 1
    hart[layout.PMP_OPEN] = OPEN
    hart.pc = BASE + 0x1000 * (number + 1)
    board.ram.write(hart.pc, b"".join(word.to_bytes(4, "little") for word in code))
    return hart


def call(board: Board, mask: int, first: int) -> tuple[Reason, Hart]:
    """sbi_send_ipi by hart 0; how it left."""
    hart = supervisor(board, 0, [RISCV64["ecall"].encode(), SLEEPS])
    for register, value in ((10, mask), (11, first), (16, 0), (17, 0x735049)):
        hart.set_x(register, value)
    return board.executors[0].run(10).reason, hart


def asked(board: Board, number: int) -> bool:
    """Whether a hart sees SSIP, which it clears."""
    clears = RISCV64["csrrci"].encode(rd=12, rs1=1 << SSIP, imm=SIP)
    hart = supervisor(board, number, [clears, SLEEPS])
    assert board.executors[number].run(10).reason is Reason.WAIT
    return bool(hart.x(12) >> SSIP & 1)


@pytest.mark.parametrize(("mask", "first"), [(0b10, 0), (0b1, 1), (0b11, 0), (0, 0)])
def test_a_hart_interrupts_others_and_goes_on(board: Board, mask: int, first: int) -> None:
    reason, hart = call(board, mask, first)
    assert reason is Reason.WAIT, "it has gone on to its wfi"
    assert (hart.x(10), hart.x(11)) == (0, 0)
    for number in (0, 1):
        assert asked(board, number) == bool(mask << first >> number & 1)
        assert not asked(board, number), "it is an event and no level"


@pytest.mark.parametrize(
    ("mask", "first"), [(0b100, 0), (0b11, 1), (1, 2), (1, (1 << 64) - 1), (1 << 63, 1)]
)
def test_a_mask_that_is_not_plain_is_firmwares(board: Board, mask: int, first: int) -> None:
    reason, hart = call(board, mask, first)
    assert reason is Reason.FIRMWARE_CALL
    assert (hart.x(10), hart.x(11)) == (mask, first)
    assert not asked(board, 1)


def test_a_hart_that_sleeps_is_woken_by_the_host(board: Board) -> None:
    sleeper = board.executors[1].hart
    sleeper.shared[layout.SHARED_ASLEEP] = 1
    assert call(board, 0b10, 0)[0] is Reason.FIRMWARE_CALL
    assert sleeper.shared[layout.SHARED_SOFTWARE] == 1


@pytest.fixture
def sleeper(board: Board) -> Iterator[threading.Thread]:
    """A thread that waits for hart 1 to be woken."""
    hart = board.executors[1].hart
    hart.shared[layout.SHARED_ASLEEP] = layout.ASLEEP_WAITS
    arguments = hart.asleep_address, layout.ASLEEP_WAITS, None
    thread = threading.Thread(target=sleeping.wait, args=arguments, daemon=True)
    thread.start()
    waits = f"{sleeping.NUMBER} {hart.asleep_address:#x} "
    while not Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith(waits):
        threading.Event().wait(0.001)
    yield thread
    hart.rouse()


def test_a_hart_that_sleeps_is_woken_by_the_one_that_interrupts_it(
    board: Board, sleeper: threading.Thread
) -> None:
    for _ in range(2):
        reason, hart = call(board, 0b11, 0)
        assert reason is Reason.WAIT, "it has gone on to its wfi"
        assert (hart.x(10), hart.x(11)) == (0, 0)
        sleeper.join(250)
        assert not sleeper.is_alive()
        assert board.executors[1].hart.shared[layout.SHARED_ASLEEP] == 0
        assert asked(board, 1)


def test_a_hart_that_sleeps_is_woken_from_mswi(board: Board, sleeper: threading.Thread) -> None:
    board.store(0, 4, 0, CLINT)
    assert board.executors[1].hart.shared[layout.SHARED_ASLEEP] == layout.ASLEEP_WAITS
    board.store(0, 4, 1, CLINT)
    sleeper.join(250)
    assert not sleeper.is_alive()
    assert board.exits == 0
    assert software(board) == [False, True]


def test_calls_that_are_counted_are_told(board: Board) -> None:
    board.plic.block.words[TOLD] = 1
    assert call(board, 0b10, 0)[0] is Reason.FIRMWARE_CALL
    assert not asked(board, 1)


# -------------------------------------------------------------- MSWI, for firmware in M mode


def software(board: Board) -> list[bool]:
    """Which harts see MSIP."""
    return [bool(board.run(number, 16).x(12) >> MSIP & 1) for number in range(HARTS)]


def test_a_hart_interrupts_another_and_clears_its_own_without_leaving(board: Board) -> None:
    for value in (0xFFFF_FFFF, 1):
        board.store(0, 4, value, CLINT)
        assert software(board) == [False, True]
        assert board.aclint.read(4, 4) == 1
        board.store(1, 4, 0xFFFF_FFFE & ~value, CLINT)
        assert software(board) == [False, False]
        assert board.aclint.read(4, 4) == 0
    assert board.exits == 0
    assert board.told == {}


def test_a_hart_clears_what_was_raised_by_the_bus(board: Board) -> None:
    board.bus.write(CLINT, 4, 1)
    assert board.told == {(0, MSIP): True}
    assert software(board) == [True, False]
    board.store(1, 0, 0, CLINT)
    assert software(board) == [False, False]
    board.bus.write(CLINT + 4, 4, 1)
    board.aclint.reset()
    assert software(board) == [False, False]
    assert board.exits == 0


def test_a_hart_that_interrupts_itself_takes_that_at_once(board: Board) -> None:
    hart = board.executors[0].hart
    hart[layout.MIE] = 1 << MSIP
    hart[layout.MTVEC] = BASE + 0x100
    hart[layout.MSTATUS] = 1 << 3  # MIE
    stays = RISCV64["jal"].encode(rd=0, imm=0)
    board.ram.write(BASE + 0x100, stays.to_bytes(4, "little"))
    hart.set_x(11, CLINT)
    hart.set_x(10, 1)
    hart.pc = BASE + 8
    left = board.executors[0].run(1)
    assert left.reason is Reason.WRITE
    board.answer(hart, left)
    board.executors[0].run(1)
    assert hart[layout.MCAUSE] == 1 << 63 | MSIP
    assert hart[layout.MEPC] == BASE + 12


@pytest.mark.parametrize("offset", [4 * HARTS, 0x4000, 0xBFF8, CLINT_SIZE], ids=hex)
def test_other_registers_are_the_hosts(board: Board, offset: int) -> None:
    hart = board.executors[0].hart
    hart.set_x(11, CLINT + offset)
    hart.set_x(10, 1)
    hart.pc = BASE + 8
    left = board.executors[0].run(10)
    assert left == Exit(Reason.WRITE, CLINT + offset, 4, 1)
    assert software(board) == [False, False]


def test_a_hart_that_sleeps_is_woken_by_the_host_from_msip_as_well(board: Board) -> None:
    board.executors[1].hart.shared[layout.SHARED_ASLEEP] = 1
    board.store(0, 4, 1, CLINT)
    assert board.exits == 1
    assert board.told == {(1, MSIP): True}
    board.executors[1].hart.shared[layout.SHARED_ASLEEP] = 0
    assert software(board) == [False, True]


def test_something_between_the_harts_and_mswi_sees_every_store(board: Board) -> None:
    board.plic.block.words[MSWI_BASE] = NOWHERE
    board.store(0, 4, 1, CLINT)
    assert board.exits == 1
    ram = Ram(1 << 20, BASE)
    made = virt.Board(ram, HARTS, ManualClock(), lambda *_: None, lambda *_: None)
    words = made.plic.block.words
    assert words[MSWI_BASE] == CLINT
    restore = made.bus.interpose("aclint", lambda device: device_that_reads(3))
    assert words[MSWI_BASE] == NOWHERE
    restore()
    assert words[MSWI_BASE] == CLINT
    ram.close()

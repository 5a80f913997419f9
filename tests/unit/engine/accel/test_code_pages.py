"""Pages of code: written by a disk, mapped in another order, used again once nobody is there."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.engine.accel.test_memory import (
    BUDGET,
    CODE_AT,
    EBREAK,
    PAGE,
    SUPERVISOR,
    R,
    Tables,
    V,
    X,
    supervisor,
)
from tests.unit.engine.devices.driver import Driver, Memory

from vmlab.engine.accel import interpreter
from vmlab.engine.accel.interpreter import CodePages, InterpreterExecutor, native_code
from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.board import Board
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.devices.clock import ManualClock
from vmlab.engine.devices.storage.disk import RawDisk
from vmlab.engine.devices.virtio.block import VirtioBlock
from vmlab.engine.devices.workers import InlineWorkers
from vmlab.engine.memory.ram import Ram

BASE = 0x8000_0000
ADD_1 = bytes.fromhex("13051500")  # addi a0,a0,1
ADD_2 = bytes.fromhex("13052500")
ADD_16 = bytes.fromhex("13050501")
ADD_32 = bytes.fromhex("13050502")
BREAK = bytes.fromhex("73001000")
WFI = bytes.fromhex("73005010")
BACK = bytes.fromhex("6ff0dfff")  # j .-4
FENCE_I = bytes.fromhex("0f100000")
PATIENCE = 250.0


class Disk:
    """A disk on the board of a hart's memory, and its driver."""

    def __init__(self, ram: Ram, image: Path) -> None:
        board = Board(ram, 1, ManualClock(), lambda *line: None, lambda *end: None)
        self.device = VirtioBlock("disk", ram, InlineWorkers(), RawDisk(image))
        board.plug(self.device)
        self.read, self.write = board.bus.read, board.bus.write
        self.peek, self.poke = ram.read, ram.write

    def level(self, source: int) -> None:
        """Nobody asks."""


@pytest.fixture
def disk(executor: Executor, tmp_path: Path) -> Iterator[Driver]:
    """A driver of a disk whose first sector says what a0 becomes."""
    image = tmp_path / "disk.img"
    image.write_bytes((FENCE_I + ADD_16 + WFI).ljust(512, b"\0"))
    stand = Disk(executor.hart.ram, image)
    driver = Driver(stand, 0, Memory(BASE + 0x10_0000, BASE + 0x20_0000))
    driver.negotiate()
    driver.queue(0)
    driver.go()
    yield driver
    stand.device.close()


def test_a_disk_that_is_read_over_executing_code_is_seen(executor: Executor, disk: Driver) -> None:
    hart = executor.hart
    buffer = disk.rings[0].add([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
    (code, size), *_ = buffer.writable
    assert size == 512
    hart.ram.write(code, FENCE_I + ADD_1 + BACK)
    hart.pc = code
    assert executor.run(1000).reason is Reason.BUDGET
    before = hart.x(10)
    assert before > 100
    disk.kick(0)
    disk.wait(0)
    assert hart.ram.read(code + 4, 4) == ADD_16
    # It is in the middle of what was there: from there on it executes what came.
    assert hart.pc in (code + 4, code + 8)
    hart.pc = code + 4
    assert executor.run(1000).reason is Reason.WAIT
    assert hart.x(10) == before + 16


def test_neighbours_may_lie_in_the_other_order_elsewhere(executor: Executor) -> None:
    """What is executed after the end of a page is the next one's by virtual address."""
    tables = Tables(executor.hart)
    first, second, elsewhere = BASE + 0x2000, BASE + 0x3000, CODE_AT + 0x10_0000
    for virtual, physical in (
        (CODE_AT, first),
        (CODE_AT + PAGE, second),
        (elsewhere, second),
        (elsewhere + PAGE, first),
    ):
        tables.map(virtual, physical, V | R | X)
    hart = supervisor(executor, tables, CODE_AT, b"")
    hart.ram.write(first, ADD_16 + BREAK)
    hart.ram.write(first + PAGE - 4, ADD_1)
    hart.ram.write(second, ADD_32 + BREAK)
    hart.ram.write(second + PAGE - 4, ADD_2)
    for _ in range(2):
        for virtual, sum_ in ((CODE_AT, 1 + 32), (elsewhere, 2 + 16)):
            hart[layout.PRIVILEGE] = SUPERVISOR
            hart.pc = virtual + PAGE - 4
            hart.set_x(10, 0)
            assert executor.run(BUDGET).reason is Reason.WAIT
            assert (hart[layout.MCAUSE], hart.x(10)) == (EBREAK, sum_)
            assert hart[layout.MEPC] == virtual + PAGE + 4


def test_records_are_used_again_only_when_every_hart_has_left_them(
    ram: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 16
    monkeypatch.setattr(interpreter, "_RETIRED_PAGES", limit)
    pages = CodePages(ram, native_code())
    executors = [InterpreterExecutor(Hart(ram, number), pages) for number in range(2)]
    asked: list[int] = []
    for number, executor in enumerate(executors):
        drop = executor.drop_write_translations

        def note(which=None, number=number, drop=drop) -> None:
            drop(which)
            if which is None:
                asked.append(number)

        monkeypatch.setattr(executor, "drop_write_translations", note)
    # One of them is in native code meanwhile.
    spinning = executors[1].hart
    spinning.pc = BASE + 0x20_0000
    ram.write(spinning.pc, ADD_1 + BACK)
    thread = threading.Thread(target=lambda: executors[1].run(1 << 60))
    thread.start()
    while not spinning.retired:
        threading.Event().wait(0.001)
    used: list[int] = []
    try:
        for number in range(3 * limit):
            address = BASE + number * PAGE
            before = len(asked)
            pages.decode(address)
            # Those of pages that were written are taken out of use together, by the dozen.
            together = number and number % limit == 0
            assert asked[before:] == ([0, 1] if together else [])
            used.append(pages._pages[number].address)
            ram.write(address, b"another code")
        assert len(set(used)) == limit, "they are used again"
    finally:
        spinning.request_exit()
        thread.join()
    counted = spinning.x(10)
    assert spinning.retired in (2 * counted, 2 * counted - 1, 2 * counted + 1)


def test_code_is_decoded_once_for_all_who_share_memory(ram: Ram) -> None:
    """A second one's records would hide writes from the first."""
    first = CodePages(ram, native_code())
    with pytest.raises(RuntimeError, match="decoded by somebody else"):
        CodePages(ram, native_code())
    with pytest.raises(RuntimeError, match="decoded by somebody else"):
        InterpreterExecutor(Hart(ram))
    hart = InterpreterExecutor(Hart(ram), first).hart
    ram.write(BASE, ADD_1 + WFI)
    first.decode(BASE)
    ram.write(BASE, ADD_2 + WFI)
    assert first._harts[0].run(10).reason is Reason.WAIT
    assert hart.x(10) == 2


class LateCondition(threading.Condition):
    """Whoever is woken comes to look only once `again` is set; nobody waits twice."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = threading.Event()
        self.again = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        assert not self.waited.is_set(), "it waits on although native code was left"
        self.waited.set()
        woken = super().wait(timeout)
        self.release()
        assert self.again.wait(PATIENCE)
        self.acquire()
        return woken


def test_who_waits_for_native_code_to_be_left_sees_that_it_was(
    ram: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the hart is inside again before the one who waits comes to look."""
    executor = InterpreterExecutor(Hart(ram))
    gate = LateCondition()
    monkeypatch.setattr(executor, "_gate", gate)
    inside, dropped = threading.Event(), threading.Event()

    def first(state: int) -> None:
        inside.set()
        assert gate.waited.wait(PATIENCE)

    def second(state: int) -> None:
        gate.again.set()
        assert dropped.wait(PATIENCE), "the one who waits has not seen it"

    def run() -> None:
        executor._enter(first)
        executor._enter(second)

    hart = threading.Thread(target=run)
    hart.start()
    try:
        assert inside.wait(PATIENCE)
        executor.drop_write_translations()
        assert executor._active, "it is inside again"
        assert not executor._drop_first, "and has dropped them on its way"
    finally:
        dropped.set()
        hart.join()

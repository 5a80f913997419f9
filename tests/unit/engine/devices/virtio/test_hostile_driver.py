"""What a driver does wrong breaks its device, which says so, and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.engine.devices.driver import (
    EVENT_IDX,
    INDIRECT,
    NEEDS_RESET,
    PACKED,
    Driver,
    Memory,
    PackedRing,
    SplitRing,
)
from tests.unit.engine.devices.machines import Engine

from vmlab.engine.devices.storage.disk import RawDisk
from vmlab.engine.devices.virtio.block import VirtioBlock

READ = struct.pack("<IIQ", 0, 0, 0)
OUTSIDE = 0x9000_0000
END = 0x8080_0000


@pytest.fixture
def block(engine: Engine, tmp_path: Path) -> VirtioBlock:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 128)
    device = VirtioBlock("disk", engine.ram, engine.workers, RawDisk(path), queue_size=16)
    engine.board.plug(device)
    return device


@pytest.fixture
def driver(engine: Engine, block: VirtioBlock) -> Driver:
    return Driver(engine, 0, Memory(0x8010_0000, END))


def loop(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 16, 1, 1)
    ring.write(1, 0x8000_0000, 16, 1, 0)
    ring.publish(0)


def self_loop(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 16, 1, 0)
    ring.publish(0)


def far_next(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 16, 1, 0xFFFF)
    ring.publish(0)


def far_head(ring: SplitRing) -> None:
    ring.publish(ring.size)


def outside(ring: SplitRing) -> None:
    ring.write(0, OUTSIDE, 16, 0, 0)
    ring.publish(0)


def over_the_end(ring: SplitRing) -> None:
    ring.write(0, END - 8, 16, 0, 0)
    ring.publish(0)


def around_the_end(ring: SplitRing) -> None:
    ring.write(0, (1 << 64) - 8, 16, 0, 0)
    ring.publish(0)


def long(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 0xFFFF_FFFF, 0, 0)
    ring.publish(0)


def write_before_read(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 16, 3, 1)
    ring.write(1, 0x8000_0000, 16, 0, 0)
    ring.publish(0)


def more_than_there_is(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 16, 0, 0)
    ring.added = ring.size + 1
    ring.set_word(ring.driver + 2, ring.size + 1)


def no_header(ring: SplitRing) -> None:
    ring.add([b"short"], [1])


def no_status(ring: SplitRing) -> None:
    ring.add([READ], [])


def odd_table(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 17, 4, 0)
    ring.publish(0)


def empty_table(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 0, 4, 0)
    ring.publish(0)


def huge_table(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 0x10_0000, 4, 0)
    ring.publish(0)


def table_outside(ring: SplitRing) -> None:
    ring.write(0, OUTSIDE, 16, 4, 0)
    ring.publish(0)


def table_in_table(ring: SplitRing) -> None:
    at = ring.memory.take(16)
    ring.machine.poke(at, struct.pack("<QIHH", at, 16, 4, 0))
    ring.write(0, at, 16, 4, 0)
    ring.publish(0)


def table_with_next(ring: SplitRing) -> None:
    ring.write(0, 0x8000_0000, 16, 4 | 1, 1)
    ring.publish(0)


def loop_in_table(ring: SplitRing) -> None:
    at = ring.memory.take(32)
    ring.machine.poke(at, struct.pack("<QIHH", at, 16, 1, 1) + struct.pack("<QIHH", at, 16, 1, 0))
    ring.write(0, at, 32, 4, 0)
    ring.publish(0)


SPLIT = {
    loop: "loop",
    self_loop: "loop",
    far_next: "descriptor 65535 of a table of 16",
    far_head: "descriptor 16 of a table of 16",
    outside: "outside RAM",
    over_the_end: "outside RAM",
    around_the_end: "outside RAM",
    long: "outside RAM",
    write_before_read: "to read follows one to write",
    more_than_there_is: "17 chains made available",
    no_header: "without a header",
    no_status: "a place for its status",
    odd_table: "table of 17 bytes",
    empty_table: "table of 0 bytes",
    huge_table: "chain of 65536 descriptors",
    table_outside: "indirect table at 0x90000000, outside RAM",
    table_in_table: "inside a table",
    table_with_next: "with a successor",
    loop_in_table: "loop",
}


@pytest.mark.parametrize(("sin", "complaint"), SPLIT.items(), ids=[sin.__name__ for sin in SPLIT])
def test_a_broken_split_ring_breaks_the_device_until_it_is_reset(
    driver: Driver, block: VirtioBlock, sin: Callable[[SplitRing], None], complaint: str
) -> None:
    driver.negotiate(INDIRECT)
    ring = driver.queue(0, 16)
    assert isinstance(ring, SplitRing)
    driver.go()
    sin(ring)
    driver.kick(0)
    assert driver.status & NEEDS_RESET
    assert complaint in block.state.broken
    assert driver.interrupt() & 2, "the driver is told by a configuration change (2.1.2)"
    works_again(driver)


def works_again(driver: Driver) -> None:
    driver.negotiate(INDIRECT, EVENT_IDX)
    ring = driver.queue(0, 16)
    driver.go()
    buffer = ring.add([READ], [512, 1])
    driver.kick(0)
    assert ring.poll() == [buffer]
    assert ring.data(buffer) == bytes(range(256)) * 2 + b"\0"
    assert not driver.status & NEEDS_RESET


def packed(ring: PackedRing, place: int, address: int, size: int, flags: int) -> None:
    at = ring.descriptors + 16 * place
    ring.machine.poke(at, struct.pack("<QIHH", address, size, 0, flags | 1 << 7))


def packed_endless(ring: PackedRing) -> None:
    for place in range(ring.size):
        packed(ring, place, 0x8000_0000, 16, 1)


def packed_outside(ring: PackedRing) -> None:
    packed(ring, 0, OUTSIDE, 16, 0)


def packed_table_odd(ring: PackedRing) -> None:
    packed(ring, 0, 0x8000_0000, 15, 4)


def packed_table_huge(ring: PackedRing) -> None:
    packed(ring, 0, 0x8000_0000, 0x7F_0000, 4)


def packed_table_in_chain(ring: PackedRing) -> None:
    packed(ring, 1, 0x8000_0000, 16, 4)
    packed(ring, 0, 0x8000_0000, 16, 1)


def packed_table_with_next(ring: PackedRing) -> None:
    packed(ring, 0, 0x8000_0000, 16, 4 | 1)


PACKED_SINS = {
    packed_endless: "longer than the ring",
    packed_outside: "outside RAM",
    packed_table_odd: "table of 15 bytes",
    packed_table_huge: "chain of",
    packed_table_in_chain: "within a chain",
    packed_table_with_next: "within a chain",
}


@pytest.mark.parametrize(
    ("sin", "complaint"), PACKED_SINS.items(), ids=[sin.__name__ for sin in PACKED_SINS]
)
def test_a_broken_packed_ring_breaks_the_device_until_it_is_reset(
    driver: Driver, block: VirtioBlock, sin: Callable[[PackedRing], None], complaint: str
) -> None:
    driver.negotiate(PACKED, INDIRECT)
    ring = driver.queue(0, 16)
    assert isinstance(ring, PackedRing)
    driver.go()
    sin(ring)
    driver.kick(0)
    assert driver.status & NEEDS_RESET
    assert complaint in block.state.broken
    works_again(driver)


@pytest.mark.parametrize(
    ("register", "value"),
    [
        pytest.param(0x080, 0x9000_0000, id="descriptors outside"),
        pytest.param(0x080, 0x8000_0001, id="descriptors unaligned"),
        pytest.param(0x090, 0x0000_0000, id="available ring outside"),
        pytest.param(0x0A0, END - 4, id="used ring over the end"),
        pytest.param(0x0A4, 0xFFFF_FFFF, id="used ring around the end"),
        pytest.param(0x038, 0, id="no entries"),
        pytest.param(0x038, 12, id="no power of two"),
        pytest.param(0x038, 32, id="too many entries"),
    ],
)
def test_a_ring_that_cannot_be_one_is_not_made_ready(
    driver: Driver, register: int, value: int
) -> None:
    driver.negotiate()
    driver.write(0x030, 0)
    driver.write(0x038, 16)
    for at, address in ((0x080, 0x8010_0000), (0x090, 0x8010_1000), (0x0A0, 0x8010_2000)):
        driver.write(at, address)
        driver.write(at + 4, 0)
    driver.write(register, value)
    driver.write(0x044, 1)
    assert driver.read(0x044) == 0
    assert driver.status & NEEDS_RESET
    works_again(driver)


def test_indirect_descriptors_need_to_be_negotiated(driver: Driver) -> None:
    driver.negotiate()
    ring = driver.queue(0, 16)
    driver.go()
    ring.add([READ], [512, 1], indirect=True)
    driver.kick(0)
    assert driver.status & NEEDS_RESET


def test_a_buffer_of_four_gigabytes_made_of_small_memory_is_refused(engine: Engine) -> None:
    """1024 descriptors of a table, each 8 MiB: more than 2^32 bytes in a machine that has 8 MiB."""
    engine.plug(lambda e: VirtioBlock("disk", e.ram, e.workers, Nothing(), queue_size=16))
    driver = Driver(engine, 0, Memory(0x8010_0000, END))
    driver.negotiate(INDIRECT)
    ring = driver.queue(0, 16)
    assert isinstance(ring, SplitRing)
    driver.go()
    table = b"".join(
        struct.pack("<QIHH", 0x8000_0000, 8 << 20, 1 if n < 1023 else 0, n + 1) for n in range(1024)
    )
    at = ring.memory.take(len(table))
    driver.machine.poke(at, table)
    ring.write(0, at, len(table), 4, 0)
    ring.publish(0)
    driver.kick(0)
    assert driver.status & NEEDS_RESET


class Nothing:
    """A disk without content."""

    read_only = False
    discard_alignment = 512
    size = 1 << 20

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, size: int) -> None: ...
    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None: ...
    def close(self) -> None: ...


def test_a_reset_while_a_request_is_served_leaves_memory_alone(
    engine: Engine, block: VirtioBlock, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.negotiate()
    ring = driver.queue(0, 16)
    driver.go()
    buffer = ring.add([READ], [512, 1])
    before = driver.machine.peek(*buffer.writable[0])
    content = block.disk.read

    def reset_and_read(offset: int, size: int) -> bytes:
        driver.write(0x070, 0)
        return content(offset, size)

    monkeypatch.setattr(block.disk, "read", reset_and_read)
    driver.kick(0)
    assert driver.machine.peek(*buffer.writable[0]) == before
    assert ring.poll() == []
    assert driver.read(0x060) == 0
    monkeypatch.undo()
    works_again(driver)


def test_registers_take_words_only_and_live_queues_do_not_move(driver: Driver) -> None:
    driver.negotiate()
    driver.queue(0, 16)
    driver.machine.write(driver.base + 0x070, 1, 0)
    driver.machine.write(driver.base + 0x070, 2, 0)
    assert driver.status == 11
    assert driver.machine.read(driver.base + 0x002, 2) == 0
    driver.write(0x080, 0x1234_0000)
    driver.write(0x038, 4)
    driver.go()
    ring = driver.rings[0]
    ring.add([READ], [512, 1])
    driver.kick(0)
    assert len(ring.poll()) == 1


def test_queues_that_do_not_exist_are_not_there(driver: Driver) -> None:
    driver.negotiate()
    driver.write(0x030, 77)
    assert driver.read(0x034) == 0
    driver.write(0x044, 1)
    assert driver.read(0x044) == 0
    driver.queue(0)
    driver.go()
    driver.kick(77)
    assert not driver.status & NEEDS_RESET


def test_an_empty_slot_says_that_it_is_one(engine: Engine) -> None:
    base = 0x1000_8000
    assert engine.read(base, 4) == 0x74726976
    assert engine.read(base + 8, 4) == 0
    engine.write(base + 0x70, 4, 1)
    assert engine.read(base + 0x70, 4) == 0
    assert engine.read(base + 0x100, 4) == 0

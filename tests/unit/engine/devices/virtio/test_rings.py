"""Rings as virtio 1.2, 2.7 and 2.8 have them: one driver, on the engine's devices and on QEMU's."""

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
from tests.unit.engine.devices.machines import Engine, Qemu

from vmlab.engine.devices.storage.disk import RawDisk
from vmlab.engine.devices.virtio.block import VirtioBlock
from vmlab.engine.devices.virtio.queue import PackedQueue, Queue, SplitQueue

SECTORS = 64
CONTENT = b"".join(struct.pack(">HH", n, n ^ 0xFFFF) * 128 for n in range(SECTORS))
RINGS = [
    pytest.param((), id="split"),
    pytest.param((INDIRECT,), id="split-indirect"),
    pytest.param((EVENT_IDX,), id="split-event-idx"),
    pytest.param((INDIRECT, EVENT_IDX), id="split-all"),
    pytest.param((PACKED,), id="packed"),
    pytest.param((PACKED, INDIRECT), id="packed-indirect"),
    pytest.param((PACKED, EVENT_IDX), id="packed-event-idx"),
    pytest.param((PACKED, INDIRECT, EVENT_IDX), id="packed-all"),
]


def read_request(sector: int) -> bytes:
    return struct.pack("<IIQ", 0, 0, sector)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["engine", "qemu"])
def driver(request: pytest.FixtureRequest, image: Path) -> Driver:
    if request.param == "engine":
        engine: Engine = request.getfixturevalue("engine")
        engine.plug(lambda e: VirtioBlock("disk", e.ram, e.workers, RawDisk(image), queue_size=64))
        return Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))
    start: Callable[..., Qemu] = request.getfixturevalue("qemu")
    qemu = start(
        "-drive", f"file={image},format=raw,if=none,id=d",
        "-device", "virtio-blk-device,drive=d,bus=virtio-mmio-bus.0,packed=on,queue-size=64",
    )  # fmt: skip
    return Driver(qemu, 0, Memory(0x8010_0000, 0x8080_0000))


@pytest.mark.parametrize("features", RINGS)
def test_requests_come_back_in_every_kind_of_ring(driver: Driver, features: tuple[int]) -> None:
    driver.negotiate(*features)
    ring = driver.queue(0, 8)
    driver.go()
    # Far more than the ring has entries, so that indices and wrap counters turn over.
    for number in range(40):
        sector = number % SECTORS
        buffer = ring.add([read_request(sector)], [500, 12, 1], indirect=INDIRECT in features)
        driver.kick(0)
        assert driver.wait(0) == [buffer]
        assert buffer.written == 513
        assert ring.data(buffer) == CONTENT[512 * sector : 512 * sector + 512] + b"\0"
    assert not driver.status & NEEDS_RESET


@pytest.mark.parametrize("features", RINGS)
def test_several_requests_at_once_all_come_back(driver: Driver, features: tuple[int]) -> None:
    driver.negotiate(*features)
    ring = driver.queue(0, 16)
    driver.go()
    for _ in range(6):
        buffers = [
            ring.add([read_request(n)], [512, 1], indirect=INDIRECT in features) for n in range(5)
        ]
        driver.kick(0)
        done = driver.wait(0, 5)
        assert sorted(map(id, done)) == sorted(map(id, buffers))
        for sector, buffer in enumerate(buffers):
            assert ring.data(buffer)[:512] == CONTENT[512 * sector : 512 * sector + 512]
    assert driver.interrupt() == 1


@pytest.fixture
def own(engine: Engine, image: Path) -> Driver:
    """A driver of the engine's device alone."""
    engine.plug(lambda e: VirtioBlock("disk", e.ram, e.workers, RawDisk(image), queue_size=64))
    return Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))


# 2.7.5.3.2 has devices take this; QEMU's do not.
def test_a_split_ring_may_mix_direct_descriptors_and_an_indirect_tail(own: Driver) -> None:
    driver = own
    driver.negotiate(INDIRECT)
    ring = driver.queue(0, 8)
    assert isinstance(ring, SplitRing)
    driver.go()
    header, data = ring.memory.take(16), ring.memory.take(513)
    driver.machine.poke(header, read_request(7))
    table = ring.memory.take(32)
    entries = struct.pack("<QIHH", data, 512, 3, 1) + struct.pack("<QIHH", data + 512, 1, 2, 0)
    driver.machine.poke(table, entries)
    ring.write(0, header, 16, 1, 1)
    ring.write(1, table, 32, 4, 0)
    ring.free = [2, 3, 4, 5, 6, 7]
    ring.chains[0] = [0, 1]
    ring.outstanding[0] = ring.buffer([], [])
    ring.publish(0)
    driver.kick(0)
    assert driver.wait(0)[0].written == 513
    assert driver.machine.peek(data, 513) == CONTENT[512 * 7 : 512 * 8] + b"\0"


@pytest.mark.parametrize("features", RINGS)
def test_no_interrupt_comes_where_none_is_wanted(driver: Driver, features: tuple[int]) -> None:
    driver.negotiate(*features)
    ring = driver.queue(0, 8)
    driver.go()
    ring.want_interrupts(True)
    ring.add([read_request(1)], [512, 1])
    driver.kick(0)
    driver.wait(0)
    assert driver.interrupt() == 1
    ring.want_interrupts(False)
    ring.add([read_request(2)], [512, 1])
    driver.kick(0)
    driver.wait(0)
    assert driver.interrupt() == 0
    ring.want_interrupts(True)
    ring.add([read_request(3)], [512, 1])
    driver.kick(0)
    driver.wait(0)
    assert driver.interrupt() == 1


@pytest.mark.parametrize("features", [(EVENT_IDX,), (PACKED, EVENT_IDX)])
def test_an_interrupt_can_be_asked_for_after_several_buffers(
    driver: Driver, features: tuple[int]
) -> None:
    driver.negotiate(*features)
    ring = driver.queue(0, 16)
    driver.go()
    ring.add([read_request(0)], [512, 1])  # the first one always interrupts: nothing is known yet
    driver.kick(0)
    driver.wait(0)
    driver.interrupt()
    # Ask to be told when the third buffer from here on is used.
    if isinstance(ring, SplitRing):
        ring.set_word(ring.driver + 4 + 2 * ring.size, ring.used + 2)
    else:
        ring.set_word(ring.driver, ring.used_place + 2 * 3 | ring.used_wrap << 15)
        ring.set_word(ring.driver + 2, 2)
    seen = []
    for _ in range(4):
        ring.add([read_request(1)], [512, 1])
        driver.kick(0)
        driver.wait(0)
        seen.append(driver.interrupt())
    assert seen == [0, 0, 1, 0]


@pytest.mark.parametrize("features", [(), (EVENT_IDX,), (PACKED, EVENT_IDX)])
def test_the_doorbell_is_wanted_when_the_device_has_seen_everything(
    driver: Driver, features: tuple[int]
) -> None:
    driver.negotiate(*features)
    ring = driver.queue(0, 8)
    driver.go()
    for _ in range(20):
        if isinstance(ring, PackedRing):
            ring.remember()
        before = ring.added
        ring.add([read_request(1)], [512, 1])
        assert ring.wants_kick(before)
        driver.kick(0)
        driver.wait(0)


def test_features_that_were_not_offered_are_not_accepted(own: Driver) -> None:
    driver = own
    driver.write(0x070, 3)
    driver.write(0x024, 1)
    driver.write(0x020, 1 | 1 << 25)  # VERSION_1 and bit 57, which nobody offers
    driver.write(0x070, 3 | 8)
    assert driver.status == 3


def test_a_driver_without_version_1_is_refused(own: Driver) -> None:
    driver = own
    driver.write(0x070, 3)
    driver.write(0x024, 0)
    driver.write(0x020, 1 << 9)
    driver.write(0x070, 11)
    assert driver.status == 3


def test_a_reset_forgets_everything_and_the_device_works_again(driver: Driver) -> None:
    for features in ((PACKED,), ()):
        driver.negotiate(*features)
        ring = driver.queue(0, 8)
        driver.go()
        buffer = ring.add([read_request(9)], [512, 1])
        driver.kick(0)
        driver.wait(0)
        assert ring.data(buffer)[:512] == CONTENT[512 * 9 : 512 * 10]
        driver.write(0x070, 0)
        assert driver.status == 0
        assert driver.read(0x044) == 0
        assert driver.read(0x060) == 0


def test_nothing_is_served_before_the_driver_is_up(own: Driver) -> None:
    driver = own
    driver.negotiate()
    ring = driver.queue(0, 8)
    ring.add([read_request(0)], [512, 1])
    driver.kick(0)
    assert ring.poll() == []
    driver.go()  # what was added before is served now, without another doorbell
    assert len(ring.poll()) == 1


@pytest.mark.parametrize("features", [(), (EVENT_IDX,)])
def test_split_indices_turn_over_at_65536(
    own: Driver, engine: Engine, features: tuple[int, ...]
) -> None:
    own.negotiate(*features)
    ring = own.queue(0, 8)
    assert isinstance(ring, SplitRing)
    own.go()
    # As after 65,530 requests.
    state = next(iter(engine.board.devices())).state.queues[0]
    state.next_avail = state.next_used = ring.added = ring.used = 65530
    for index in (ring.driver + 2, ring.device + 2):
        ring.set_word(index, 65530)
    for number in range(12):
        ring.want_interrupts(True)
        buffer = ring.add([read_request(number)], [512, 1])
        own.kick(0)
        assert own.wait(0) == [buffer]
        assert ring.data(buffer)[:512] == CONTENT[512 * number : 512 * number + 512]
        assert own.interrupt() == 1
    assert (ring.added, ring.used) == (6, 6)


def test_a_packed_ring_interrupts_at_the_event_and_nowhere_else_around_its_end(
    own: Driver,
) -> None:
    own.negotiate(PACKED, EVENT_IDX)
    ring = own.queue(0, 11)  # packed rings may have any size; chains lie across its end
    assert isinstance(ring, PackedRing)
    own.go()
    ring.add([read_request(0)], [512, 1])
    own.kick(0)
    own.wait(0)
    own.interrupt()
    for number in range(99):
        distance = number % 9  # the event is any descriptor of the next three chains of three
        place, wrap = ring.used_place + distance, ring.used_wrap
        if place >= ring.size:
            place, wrap = place - ring.size, 1 - wrap
        ring.set_word(ring.driver, place | wrap << 15)
        ring.set_word(ring.driver + 2, 2)
        seen = []
        for _ in range(3):
            ring.add([read_request(1)], [512, 1])
            own.kick(0)
            own.wait(0)
            seen.append(own.interrupt())
        assert seen == [int(distance // 3 == chain) for chain in range(3)]


def test_a_used_packed_descriptor_says_whether_anything_was_written(own: Driver) -> None:
    """2.8.7; QEMU does not say it."""
    own.negotiate(PACKED)
    ring = own.queue(0, 8)
    own.go()
    ring.add([read_request(0)], [512, 1])
    own.kick(0)
    assert own.wait(0)[0].flags & 2


@pytest.mark.parametrize("features", [(), (EVENT_IDX,), (PACKED,), (PACKED, EVENT_IDX)])
def test_a_buffer_added_just_before_notifications_are_on_is_not_missed(
    own: Driver, engine: Engine, monkeypatch: pytest.MonkeyPatch, features: tuple[int, ...]
) -> None:
    own.negotiate(*features)
    ring = own.queue(0, 8)
    own.go()
    late = []

    def add_first(queue: Queue, wanted: bool) -> None:
        if not late:
            late.append(ring.add([read_request(2)], [512, 1]))
        kinds[type(queue)](queue, wanted)

    kinds = {kind: kind.enable_notifications for kind in (SplitQueue, PackedQueue)}
    for kind in kinds:
        monkeypatch.setattr(kind, "enable_notifications", add_first)
    first = ring.add([read_request(1)], [512, 1])
    own.kick(0)
    assert own.wait(0, 2) == [first, late[0]]

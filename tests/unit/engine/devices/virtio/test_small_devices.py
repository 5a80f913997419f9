"""Entropy, balloon and keyboard; the balloon's pages are given back, its statistics are heard."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from tests.unit.engine.devices.driver import Driver, Memory
from tests.unit.engine.devices.machines import Engine, Qemu

from vmlab.engine.devices.virtio.balloon import VirtioBalloon
from vmlab.engine.devices.virtio.keyboard import KEY_POWER, VirtioKeyboard
from vmlab.engine.devices.virtio.rng import VirtioRng
from vmlab.engine.memory.ram import CODE, PAGE_SIZE

STATS_VQ, REPORTING = 1, 5


@pytest.fixture(params=["engine", "qemu"])
def rng(request: pytest.FixtureRequest) -> Driver:
    memory = Memory(0x8010_0000, 0x8080_0000)
    if request.param == "engine":
        engine: Engine = request.getfixturevalue("engine")
        engine.plug(lambda e: VirtioRng("rng", e.ram, e.workers))
        return Driver(engine, 0, memory)
    start: Callable[..., Qemu] = request.getfixturevalue("qemu")
    return Driver(start("-device", "virtio-rng-device,bus=virtio-mmio-bus.0"), 0, memory)


def test_random_bytes_fill_the_buffer(rng: Driver) -> None:
    rng.negotiate()
    ring = rng.queue(0, 8)
    rng.go()
    seen = set()
    for _ in range(8):
        buffer = ring.add([], [20, 44])
        rng.kick(0)
        rng.wait(0)
        assert 0 < buffer.written <= 64
        seen.add(ring.data(buffer))
    assert len(seen) == 8


def test_a_seeded_source_repeats_and_requests_are_bounded(engine: Engine) -> None:
    engine.plug(lambda e: VirtioRng("rng", e.ram, e.workers, lambda n: b"s" * n))
    driver = Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))
    driver.negotiate()
    ring = driver.queue(0, 8)
    driver.go()
    buffer = ring.add([], [1 << 20])
    driver.kick(0)
    driver.wait(0)
    assert ring.data(buffer) == b"s" * 4096


@pytest.fixture
def balloon(engine: Engine) -> VirtioBalloon:
    device = VirtioBalloon("balloon", engine.ram, engine.workers)
    engine.board.plug(device)
    return device


@pytest.fixture
def driver(engine: Engine, balloon: VirtioBalloon) -> Driver:
    driver = Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))
    driver.negotiate(STATS_VQ, REPORTING)
    for index in range(4):
        driver.queue(index)
    driver.go()
    return driver


def test_the_guest_is_asked_for_pages_and_says_what_it_gave(
    driver: Driver, balloon: VirtioBalloon
) -> None:
    told: list[int] = []
    balloon.on_actual = told.append
    balloon.set_target(300)
    assert driver.interrupt() == 2
    assert struct.unpack("<I", driver.config(0, 4)) == (300,)
    driver.machine.write(driver.base + 0x104, 4, 256)
    assert balloon.own.actual == 256
    assert driver.config(4, 4) == struct.pack("<I", 256)
    assert told == [256]
    driver.write(0x070, 0)
    assert balloon.own.actual == 0
    assert balloon.own.target == 300


def test_inflated_pages_are_given_back_to_the_host(
    engine: Engine, driver: Driver, balloon: VirtioBalloon
) -> None:
    start = 0x8060_0000
    engine.poke(start, b"x" * 64 * PAGE_SIZE)
    used = os.fstat(engine.ram.fd).st_blocks
    told: list[int] = []
    engine.ram.tell_of_code(lambda page, count: told.append(page), lambda page, count: None)
    page = (start - engine.ram.base) // PAGE_SIZE
    engine.ram.protect(page + 1, 1, CODE)
    numbers = [(start >> 12) + n for n in range(32)] + [0, 0xFFFF_FFFF, 0x7FFFF]
    driver.rings[0].add([struct.pack(f"<{len(numbers)}I", *numbers) + b"xx"], [])
    driver.kick(0)
    driver.wait(0)
    assert os.fstat(engine.ram.fd).st_blocks <= used - 31 * 8
    assert engine.peek(start, 32 * PAGE_SIZE) == bytes(32 * PAGE_SIZE)
    assert engine.peek(start + 32 * PAGE_SIZE, 32 * PAGE_SIZE) == b"x" * 32 * PAGE_SIZE
    assert told == [page + 1], "decoded code in a page that is given away is stale"
    driver.rings[1].add([struct.pack("<I", start >> 12)], [])
    driver.kick(1)
    assert len(driver.wait(1)) == 1


def test_statistics_are_asked_for_and_heard(driver: Driver, balloon: VirtioBalloon) -> None:
    heard: list[dict[str, int]] = []
    balloon.on_statistics = lambda: heard.append(balloon.own.statistics)
    assert not balloon.request_statistics(), "the guest has given no buffer to ask with"
    first = driver.rings[2].add(
        [
            struct.pack("<HQHQHQ", 4, 1 << 20, 5, 1 << 22, 99, 7)
            + struct.pack("<HQ", 0, (1 << 64) - 1)
        ],
        [],
    )
    driver.kick(2)
    assert heard == [{"free-memory": 1 << 20, "total-memory": 1 << 22}]
    assert driver.rings[2].poll() == [], "the device keeps the buffer to ask with"
    assert balloon.request_statistics()
    assert driver.rings[2].poll() == [first]
    assert not balloon.request_statistics()
    driver.rings[2].add([struct.pack("<HQ", 4, 5)], [])
    driver.kick(2)
    assert heard[1] == {"free-memory": 5}


def test_reported_free_pages_are_given_back_in_whole_pages(engine: Engine, driver: Driver) -> None:
    start = 0x8060_0000
    engine.poke(start, b"x" * 8 * PAGE_SIZE)
    driver.memory.next = start + 100
    driver.rings[3].add([], [3 * PAGE_SIZE])
    driver.kick(3)
    driver.wait(3)
    # From the first whole page of the buffer to its last one.
    assert engine.peek(start, PAGE_SIZE) == b"x" * PAGE_SIZE
    assert engine.peek(start + PAGE_SIZE, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    assert engine.peek(start + 3 * PAGE_SIZE, PAGE_SIZE) == b"x" * PAGE_SIZE


@pytest.fixture
def keyboard(engine: Engine) -> VirtioKeyboard:
    device = VirtioKeyboard("keyboard", engine.ram, engine.workers)
    engine.board.plug(device)
    return device


def test_a_key_goes_down_and_up_once_somebody_listens(
    engine: Engine, keyboard: VirtioKeyboard
) -> None:
    assert not keyboard.press(KEY_POWER)
    driver = Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))
    driver.negotiate()
    ring = driver.queue(0, 8)
    driver.go()
    buffers = [ring.add([], [8]) for _ in range(2)]
    assert keyboard.press(KEY_POWER)
    buffers += [ring.add([], [8]) for _ in range(2)]
    driver.kick(0)
    ring.poll()
    events = [struct.unpack("<HHI", ring.data(buffer)) for buffer in buffers]
    assert events == [(1, KEY_POWER, 1), (0, 0, 0), (1, KEY_POWER, 0), (0, 0, 0)]
    for _ in range(16):
        assert keyboard.press(KEY_POWER)
    assert not keyboard.press(KEY_POWER), "what nobody fetches is bounded"
    driver.negotiate()
    driver.queue(0, 8)
    driver.go()
    assert keyboard.press(KEY_POWER), "a reset forgets what nobody fetched"


def test_a_keyboard_says_what_it_is(engine: Engine, keyboard: VirtioKeyboard) -> None:
    driver = Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))
    driver.negotiate()

    def selected(select: int, subselect: int) -> bytes:
        engine.write(driver.base + 0x100, 1, select)
        engine.write(driver.base + 0x101, 1, subselect)
        return driver.config(8, driver.config(2, 1)[0])

    assert selected(1, 0) == b"vmlab keyboard"
    assert struct.unpack("<4H", selected(3, 0))[1] == 0x1AF4
    keys = int.from_bytes(selected(0x11, 1), "little")
    assert keys >> KEY_POWER & 1 and not keys & 1
    assert selected(0x11, 2) == b"", "it is no mouse"
    assert selected(2, 0) == b""

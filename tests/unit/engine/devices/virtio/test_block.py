"""The block device: requests as virtio 1.2, 5.2.6 has them, here and on QEMU."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.engine.devices.driver import NEEDS_RESET, Driver, Memory
from tests.unit.engine.devices.machines import Engine, Qemu

from vmlab.engine.devices.storage.disk import Disk, RawDisk
from vmlab.engine.devices.virtio.block import VirtioBlock
from vmlab.engine.devices.workers import WorkerThreads

RO, BLK_SIZE, FLUSH, WCE, MQ, DISCARD, WRITE_ZEROES = 5, 6, 9, 11, 12, 13, 14
SECTORS = 256


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(n & 0xFF for n in range(512)) * SECTORS)
    return path


@pytest.fixture(params=["engine", "qemu"])
def driver(request: pytest.FixtureRequest, image: Path) -> Driver:
    memory = Memory(0x8010_0000, 0x8080_0000)
    if request.param == "engine":
        engine: Engine = request.getfixturevalue("engine")
        engine.plug(
            lambda e: VirtioBlock("disk", e.ram, e.workers, RawDisk(image), serial="SN42", queues=2)
        )
        return Driver(engine, 0, memory)
    start: Callable[..., Qemu] = request.getfixturevalue("qemu")
    return Driver(
        start(
            "-drive", f"file={image},format=raw,if=none,id=d,discard=unmap",
            "-device", "virtio-blk-device,drive=d,bus=virtio-mmio-bus.0,serial=SN42,num-queues=2",
        ),
        0,
        memory,
    )  # fmt: skip


def do(driver: Driver, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> bytes:
    """One request on queue 0: what came back, the status last."""
    ring = driver.rings[0]
    out = [struct.pack("<IIQ", kind, 0, sector)] + ([data] if data else [])
    buffer = ring.add(out, ([room] if room else []) + [1])
    driver.kick(0)
    driver.wait(0)
    return b"".join(driver.machine.peek(a, n) for a, n in buffer.writable)


def up(driver: Driver, *features: int) -> Driver:
    driver.negotiate(*features)
    driver.queue(0)
    driver.go()
    return driver


def test_the_configuration_says_what_there_is(driver: Driver) -> None:
    up(driver, FLUSH, BLK_SIZE, MQ, DISCARD, WRITE_ZEROES, WCE)
    assert struct.unpack("<Q", driver.config(0, 8)) == (SECTORS,)
    assert struct.unpack("<I", driver.config(20, 4)) == (512,)
    assert driver.config(32, 1) == b"\1"
    assert struct.unpack("<H", driver.config(34, 2)) == (2,)
    assert 0 < struct.unpack("<I", driver.config(12, 4))[0] < 1024
    for offset in (36, 40, 48, 52):
        assert struct.unpack("<I", driver.config(offset, 4))[0] > 0


def test_what_is_written_is_read_back(driver: Driver, image: Path) -> None:
    up(driver, FLUSH)
    data = bytes(range(256)) * 8
    assert do(driver, 1, 10, data) == b"\0"
    assert do(driver, 4) == b"\0"
    assert do(driver, 0, 10, room=2048) == data + b"\0"
    assert do(driver, 0, 14, room=512) == bytes(n & 0xFF for n in range(512)) + b"\0"
    assert image.read_bytes()[5120:7168] == data


def test_the_serial_number_is_told(driver: Driver) -> None:
    up(driver)
    assert do(driver, 8, room=20) == b"SN42".ljust(20, b"\0") + b"\0"


@pytest.mark.parametrize("sector", [SECTORS, SECTORS - 1, 1 << 60, (1 << 64) - 1])
@pytest.mark.parametrize("kind", [0, 1])
def test_beyond_the_end_is_an_error_of_the_request_alone(
    driver: Driver, kind: int, sector: int
) -> None:
    up(driver)
    answer = do(driver, kind, sector, b"x" * 1024 if kind else b"", 0 if kind else 1024)
    assert answer[-1:] == b"\1"
    assert do(driver, 0, SECTORS - 1, room=512)[-1:] == b"\0"


def test_parts_of_sectors_are_an_error(driver: Driver) -> None:
    up(driver)
    assert do(driver, 0, 0, room=100)[-1:] == b"\1"
    assert do(driver, 1, 0, b"x" * 700)[-1:] == b"\1"


def test_what_nobody_knows_is_unsupported(driver: Driver) -> None:
    up(driver)
    assert do(driver, 77, room=512)[-1:] == b"\2"


def test_zeros_are_written(driver: Driver) -> None:
    up(driver, WRITE_ZEROES, DISCARD)
    assert do(driver, 13, data=struct.pack("<QII", 8, 16, 0)) == b"\0"
    assert do(driver, 13, data=struct.pack("<QII", 32, 8, 1)) == b"\0"
    assert do(driver, 0, 8, room=512 * 16) == bytes(512 * 16) + b"\0"
    assert do(driver, 0, 32, room=512 * 8) == bytes(512 * 8) + b"\0"
    assert do(driver, 0, 24, room=512)[:2] == b"\0\1"
    assert do(driver, 11, data=struct.pack("<QII", 64, 8, 0)) == b"\0"
    assert do(driver, 11, data=struct.pack("<QII", 64, 8, 1))[-1:] == b"\2", "unmap on a discard"
    assert do(driver, 13, data=struct.pack("<QII", 0, 8, 2))[-1:] == b"\2", "an unknown flag"
    assert do(driver, 13, data=struct.pack("<QII", SECTORS - 1, 2, 0))[-1:] == b"\1"


def test_several_ranges_are_discarded_at_once(engine: Engine, image: Path) -> None:
    engine.plug(lambda e: VirtioBlock("disk", e.ram, e.workers, RawDisk(image)))
    driver = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), WRITE_ZEROES)
    ranges = struct.pack("<QII", 0, 1, 0) + struct.pack("<QII", 5, 2, 0)
    assert do(driver, 13, data=ranges) == b"\0"
    content = image.read_bytes()
    assert not any(content[:512]) and not any(content[5 * 512 : 7 * 512])
    assert content[512:1024] == bytes(n & 0xFF for n in range(512))
    assert do(driver, 13, data=ranges[:20]) == b"\1"
    assert do(driver, 13, data=ranges * 20) == b"\2"


def test_a_read_only_disk_is_not_written(engine: Engine, image: Path) -> None:
    engine.plug(lambda e: VirtioBlock("disk", e.ram, e.workers, RawDisk(image, read_only=True)))
    driver = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), RO)
    before = image.read_bytes()
    assert not driver.offered() >> DISCARD & 1
    assert do(driver, 1, 0, b"x" * 512) == b"\1"
    assert do(driver, 13, data=struct.pack("<QII", 0, 1, 0)) == b"\2"
    assert do(driver, 4) == b"\0"
    assert image.read_bytes() == before


class Faulty:
    """Stands before a disk, counts flushes, and fails when it is told to."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.failing = False
        self.flushes = 0
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.read_only, self.discard_alignment = disk.read_only, disk.discard_alignment

    @property
    def size(self) -> int:
        return self.disk.size

    def _maybe(self) -> None:
        if self.gate is not None:
            self.entered.set()
            assert self.gate.wait(250)
        if self.failing:
            raise OSError(5, "Input/output error")

    def read(self, offset: int, size: int) -> bytes:
        self._maybe()
        return self.disk.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        self._maybe()
        self.disk.write(offset, data)

    def flush(self) -> None:
        self._maybe()
        self.flushes += 1

    def discard(self, offset: int, size: int) -> None:
        self._maybe()

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        self._maybe()

    def close(self) -> None:
        self.disk.close()


@pytest.fixture
def faulty(engine: Engine, image: Path) -> Faulty:
    disk = Faulty(RawDisk(image))
    engine.plug(lambda e: VirtioBlock("disk", e.ram, e.workers, disk))
    return disk


def test_an_error_of_the_host_is_an_io_error_of_the_guests(engine: Engine, faulty: Faulty) -> None:
    driver = up(
        Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), FLUSH, WCE, DISCARD, WRITE_ZEROES
    )
    faulty.failing = True
    one = struct.pack("<QII", 0, 1, 0)
    assert do(driver, 0, 0, room=512)[-1:] == b"\1"
    assert do(driver, 1, 0, b"x" * 512) == b"\1"
    assert do(driver, 4) == b"\1"
    assert do(driver, 11, data=one) == b"\1"
    assert do(driver, 13, data=one) == b"\1"
    driver.machine.write(driver.base + 0x120, 1, 0)
    faulty.failing = False
    assert do(driver, 0, 0, room=512)[-1:] == b"\0"
    assert not driver.status & NEEDS_RESET


def test_a_driver_that_cannot_flush_has_its_writes_flushed(engine: Engine, faulty: Faulty) -> None:
    driver = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)))
    do(driver, 1, 0, b"x" * 512)
    assert faulty.flushes == 1
    up(driver, FLUSH, WCE)
    do(driver, 1, 0, b"x" * 512)
    assert faulty.flushes == 1
    driver.machine.write(driver.base + 0x120, 1, 0)  # the cache is written through from here on
    assert faulty.flushes == 1, "a hart does not wait for the disk"
    do(driver, 1, 0, b"x" * 512)
    assert faulty.flushes == 2
    assert driver.config(32, 1) == b"\0"


def test_a_resize_is_told(engine: Engine, image: Path) -> None:
    disk = RawDisk(image)
    device = VirtioBlock("disk", engine.ram, engine.workers, disk)
    engine.board.plug(device)
    driver = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)))
    generation = driver.read(0x0FC)
    disk.resize(1 << 20)
    device.resized()
    assert driver.read(0x0FC) != generation
    assert driver.interrupt() == 2
    assert struct.unpack("<Q", driver.config(0, 8)) == (2048,)


class Threads:
    """A block device whose requests are served by threads, and a driver of it."""

    def __init__(self, engine: Engine, disk: Disk, queues: int = 1) -> None:
        self.failures: list[tuple[str, BaseException]] = []
        self.workers = WorkerThreads(2, lambda name, error: self.failures.append((name, error)))
        self.device = VirtioBlock("disk", engine.ram, self.workers, disk, queues=queues)
        engine.board.plug(self.device)
        self.driver = Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))
        self.driver.negotiate(*([MQ] if queues > 1 else []))
        for index in range(queues):
            self.driver.queue(index)
        self.driver.go()
        # A driver that is up has each of its queues looked at once, by a thread.
        assert self.workers.drain(250) == []
        self.workers.resume()


def test_the_doorbell_does_not_wait_for_the_disk(engine: Engine, image: Path) -> None:
    disk = Faulty(RawDisk(image))
    disk.gate = threading.Event()
    threads = Threads(engine, disk, queues=2)
    driver = threads.driver
    slow = driver.rings[0].add([struct.pack("<IIQ", 0, 0, 1)], [512, 1])
    driver.kick(0)
    assert disk.entered.wait(250)
    assert driver.rings[0].poll() == []
    # Draining says what is stuck and starts nothing new.
    assert threads.workers.drain(0) == ["disk.0"]
    other = driver.rings[1].add([struct.pack("<IIQ", 8, 0, 0)], [20, 1])
    driver.kick(1)
    flying = threads.device.state.queues[0].in_flight
    assert [chain.writable for chain in flying.values()] == [slow.writable]
    disk.gate.set()
    assert threads.workers.drain(250) == []
    assert driver.rings[0].poll() == [slow]
    assert driver.rings[1].poll() == []
    disk.gate = None
    threads.workers.resume()
    assert driver.wait(1) == [other]
    threads.workers.close()
    assert threads.failures == []


def test_a_reset_does_not_wait_for_a_disk_that_hangs(engine: Engine, image: Path) -> None:
    disk = Faulty(RawDisk(image))
    disk.gate = threading.Event()
    threads = Threads(engine, disk)
    driver = threads.driver
    buffer = driver.rings[0].add([struct.pack("<IIQ", 0, 0, 1)], [512, 1])
    before = driver.machine.peek(*buffer.writable[0])
    driver.kick(0)
    assert disk.entered.wait(250)
    driver.write(0x070, 0)
    assert driver.status == 0
    disk.gate.set()
    assert threads.workers.drain(250) == []
    assert driver.machine.peek(*buffer.writable[0]) == before
    assert driver.read(0x060) == 0
    threads.workers.close()
    assert threads.failures == []


def test_a_request_in_flight_is_issued_again_from_a_saved_state(
    engine: Engine, image: Path
) -> None:
    import copy

    disk = Faulty(RawDisk(image))
    disk.gate = threading.Event()
    threads = Threads(engine, disk)
    driver = threads.driver
    buffer = driver.rings[0].add([struct.pack("<IIQ", 0, 0, 1)], [512, 1])
    driver.kick(0)
    assert disk.entered.wait(250)
    saved = copy.deepcopy(threads.device.state)
    memory = engine.ram.read(engine.ram.base, engine.ram.size)
    disk.gate.set()
    threads.workers.close()
    driver.rings[0].poll()
    # Another machine, from what was saved.
    other = Engine()
    other.ram.load_image(other.ram.base, memory)
    device = VirtioBlock("disk", other.ram, other.workers, disk.disk)
    other.board.plug(device)
    device.restore(saved)
    assert other.ram.read(buffer.writable[0][0], 512) == bytes(n & 0xFF for n in range(512))
    assert other.level(1)
    other.board.slots[0].device = None
    other.close()

"""The SCSI host: commands with the answers of QEMU's, and disks that come and go."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.engine.devices.driver import NEEDS_RESET, Driver, Memory
from tests.unit.engine.devices.machines import Engine, Qemu

from vmlab.engine.devices.storage.disk import RawDisk
from vmlab.engine.devices.virtio.scsi import VirtioScsi
from vmlab.machine.errors import ResourceNotFound, VmlabError

INOUT, HOTPLUG, CHANGE = 0, 1, 2
SECTORS = 2048
CONTENT = b"".join(struct.pack(">I", n) * 128 for n in range(SECTORS))
MODE_SENSE_CACHING = bytes((0x1A, 0, 8, 0, 255, 0))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


class Initiator:
    """The driver's part of 5.6.6."""

    def __init__(self, driver: Driver, *features: int) -> None:
        self.driver = driver
        driver.negotiate(*features)
        for index in range(3):
            driver.queue(index)
        driver.go()
        self.tag = 0

    def command(
        self,
        cdb: bytes,
        data: bytes = b"",
        room: int = 0,
        target: int = 0,
        lun: int = 0,
    ) -> tuple[int, int, tuple[int, int, int], bytes, int]:
        """(response, status, sense, data, residual)."""
        self.tag += 1
        address = bytes((1, target)) + struct.pack(">H", 0x4000 | lun) + bytes(4)
        header = struct.pack("<8sQBBB", address, self.tag, 0, 0, 0) + cdb.ljust(32, b"\0")
        start = self.driver.memory.next
        buffer = self.driver.rings[2].add(
            [header] + ([data] if data else []), [108] + ([room] if room else [])
        )
        self.driver.kick(2)
        self.driver.wait(2)
        answer = self.driver.machine.peek(*buffer.writable[0])
        sense_size, residual, _, status, response = struct.unpack_from("<IIHBB", answer)
        sense = answer[12 : 12 + sense_size]
        told = (sense[2] & 15, sense[12], sense[13]) if sense_size >= 14 else (0, 0, 0)
        incoming = self.driver.machine.peek(*buffer.writable[1]) if room else b""
        self.driver.memory.next = start
        return response, status, told, incoming[: room - residual], residual

    def ready(self, target: int = 0) -> None:
        """Take the unit attention of a disk that was just switched on."""
        for _ in range(4):
            if self.command(bytes(6), target=target)[1] == 0:
                return
        raise AssertionError("the disk does not become ready")


@pytest.fixture(params=["engine", "qemu"])
def initiator(request: pytest.FixtureRequest, image: Path) -> Initiator:
    memory = Memory(0x8010_0000, 0x8080_0000)
    if request.param == "engine":
        engine: Engine = request.getfixturevalue("engine")
        host = VirtioScsi("scsi", engine.ram, engine.workers)
        host.plug(RawDisk(image), "SN42", 3)
        engine.board.plug(host)
        return Initiator(Driver(engine, 0, memory), INOUT)
    start: Callable[..., Qemu] = request.getfixturevalue("qemu")
    return Initiator(
        Driver(
            start(
                "-drive", f"file={image},format=raw,if=none,id=d,discard=unmap",
                "-device", "virtio-scsi-device,id=s,bus=virtio-mmio-bus.0",
                "-device", "scsi-hd,drive=d,bus=s.0,scsi-id=3,serial=SN42,product=P,vendor=V",
            ),
            0,
            memory,
        )
    )  # fmt: skip


def rw(opcode: int, block: int, count: int) -> bytes:
    group = opcode >> 5
    if group == 0:
        return bytes((opcode,)) + block.to_bytes(3, "big") + bytes((count & 255, 0))
    if group == 4:
        return struct.pack(">BBQIBB", opcode, 0, block, count, 0, 0)
    if group == 5:
        return struct.pack(">BBIIBB", opcode, 0, block, count, 0, 0)
    return struct.pack(">BBIBHB", opcode, 0, block, 0, count, 0)


def test_a_disk_that_was_switched_on_says_so_once(initiator: Initiator) -> None:
    assert initiator.command(bytes(6), target=3)[1:3] == (2, (6, 0x29, 0))
    assert initiator.command(bytes(6), target=3)[:2] == (0, 0)


def test_who_is_there_can_be_asked_before_that(initiator: Initiator) -> None:
    response, status, _, data, residual = initiator.command(
        bytes((0x12, 0, 0, 0, 36, 0)), room=36, target=3
    )
    assert (response, status, residual) == (0, 0, 0)
    assert data[0] == 0 and data[2] >= 5 and data[3] & 15 == 2 and len(data) == 36
    luns = initiator.command(struct.pack(">B5xIH", 0xA0, 64, 0), room=64, target=3)
    assert luns[3][:16] == struct.pack(">II8x", 8, 0)
    assert luns[4] == 64 - 16
    serial = initiator.command(bytes((0x12, 1, 0x80, 0, 64, 0)), room=64, target=3)[3]
    assert serial.rstrip(b"\0") == bytes((0, 0x80, 0, 4)) + b"SN42"
    pages = initiator.command(bytes((0x12, 1, 0, 0, 64, 0)), room=64, target=3)[3]
    assert {0, 0x80, 0x83, 0xB0, 0xB1, 0xB2} <= set(pages[4:])
    for page in pages[4:]:
        answer = initiator.command(bytes((0x12, 1, page, 0, 255, 0)), room=255, target=3)[3]
        assert answer[1] == page
        assert len(answer) >= 4 + int.from_bytes(answer[2:4], "big")


def test_the_capacity_is_told_in_two_sizes(initiator: Initiator) -> None:
    initiator.ready(3)
    small = initiator.command(bytes((0x25,)) + bytes(9), room=8, target=3)[3]
    assert struct.unpack(">II", small) == (SECTORS - 1, 512)
    cdb = struct.pack(">BB8xI2x", 0x9E, 0x10, 32)
    large = initiator.command(cdb, room=32, target=3)[3]
    assert struct.unpack_from(">QI", large) == (SECTORS - 1, 512)
    assert large[14] & 0x80, "it can be trimmed"


@pytest.mark.parametrize(
    ("read", "write"), [(0x08, 0x0A), (0x28, 0x2A), (0xA8, 0xAA), (0x88, 0x8A)]
)
def test_blocks_are_read_and_written(
    initiator: Initiator, image: Path, read: int, write: int
) -> None:
    initiator.ready(3)
    response, status, _, data, residual = initiator.command(rw(read, 7, 3), room=1536, target=3)
    assert (response, status, residual) == (0, 0, 0)
    assert data == CONTENT[7 * 512 : 10 * 512]
    new = bytes(range(256)) * 4
    assert initiator.command(rw(write, 100, 2), data=new, target=3)[:2] == (0, 0)
    assert initiator.command(rw(read, 100, 2), room=1024, target=3)[3] == new
    assert initiator.command(bytes((0x35,)) + bytes(9), target=3)[1] == 0
    assert image.read_bytes()[51200:52224] == new


def test_errors_have_the_sense_that_drivers_look_for(initiator: Initiator) -> None:
    initiator.ready(3)

    def sense(cdb: bytes, data: bytes = b"", room: int = 0) -> tuple[int, tuple[int, int, int]]:
        _, status, told, _, _ = initiator.command(cdb, data, room, target=3)
        return status, told

    assert sense(rw(0x28, SECTORS, 1), room=512) == (2, (5, 0x21, 0))
    assert sense(rw(0x88, (1 << 64) - 1, 1), room=512) == (2, (5, 0x21, 0))
    assert sense(rw(0x2A, SECTORS - 1, 2), data=bytes(1024)) == (2, (5, 0x21, 0))
    assert sense(bytes((0xEE,)) + bytes(5)) == (2, (5, 0x20, 0))
    assert sense(bytes((0x12, 1, 0x55, 0, 64, 0)), room=64) == (2, (5, 0x24, 0))


def test_who_is_not_there_does_not_answer(initiator: Initiator) -> None:
    assert initiator.command(bytes(6), target=9)[0] == 3


def test_the_write_cache_is_told(initiator: Initiator) -> None:
    initiator.ready(3)
    data = initiator.command(MODE_SENSE_CACHING, room=255, target=3)[3]
    assert data[2] & 0x80 == 0, "not write-protected"
    page = data[4 + data[3] :]
    assert page[0] & 0x3F == 8 and page[2] & 4


def test_blocks_are_trimmed_and_zeroed(initiator: Initiator, image: Path) -> None:
    initiator.ready(3)
    ranges = struct.pack(">QI4x", 16, 8) + struct.pack(">QI4x", 64, 16)
    parameters = struct.pack(">HH4x", len(ranges) + 6, len(ranges)) + ranges
    unmap = struct.pack(">B6xHB", 0x42, len(parameters), 0)
    assert initiator.command(unmap, data=parameters, target=3)[1] == 0
    same = struct.pack(">BBQIBB", 0x93, 0x08, 200, 32, 0, 0)
    assert initiator.command(same, data=bytes(512), target=3)[1] == 0
    pattern = struct.pack(">BBQIBB", 0x93, 0, 300, 4, 0, 0)
    assert initiator.command(pattern, data=b"ab" * 256, target=3)[1] == 0
    read = initiator.command(rw(0x28, 200, 32), room=32 * 512, target=3)[3]
    assert read == bytes(32 * 512)
    assert initiator.command(rw(0x28, 300, 5), room=5 * 512, target=3)[3] == (
        b"ab" * 1024 + CONTENT[304 * 512 : 305 * 512]
    )
    beyond = struct.pack(">HH4xQI4x", 22, 16, SECTORS, 1)
    unmap = struct.pack(">B6xHB", 0x42, len(beyond), 0)
    assert initiator.command(unmap, data=beyond, target=3)[1:3] == (2, (5, 0x21, 0))


def test_task_management_finds_nothing_left_to_do(initiator: Initiator) -> None:
    initiator.ready(3)
    for subtype, target, expected in ((0, 3, {0}), (5, 3, {0}), (5, 9, {3, 12}), (77, 3, {11})):
        lun = bytes((1, target, 0x40, 0, 0, 0, 0, 0))
        buffer = initiator.driver.rings[0].add([struct.pack("<II8sQ", 0, subtype, lun, 1)], [1])
        initiator.driver.kick(0)
        initiator.driver.wait(0)
        assert initiator.driver.rings[0].data(buffer)[0] in expected, (subtype, target)
    status, told = initiator.command(bytes(6), target=3)[1:3]
    assert status == 2 and told[:2] == (6, 0x29), "the unit was reset"


# ------------------------------------------------------------------------ the engine's alone


@pytest.fixture
def host(engine: Engine) -> VirtioScsi:
    host = VirtioScsi("scsi", engine.ram, engine.workers)
    engine.board.plug(host)
    return host


@pytest.fixture
def guest(engine: Engine, host: VirtioScsi) -> Initiator:
    return Initiator(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), HOTPLUG, CHANGE)


def events(guest: Initiator) -> list[tuple[int, int, int]]:
    told = []
    for buffer in guest.driver.rings[1].poll():
        event, lun, reason = struct.unpack("<I8sI", guest.driver.rings[1].data(buffer))
        # Linux takes bytes 2 and 3 for the unit's number as they are.
        assert lun == bytes((1, lun[1], 0, 0, 0, 0, 0, 0))
        told.append((event, lun[1], reason))
    return told


def test_disks_are_plugged_and_unplugged_while_the_guest_runs(
    host: VirtioScsi, guest: Initiator, image: Path
) -> None:
    for _ in range(4):
        guest.driver.rings[1].add([], [16])
    guest.driver.kick(1)
    target = host.plug(RawDisk(image), "one")
    assert target == 0
    assert events(guest) == [(1, 0, 1)]
    guest.ready()
    assert guest.command(rw(0x28, 5, 1), room=512)[3] == CONTENT[5 * 512 : 6 * 512]
    host.unplug(target)
    assert events(guest) == [(1, 0, 2)]
    assert guest.command(bytes(6))[0] == 3
    RawDisk(image).close()  # nobody holds it any more
    with pytest.raises(ResourceNotFound):
        host.unplug(target)
    assert host.plug(RawDisk(image), "two", 200) == 200
    assert events(guest) == [(1, 200, 1)]
    with pytest.raises(VmlabError, match="no free target 200"):
        host.plug(host.disks[200].disk, "three", 200)
    host.disks[200].disk.resize(SECTORS * 256)
    host.resized(200)
    assert events(guest) == [(3, 200, 0x092A)]
    assert guest.command(bytes(6), target=200)[2] == (6, 0x2A, 9)


def test_events_without_a_buffer_are_told_as_missed(
    host: VirtioScsi, guest: Initiator, image: Path
) -> None:
    for _ in range(40):
        host.unplug(host.plug(RawDisk(image), ""))
    for _ in range(16):
        guest.driver.rings[1].add([], [16])
    guest.driver.kick(1)
    told = events(guest)
    assert told[0] == (0x8000_0001, 0, 1)
    assert told[1] == (1, 0, 2)


def test_all_targets_can_be_taken(host: VirtioScsi, image: Path) -> None:
    for number in range(256):
        assert host.plug(RawDisk(image, read_only=True), str(number)) == number
    disk = RawDisk(image, read_only=True)
    with pytest.raises(VmlabError, match="no free target"):
        host.plug(disk, "")
    disk.close()


def test_a_read_only_disk_says_that_it_is(host: VirtioScsi, guest: Initiator, image: Path) -> None:
    host.plug(RawDisk(image, read_only=True), "")
    guest.ready()
    assert guest.command(rw(0x2A, 0, 1), data=bytes(512))[1:3] == (2, (7, 0x27, 0))
    assert guest.command(MODE_SENSE_CACHING, room=64)[3][2] & 0x80
    assert image.read_bytes() == CONTENT


def test_errors_of_the_host_become_medium_errors(
    host: VirtioScsi, guest: Initiator, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = RawDisk(image)
    host.plug(disk, "")
    guest.ready()

    def fail(*arguments: object, **options: object) -> bytes:
        raise OSError(error, "no")

    for name in ("read", "write", "flush"):
        monkeypatch.setattr(disk, name, fail)
    error = 5
    assert guest.command(rw(0x28, 0, 1), room=512)[1:3] == (2, (3, 0x11, 0))
    assert guest.command(rw(0x2A, 0, 1), data=bytes(512))[1:3] == (2, (3, 0x0C, 0))
    error = 28
    assert guest.command(rw(0x2A, 0, 1), data=bytes(512))[1:3] == (2, (7, 0x27, 7))


def test_requests_that_are_none_break_the_host_alone(guest: Initiator, host: VirtioScsi) -> None:
    guest.driver.rings[2].add([bytes(20)], [108])
    guest.driver.kick(2)
    assert guest.driver.status & NEEDS_RESET
    again = Initiator(guest.driver, HOTPLUG)
    again.driver.rings[0].add([struct.pack("<I", 99)], [8])
    again.driver.kick(0)
    assert again.driver.status & NEEDS_RESET
    again = Initiator(guest.driver)
    assert again.command(bytes(6), lun=1)[0] == 3


def test_the_driver_may_choose_smaller_senses(guest: Initiator, host: VirtioScsi) -> None:
    driver = guest.driver
    driver.machine.write(driver.base + 0x114, 4, 20)
    driver.machine.write(driver.base + 0x118, 4, 16)
    driver.machine.write(driver.base + 0x118, 4, 5)
    assert struct.unpack("<II", driver.config(20, 8)) == (20, 16)
    driver.write(0x070, 0)
    assert struct.unpack("<II", driver.config(20, 8)) == (96, 32)

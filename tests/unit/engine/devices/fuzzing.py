"""Any bytes, read as what a hostile driver and an unlucky host do to one virtio device.

An input first chooses features and rings, then does things: writes registers and configuration,
makes chains (well-formed ones around the device's own messages, and raw descriptors that point
anywhere), moves indices, rings doorbells, and lets the host's side act. The device must take all
of it without an exception, and serve a proper driver after a reset.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.unit.engine.devices.driver import Driver, Memory
from tests.unit.engine.devices.machines import Engine

from vmlab.engine.devices.virtio.balloon import VirtioBalloon
from vmlab.engine.devices.virtio.block import VirtioBlock
from vmlab.engine.devices.virtio.console import Port, VirtioConsole
from vmlab.engine.devices.virtio.device import VirtioDevice
from vmlab.engine.devices.virtio.keyboard import VirtioKeyboard
from vmlab.engine.devices.virtio.net import VirtioNet
from vmlab.engine.devices.virtio.rng import VirtioRng
from vmlab.engine.devices.virtio.scsi import VirtioScsi

RAM = 256 * 1024
BASE = 0x8000_0000
SLOT = 0x1000_1000
QUEUES = 6
"""Queues that an input sets up at most."""
RING_AREA = 0x800
"""Bytes for the rings of one queue; behind all of them lies what chains point at."""
DATA = BASE + RING_AREA * QUEUES
CHECK_EVERY = 500
"""Inputs between two looks at whether a proper driver is still served."""
LUCK = 13
"""One in so many calls of a disk fails."""


class MemoryDisk:
    """A disk in memory that fails now and then."""

    read_only = False
    discard_alignment = 4096

    def __init__(self) -> None:
        self.content = bytearray(64 * 1024)
        self.calls = 0

    @property
    def size(self) -> int:
        return len(self.content)

    def _maybe(self) -> None:
        self.calls += 1
        if self.calls % LUCK == 0:
            raise OSError(5 if self.calls % 2 else 28, "no")

    def read(self, offset: int, size: int) -> bytes:
        self._maybe()
        assert 0 <= offset <= offset + size <= self.size
        return bytes(self.content[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self._maybe()
        assert 0 <= offset <= offset + len(data) <= self.size
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self._maybe()

    def discard(self, offset: int, size: int) -> None:
        self._maybe()
        assert 0 <= offset <= offset + size <= self.size

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        self.discard(offset, size)

    def close(self) -> None: ...


class Endpoint:
    """A port's far end that is there or not, and takes as much as it likes."""

    def __init__(self) -> None:
        self.connected = True
        self.waiting = bytearray()
        self.appetite = 0

    def attach(self, port: Port) -> None:
        self.port = port

    def send(self, data: bytes) -> int:
        self.appetite = (self.appetite * 7 + 3) % 1000
        return min(len(data), self.appetite if self.appetite > 100 else len(data))

    def receive(self, size: int) -> bytes:
        data = bytes(self.waiting[:size])
        del self.waiting[: len(data)]
        return data

    def close(self) -> None: ...


class Wire:
    """A segment that takes a frame or does not."""

    def __init__(self) -> None:
        self.sent = 0

    def attach(self, device: VirtioNet) -> None:
        self.device = device

    def send(self, frame: bytes) -> bool:
        self.sent += 1
        return self.sent % 5 != 0

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Bytes:
    """An input, consumed; behind its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def __bool__(self) -> bool:
        return self.place < len(self.data)

    def take(self, size: int) -> bytes:
        part = self.data[self.place : self.place + size]
        self.place += size
        return part.ljust(size, b"\0")

    def byte(self) -> int:
        return self.take(1)[0]

    def word(self) -> int:
        return int.from_bytes(self.take(4), "little")


@dataclass
class Target:
    """A device, what its messages look like, and what its host does."""

    make: Callable[[Engine], VirtioDevice]
    messages: list[bytes]
    host: Callable[[VirtioDevice, Bytes], None] = lambda device, data: None
    healthy: Callable[[Driver], None] = lambda driver: None
    count: int = field(default=0, init=False)

    def build(self) -> None:
        self.engine = Engine(memory=RAM)
        self.device = self.make(self.engine)
        self.engine.board.plug(self.device)
        self.queues = min(len(self.device.state.queues), QUEUES)

    def run(self, data: bytes) -> None:
        """One input."""
        source = Bytes(data)
        self._set_up(source)
        doings = (
            self._chain, self._chain, self._raw, self._register, self._kick, self._index,
            self._host, self._configuration,
        )  # fmt: skip
        while source:
            doings[source.byte() & 7](source)
        for queue in range(self.queues):
            self.engine.write(SLOT + 0x50, 4, queue)
        self.engine.write(SLOT + 0x70, 4, 0)
        assert self.device.state.status == 0
        assert not self.engine.level(1)
        self.count += 1
        if self.count % CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """A proper driver is served."""
        driver = Driver(self.engine, 0, Memory(DATA, BASE + RAM))
        self.healthy(driver)
        driver.write(0x070, 0)

    def _set_up(self, source: Bytes) -> None:
        write = self.engine.write
        write(SLOT + 0x70, 4, 0)
        write(SLOT + 0x70, 4, 3)
        choice = source.byte()
        features = 1 << 32 | (choice & 1) << 28 | (choice >> 1 & 1) << 29 | (choice >> 2 & 1) << 34
        features |= self.device.offered & source.word() if choice & 8 else self.device.offered & (
            0x0FFF_FFFF
        )  # fmt: skip
        for half in (0, 1):
            write(SLOT + 0x24, 4, half)
            write(SLOT + 0x20, 4, features >> (32 * half) & 0xFFFF_FFFF)
        write(SLOT + 0x70, 4, 11)
        self.packed = bool(features >> 34 & 1)
        self.size = 16 if choice & 16 else 8
        self.heads = [0] * QUEUES
        self.free = [0] * QUEUES
        self.engine.ram.zero(BASE, RING_AREA * QUEUES)
        for queue in range(self.queues):
            at = BASE + RING_AREA * queue
            write(SLOT + 0x30, 4, queue)
            write(SLOT + 0x38, 4, self.size)
            for register, address in ((0x80, at), (0x90, at + 0x200), (0xA0, at + 0x400)):
                write(SLOT + register, 4, address)
            write(SLOT + 0x44, 4, 1)
        write(SLOT + 0x70, 4, 15)

    def _queue(self, source: Bytes) -> int:
        return source.byte() % self.queues

    def _chain(self, source: Bytes) -> None:
        """A well-formed chain with one of the device's messages, bent a little."""
        queue = self._queue(source)
        shape = source.byte()
        message = bytearray(self.messages[source.byte() % len(self.messages)])
        if shape & 1 and message:
            message[source.byte() % len(message)] = source.byte()
        if shape & 2:
            del message[source.byte() % (len(message) + 1) :]
        at = DATA + 16 * source.byte()
        self.engine.poke(at, bytes(message))
        segments = [(at, len(message), 0)]
        if shape & 4:
            segments.append((DATA + 0x2000, (0, 1, 16, 511, 512, 4096)[source.byte() % 6], 0))
        for _ in range(shape >> 4 & 3):
            segments.append((DATA + 0x4000, (1, 8, 108, 512, 1600, 16384)[source.byte() % 6], 2))
        self._publish(queue, segments, indirect=bool(shape & 8))

    def _publish(self, queue: int, segments: list[tuple[int, int, int]], indirect: bool) -> None:
        ram, at = self.engine.ram, BASE + RING_AREA * queue
        if self.packed:
            if indirect:
                table = b"".join(struct.pack("<QIHH", a, n, 0, f) for a, n, f in segments)
                ram.write(at + 0x600, table)
                segments = [(at + 0x600, len(table), 4)]
            for number, (address, size, flags) in enumerate(segments):
                if number + 1 < len(segments):
                    flags |= 1
                place, wrap = self.heads[queue] % self.size, self.heads[queue] // self.size & 1
                flags |= 1 << 15 if wrap else 1 << 7
                ram.write(at + 16 * place, struct.pack("<QIHH", address, size, place, flags))
                self.heads[queue] += 1
            return
        chain = [(self.free[queue] + n) % self.size for n in range(len(segments))]
        if indirect:
            table = b"".join(
                struct.pack("<QIHH", a, n, f | (i + 1 < len(segments)), i + 1)
                for i, (a, n, f) in enumerate(segments)
            )
            ram.write(at + 0x600, table)
            segments = [(at + 0x600, len(table), 4)]
        for number, (address, size, flags) in enumerate(segments):
            more = number + 1 < len(segments)
            following = chain[number + 1] if more else 0
            ram.write(
                at + 16 * chain[number],
                struct.pack("<QIHH", address, size, flags | more, following),
            )
        self.free[queue] += len(segments)
        self._head(queue, chain[0])

    def _head(self, queue: int, head: int) -> None:
        at = BASE + RING_AREA * queue + 0x200
        self.engine.ram.store16(at + 4 + 2 * (self.heads[queue] % self.size), head)
        self.heads[queue] = (self.heads[queue] + 1) & 0xFFFF
        self.engine.ram.store16(at + 2, self.heads[queue])

    def _raw(self, source: Bytes) -> None:
        """A descriptor that points anywhere."""
        queue, place, kind = self._queue(source), source.byte() % self.size, source.byte()
        address = (
            DATA, BASE + RAM - 8, BASE + RAM, 0, (1 << 64) - 16, BASE + RING_AREA * queue,
            source.word(), DATA + 0x8000,
        )[kind & 7]  # fmt: skip
        size = (0, 1, 16, 32, 4096, RAM, 0xFFFF_FFFF, source.word())[kind >> 3 & 7]
        flags = source.byte() & 7 | (source.byte() & 3) << 7 * (kind >> 6 & 1)
        if self.packed:
            flags |= 1 << 7
        at = BASE + RING_AREA * queue + 16 * place
        following = source.byte() % (self.size + 1)
        self.engine.ram.write(at, struct.pack("<QIHH", address, size, flags & 0xFFFF, following))
        if not self.packed:
            self._head(queue, place)

    def _register(self, source: Bytes) -> None:
        self.engine.write(SLOT + 4 * (source.byte() & 0x3F), 4, source.word())
        self.engine.read(SLOT + 4 * (source.byte() & 0x3F), 4)

    def _configuration(self, source: Bytes) -> None:
        size = 1 << (source.byte() & 3)
        offset = source.byte() & -size
        self.engine.write(SLOT + 0x100 + offset, size, int.from_bytes(source.take(size), "little"))
        self.engine.read(SLOT + 0x100 + offset, size)

    def _kick(self, source: Bytes) -> None:
        self.engine.write(SLOT + 0x50, 4, self._queue(source))

    def _index(self, source: Bytes) -> None:
        """An index, a flag or an event of a ring, changed underfoot."""
        queue = self._queue(source)
        at = BASE + RING_AREA * queue + 0x200 * (1 + (source.byte() & 1))
        self.engine.ram.store16(at + 2 * (source.byte() % 20), source.word() & 0xFFFF)

    def _host(self, source: Bytes) -> None:
        self.host(self.device, source)


# ------------------------------------------------------------------------------- the devices


def _block_works(driver: Driver) -> None:
    driver.negotiate(28, 29)
    ring = driver.queue(0, 8)
    driver.go()
    for _ in range(2):  # one of two may meet the disk's failure
        buffer = ring.add([struct.pack("<IIQ", 0, 0, 1)], [512, 1])
        driver.kick(0)
        assert ring.poll() == [buffer]
        if ring.data(buffer)[-1] == 0:
            return
    raise AssertionError("no request succeeds")


def _rng_works(driver: Driver) -> None:
    driver.negotiate(34)
    ring = driver.queue(0, 8)
    driver.go()
    buffer = ring.add([], [64])
    driver.kick(0)
    assert ring.poll() == [buffer] and buffer.written == 64


def _console_host(device: VirtioDevice, source: Bytes) -> None:
    assert isinstance(device, VirtioConsole)
    port = device.ports[source.byte() % len(device.ports)]
    endpoint = port.endpoint
    assert isinstance(endpoint, Endpoint)
    what = source.byte()
    if what & 1:
        endpoint.waiting += bytes(what)
        port.arrived()
    if what & 2:
        port.resume()
    if what & 4:
        endpoint.connected = bool(what & 8)
        port.connection_changed()
    if what & 16:
        device.resize(what, source.byte())


def _console_works(driver: Driver) -> None:
    device = next(iter(driver.machine.board.devices()))
    for port in device.ports:
        port.endpoint.waiting.clear()
        port.endpoint.connected = True
    driver.negotiate()
    driver.queue(0, 8)
    driver.queue(1, 8)
    driver.go()
    buffer = driver.rings[0].add([], [64])
    driver.kick(0)
    device.ports[0].endpoint.waiting += b"typed"
    device.ports[0].arrived()
    assert driver.rings[0].poll() == [buffer] and driver.rings[0].data(buffer) == b"typed"


def _net_host(device: VirtioDevice, source: Bytes) -> None:
    assert isinstance(device, VirtioNet)
    what = source.byte()
    if what & 3:
        device.arrived(bytes((1, 60, 1514, 9000, 65_550, 65_551)[source.byte() % 6]))
    elif what & 4:
        device.set_link(bool(what & 8))
    elif what & 16:
        device.announce()
    else:
        device.resume()


def _net_works(driver: Driver) -> None:
    device = next(iter(driver.machine.board.devices()))
    device.set_link(True)
    driver.negotiate(15)
    driver.queue(0, 8)
    driver.queue(1, 8)
    driver.go()
    buffer = driver.rings[0].add([], [128])
    driver.kick(0)
    device.arrived(bytes(60))
    assert driver.rings[0].poll() == [buffer] and buffer.written == 72


def _balloon_host(device: VirtioDevice, source: Bytes) -> None:
    assert isinstance(device, VirtioBalloon)
    if source.byte() & 1:
        device.set_target(source.byte())
    else:
        device.request_statistics()


def _balloon_works(driver: Driver) -> None:
    driver.negotiate()
    driver.queue(0, 8)
    driver.go()
    buffer = driver.rings[0].add([struct.pack("<I", 0x80030)], [])
    driver.kick(0)
    assert driver.rings[0].poll() == [buffer]


def _keyboard_host(device: VirtioDevice, source: Bytes) -> None:
    assert isinstance(device, VirtioKeyboard)
    device.press(source.byte())


def _keyboard_works(driver: Driver) -> None:
    driver.negotiate()
    ring = driver.queue(1, 8)
    driver.go()
    buffer = ring.add([bytes(8)], [])
    driver.kick(1)
    assert ring.poll() == [buffer]


def _make_scsi(engine: Engine) -> VirtioScsi:
    host = VirtioScsi("scsi", engine.ram, engine.workers)
    host.plug(MemoryDisk(), "one", 0)
    return host


def _scsi_host(device: VirtioDevice, source: Bytes) -> None:
    assert isinstance(device, VirtioScsi)
    target = 1 + source.byte() % 3
    if target in device.disks:
        if source.byte() & 1:
            device.resized(target)
        else:
            device.unplug(target)
    else:
        device.plug(MemoryDisk(), "more", target)


def _scsi_request(cdb: bytes, target: int = 0) -> bytes:
    header = struct.pack("<8sQBBB", bytes((1, target, 0x40, 0, 0, 0, 0, 0)), 1, 0, 0, 0)
    return header + cdb.ljust(32, b"\0")


def _scsi_works(driver: Driver) -> None:
    driver.negotiate()
    for index in range(3):
        driver.queue(index, 8)
    driver.go()
    buffer = driver.rings[2].add([_scsi_request(bytes((0x12, 0, 0, 0, 36)))], [108, 36])
    driver.kick(2)
    assert driver.rings[2].poll() == [buffer] and buffer.written == 144


def _targets() -> dict[str, Target]:
    return {
        "block": Target(
            lambda e: VirtioBlock("disk", e.ram, e.workers, MemoryDisk(), queues=2, queue_size=16),
            [struct.pack("<IIQ", kind, 0, sector) for kind in (0, 1, 4, 8, 11, 13)
             for sector in (0, 5, 127, 128, (1 << 64) - 1)]
            + [struct.pack("<IIQQII", kind, 0, 0, 1, 8, 1) for kind in (11, 13)],
            healthy=_block_works,
        ),
        "rng": Target(
            lambda e: VirtioRng("rng", e.ram, e.workers, bytes), [b"", b"x"], healthy=_rng_works
        ),
        "console": Target(
            lambda e: VirtioConsole(
                "console", e.ram, e.workers,
                [Port("", Endpoint(), console=True), Port("org.test", Endpoint())],
            ),
            [struct.pack("<IHH", port, event, 1) for port in (0, 1, 2) for event in range(8)]
            + [b"text" * 100],
            _console_host,
            _console_works,
        ),
        "net": Target(
            lambda e: VirtioNet("net", e.ram, e.workers, bytes(6), Wire(), queue_size=16),
            [bytes(12) + bytes(60), bytes(12), bytes(2000), b"\3\0", b"\1\0"],
            _net_host,
            _net_works,
        ),
        "keyboard": Target(
            lambda e: VirtioKeyboard("keyboard", e.ram, e.workers),
            [b"", bytes(8)],
            _keyboard_host,
            _keyboard_works,
        ),
        "balloon": Target(
            lambda e: VirtioBalloon("balloon", e.ram, e.workers),
            [struct.pack("<3I", 0x80020, 0x8003F, 0x80040), struct.pack("<HQ", 4, 5) * 3, b"x"],
            _balloon_host,
            _balloon_works,
        ),
        "scsi": Target(
            _make_scsi,
            [_scsi_request(bytes((opcode, flags, page, 0, 0, 5, 0, 0, 2, 0, 0, 0, 0, 2)), target)
             for opcode in (0, 3, 8, 10, 18, 26, 37, 40, 42, 47, 53, 65, 66, 90, 136, 138, 143,
                            147, 158, 160, 168, 170)
             for flags, page, target in ((0, 0, 0), (1, 0x80, 0), (8, 8, 0), (0x10, 0xB0, 0),
                                         (1, 0x83, 1), (2, 0x3F, 0))]
            + [struct.pack("<II8sQ", 0, subtype, b"\1\0\x40\0\0\0\0\0", 1) for subtype in (0, 5, 9)]
            + [struct.pack("<I8sI", 1, b"\1\0\x40\0\0\0\0\0", 0)],
            _scsi_host,
            _scsi_works,
        ),
    }  # fmt: skip


def target(name: str) -> Target:
    """A fresh device of this name."""
    made = _targets()[name]
    made.build()
    return made


NAMES = tuple(_targets())

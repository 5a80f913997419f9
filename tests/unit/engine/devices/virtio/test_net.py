"""The network device and its segments; the other end of a stream is QEMU's device."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.engine.devices.driver import EVENT_IDX, PACKED, Buffer, Driver, Memory
from tests.unit.engine.devices.machines import Engine, Qemu

from vmlab.engine.devices.virtio.net import BACKLOG, VirtioNet
from vmlab.engine.devices.virtio.segments import (
    DatagramSegment,
    MulticastSegment,
    StreamSegment,
    TapSegment,
)
from vmlab.machine.errors import VmlabError

MTU, MAC, MRG, STATUS, CTRL, ANNOUNCE = 3, 5, 15, 16, 17, 21
ADDRESS = bytes.fromhex("525400123456")
FRAME = b"\xff" * 6 + ADDRESS + b"\x08\x00" + b"payload" * 20


class Wire:
    """A segment in memory."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.open = True
        self.resumed = 0
        self.closed = False

    def attach(self, device: VirtioNet) -> None:
        self.device = device

    def send(self, frame: bytes) -> bool:
        if self.open:
            self.sent.append(frame)
        return self.open

    def resume(self) -> None:
        self.resumed += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def wire(engine: Engine) -> Wire:
    wire = Wire()
    engine.plug(lambda e: VirtioNet("net", e.ram, e.workers, ADDRESS, wire, mtu=1400))
    return wire


@pytest.fixture
def driver(engine: Engine, wire: Wire) -> Driver:
    return Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))


def up(driver: Driver, *features: int) -> Driver:
    driver.negotiate(*features)
    driver.queue(0)
    driver.queue(1)
    if CTRL in features:
        driver.queue(2)
    driver.go()
    return driver


def packet(driver: Driver, buffers: list[Buffer]) -> bytes:
    return b"".join(driver.rings[0].data(buffer) for buffer in buffers)


def test_the_configuration_has_address_status_and_mtu(driver: Driver, wire: Wire) -> None:
    up(driver, MAC, STATUS, MTU)
    assert driver.config(0, 6) == ADDRESS
    assert struct.unpack("<HHH", driver.config(6, 6)) == (1, 1, 1400)
    wire.device.set_link(False)
    assert driver.interrupt() == 2
    assert driver.config(6, 2) == b"\0\0"


@pytest.mark.parametrize("features", [(), (MRG,), (MRG, PACKED, EVENT_IDX)])
def test_frames_go_both_ways(driver: Driver, wire: Wire, features: tuple[int]) -> None:
    up(driver, *features)
    driver.rings[1].add([bytes(12), FRAME], [])
    driver.rings[1].add([bytes(12) + FRAME[:60]], [])
    driver.kick(1)
    assert len(driver.wait(1, 2)) == 2
    assert wire.sent == [FRAME, FRAME[:60]]
    for _ in range(3):
        driver.rings[0].add([], [12, 1600])
    driver.kick(0)
    for size in (60, 154):
        wire.device.arrived(FRAME[:size])
        got = packet(driver, driver.wait(0))
        assert got == struct.pack("<10xH", 1) + FRAME[:size]
    assert wire.device.counters.received == 2
    assert wire.device.counters.sent_bytes == len(FRAME) + 60


def test_a_large_frame_is_spread_over_mergeable_buffers(driver: Driver, wire: Wire) -> None:
    up(driver, MRG)
    frame = bytes(n % 251 for n in range(1000))
    buffers = [driver.rings[0].add([], [256]) for _ in range(3)]
    driver.kick(0)
    wire.device.arrived(frame)
    assert driver.rings[0].poll() == [], "three buffers do not hold it, so none is taken"
    buffers += [driver.rings[0].add([], [256]) for _ in range(3)]
    driver.kick(0)
    done = driver.wait(0, 4)
    assert done == buffers[:4], "in the order in which they were made available"
    assert packet(driver, done) == struct.pack("<10xH", 4) + frame


def test_without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped(
    driver: Driver, wire: Wire
) -> None:
    up(driver)
    driver.rings[0].add([], [100])
    driver.kick(0)
    wire.device.arrived(bytes(500))
    assert driver.wait(0)[0].written == 0
    assert wire.device.counters.dropped == 1


def test_frames_wait_for_buffers_up_to_a_limit(driver: Driver, wire: Wire) -> None:
    up(driver, MRG)
    for number in range(BACKLOG + 10):
        wire.device.arrived(struct.pack(">I", number) * 15)
    assert wire.device.full
    assert wire.device.counters.dropped == 10
    for number in range(BACKLOG):
        driver.rings[0].add([], [1600])
        driver.kick(0)
        got = packet(driver, driver.wait(0))
        assert got[12:16] == struct.pack(">I", number)
    assert wire.resumed == 1


def test_a_full_wire_makes_the_guest_wait(driver: Driver, wire: Wire) -> None:
    up(driver)
    wire.open = False
    driver.rings[1].add([bytes(12) + FRAME], [])
    driver.kick(1)
    assert driver.rings[1].poll() == []
    wire.open = True
    wire.device.resume()
    assert len(driver.rings[1].poll()) == 1
    assert wire.sent == [FRAME]


def test_frames_that_are_none_are_dropped(driver: Driver, wire: Wire) -> None:
    up(driver)
    driver.rings[1].add([bytes(12)], [])
    driver.rings[1].add([bytes(5)], [])
    driver.rings[1].add([bytes(12 + 65_551)], [])
    driver.kick(1)
    assert len(driver.wait(1, 3)) == 3
    assert wire.sent == []
    assert wire.device.counters.dropped == 3
    wire.device.arrived(bytes(65_551))
    wire.device.set_link(False)
    wire.device.arrived(FRAME)
    driver.rings[1].add([bytes(12) + FRAME], [])
    driver.kick(1)
    assert wire.device.counters.dropped == 6
    assert wire.sent == []


def test_the_guest_is_asked_to_announce_itself(driver: Driver, wire: Wire) -> None:
    up(driver, STATUS, CTRL, ANNOUNCE)
    wire.device.announce()
    assert driver.interrupt() == 2
    assert driver.config(6, 2) == b"\3\0"
    answer = driver.rings[2].add([b"\3\0"], [1])
    driver.kick(2)
    driver.wait(2)
    assert driver.rings[2].data(answer) == b"\0"
    assert driver.config(6, 2) == b"\1\0"
    unknown = driver.rings[2].add([b"\7\0", b"data"], [1])
    driver.kick(2)
    driver.wait(2)
    assert driver.rings[2].data(unknown) == b"\1"


def settle(engine: Engine) -> None:
    while engine.reactor.poll(0):
        pass


def joined(engine: Engine, path: Path) -> StreamSegment:
    """QEMU binds its socket early and listens late."""
    until = time.monotonic() + 250
    while True:
        try:
            return StreamSegment.connect(engine.reactor, path)
        except VmlabError:
            assert time.monotonic() < until


@pytest.mark.parametrize("server", [True, False])
def test_a_stream_joins_a_machine_here_and_one_on_qemu(
    engine: Engine, qemu: Callable[..., Qemu], short_path: Path, server: bool
) -> None:
    path = short_path / "segment"
    side = "off" if server else "on"
    arguments = [
        "-netdev", f"stream,id=n,server={side},addr.type=unix,addr.path={path}",
        "-device", "virtio-net-device,netdev=n,bus=virtio-mmio-bus.0,mac=52:54:00:00:00:02",
    ]  # fmt: skip
    if server:
        segment = StreamSegment.serve(engine.reactor, path)
        theirs = qemu(*arguments)
    else:
        theirs = qemu(*arguments)
        segment = joined(engine, path)
    while not segment.connected:
        engine.reactor.poll(60)
    engine.plug(lambda e: VirtioNet("net", e.ram, e.workers, ADDRESS, segment))
    settle(engine)
    memory = (0x8010_0000, 0x8080_0000)
    here = up(Driver(engine, 0, Memory(*memory)), MRG, STATUS)
    there = up(Driver(theirs, 0, Memory(*memory)), MRG, STATUS)
    assert here.config(6, 2) == b"\1\0"
    for driver in (here, there):
        for _ in range(8):
            driver.rings[0].add([], [2048])
        driver.kick(0)
    for number in range(5):
        frame = b"\xff" * 6 + ADDRESS + struct.pack(">HI", 0x0800, number) + bytes(50 + number)
        here.rings[1].add([bytes(12), frame], [])
        here.kick(1)
        here.wait(1)
        assert packet(there, there.wait(0))[12:] == frame
        there.rings[1].add([bytes(12) + frame[::-1]], [])
        there.kick(1)
        there.wait(1)
        while not (done := here.rings[0].poll()):
            engine.reactor.poll(60)
        assert packet(here, done)[12:] == frame[::-1]
        for driver in (here, there):
            driver.rings[0].add([], [2048])
            driver.kick(0)


def test_when_the_other_end_leaves_the_link_goes_down(engine: Engine, short_path: Path) -> None:
    path = short_path / "segment"
    segment = StreamSegment.serve(engine.reactor, path)
    engine.plug(lambda e: VirtioNet("net", e.ram, e.workers, ADDRESS, segment))
    driver = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), STATUS, MRG)
    assert driver.config(6, 2) == b"\0\0"
    driver.rings[1].add([bytes(12) + FRAME], [])
    driver.kick(1)
    assert len(driver.rings[1].poll()) == 1, "lost, as on a wire that is not plugged in"
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
            settle(engine)
            assert driver.config(6, 2) == b"\1\0"
            # A frame in two pieces, and one that is too long to be one.
            whole = struct.pack(">I", 60) + bytes(60)
            driver.rings[0].add([], [2048])
            driver.kick(0)
            peer.sendall(whole[:30])
            settle(engine)
            assert driver.rings[0].poll() == []
            peer.sendall(whole[30:])
            settle(engine)
            assert driver.wait(0)[0].written == 72
            peer.sendall(struct.pack(">I", 1 << 30))
            settle(engine)
            assert driver.config(6, 2) == b"\0\0"
    with pytest.raises(VmlabError, match="cannot be opened"):
        StreamSegment.serve(engine.reactor, path)
    with pytest.raises(VmlabError, match="nobody listens"):
        StreamSegment.connect(engine.reactor, short_path / "none")
    segment.close()
    assert not path.exists()


def test_a_stream_waits_for_a_guest_that_has_no_buffers(engine: Engine, short_path: Path) -> None:
    path = short_path / "segment"
    segment = StreamSegment.serve(engine.reactor, path)
    device = VirtioNet("net", engine.ram, engine.workers, ADDRESS, segment)
    engine.board.plug(device)
    driver = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), MRG)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        settle(engine)
        count = 40 * BACKLOG
        frames = b"".join(
            struct.pack(">I", 60) + struct.pack(">I", number) * 15 for number in range(count)
        )
        sender = threading.Thread(target=peer.sendall, args=[frames])
        sender.start()
        memory = driver.memory.next
        for number in range(count):
            driver.memory.next = memory
            driver.rings[0].add([], [128])
            driver.kick(0)
            while not (done := driver.rings[0].poll()):
                engine.reactor.poll(60)
            assert packet(driver, done)[12:16] == struct.pack(">I", number)
        sender.join()
    assert device.counters.dropped == 0


def test_a_peer_that_does_not_read_makes_the_guest_wait(engine: Engine, short_path: Path) -> None:
    path = short_path / "segment"
    segment = StreamSegment.serve(engine.reactor, path)
    device = VirtioNet("net", engine.ram, engine.workers, ADDRESS, segment)
    engine.board.plug(device)
    memory = Memory(0x8010_0000, 0x8080_0000)
    driver = up(Driver(engine, 0, memory))
    frame = bytes(60_000)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(250)
        peer.connect(str(path))
        settle(engine)
        start, sent = memory.next, 0
        while True:
            memory.next = start
            driver.rings[1].add([bytes(12) + frame], [])
            driver.kick(1)
            sent += 1
            if not driver.rings[1].poll():
                break
            assert sent < 1000
        got = 0
        while got < sent * 60_004:
            settle(engine)
            got += len(peer.recv(1 << 20))
        assert len(driver.rings[1].poll()) == 1


def test_datagrams_join_two_machines_here(engine: Engine, short_path: Path) -> None:
    other = Engine()
    ends = []
    for machine, mine, yours in ((engine, "a", "b"), (other, "b", "a")):
        segment = DatagramSegment(machine.reactor, short_path / mine, short_path / yours)
        machine.plug(
            lambda e, segment=segment: VirtioNet("net", e.ram, e.workers, ADDRESS, segment)
        )
        ends.append(up(Driver(machine, 0, Memory(0x8010_0000, 0x8080_0000)), MRG))
    ends[1].rings[0].add([], [2048])
    ends[1].kick(0)
    ends[0].rings[1].add([bytes(12) + FRAME], [])
    ends[0].kick(1)
    ends[0].wait(1)
    settle(other)
    assert packet(ends[1], ends[1].wait(0))[12:] == FRAME
    with pytest.raises(VmlabError, match="cannot be opened"):
        DatagramSegment(engine.reactor, short_path / "a", short_path / "c")
    other.close()
    assert not (short_path / "b").exists()
    ends[0].rings[1].add([bytes(12) + FRAME], [])
    ends[0].kick(1)
    assert len(ends[0].wait(1)) == 1, "sent to nobody: lost"


def test_a_multicast_segment_has_any_number_of_members_also_on_qemu(
    engine: Engine, qemu: Callable[..., Qemu]
) -> None:
    random = os.urandom(5)
    port = 20_000 + int.from_bytes(random[3:]) % 40_000
    group = f"239.{random[0]}.{random[1]}.{random[2]}:{port}"
    other = Engine()
    theirs = qemu(
        *("-netdev", f"socket,id=n,mcast={group},localaddr=127.0.0.1"),
        *("-device", "virtio-net-device,netdev=n,bus=virtio-mmio-bus.0"),
    )
    members = [up(Driver(theirs, 0, Memory(0x8010_0000, 0x8080_0000)), MRG)]
    for machine in (engine, other):
        segment = MulticastSegment(machine.reactor, group)
        machine.plug(
            lambda e, segment=segment: VirtioNet("net", e.ram, e.workers, ADDRESS, segment)
        )
        members.append(up(Driver(machine, 0, Memory(0x8010_0000, 0x8080_0000)), MRG))
    for member in members:
        member.rings[0].add([], [2048])
        member.kick(0)
    for number, sender in enumerate(members):
        sent = FRAME + bytes((number,))
        sender.rings[1].add([bytes(12) + sent], [])
        sender.kick(1)
        sender.wait(1)
        for member, machine in zip(members, (None, engine, other), strict=True):
            # QEMU's own come back to it (net/socket.c); ours do not come back to us.
            if member is sender and machine is not None:
                continue
            while not (done := member.rings[0].poll()):
                if machine is not None:
                    machine.reactor.poll(60)
            assert packet(member, done)[12:] == sent
            member.rings[0].add([], [2048])
            member.kick(0)
    for member, machine in zip(members[1:], (engine, other), strict=True):
        settle(machine)
        assert not member.rings[0].poll()
    other.close()


@pytest.mark.parametrize("group", ["", "239.1.2.3", "10.0.0.1:20000", "239.1.2.3:70000", "a:b"])
def test_what_is_no_multicast_group_is_refused(engine: Engine, group: str) -> None:
    with pytest.raises(VmlabError, match="no multicast group"):
        MulticastSegment(engine.reactor, group)


def test_a_tap_that_cannot_be_had_is_named(engine: Engine) -> None:
    for name in ("", "x" * 16):
        with pytest.raises(VmlabError, match="no name of a network interface"):
            TapSegment(engine.reactor, name)


def test_a_tap_carries_frames(engine: Engine) -> None:
    try:
        segment = TapSegment(engine.reactor, "vmlabtest%d")
    except VmlabError as error:
        assert "ip tuntap add" in (error.hint or "")
        pytest.skip("needs the right to make a tap (CAP_NET_ADMIN)")
    engine.plug(lambda e: VirtioNet("net", e.ram, e.workers, ADDRESS, segment))
    driver = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), MRG)
    driver.rings[1].add([bytes(12) + FRAME], [])
    driver.kick(1)
    assert len(driver.wait(1)) == 1, "the interface is down: the frame is lost and that is all"


def test_datagrams_join_a_machine_here_and_one_on_qemu(
    engine: Engine, qemu: Callable[..., Qemu], short_path: Path
) -> None:
    here_path, there_path = short_path / "here", short_path / "there"
    segment = DatagramSegment(engine.reactor, here_path, there_path)
    engine.plug(lambda e: VirtioNet("net", e.ram, e.workers, ADDRESS, segment))
    theirs = qemu(
        "-netdev", f"dgram,id=n,local.type=unix,local.path={there_path},"
        f"remote.type=unix,remote.path={here_path}",
        "-device", "virtio-net-device,netdev=n,bus=virtio-mmio-bus.0",
    )  # fmt: skip
    here = up(Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000)), MRG)
    there = up(Driver(theirs, 0, Memory(0x8010_0000, 0x8080_0000)), MRG)
    for driver in (here, there):
        driver.rings[0].add([], [2048])
        driver.kick(0)
    here.rings[1].add([bytes(12), FRAME], [])
    here.kick(1)
    assert packet(there, there.wait(0))[12:] == FRAME
    there.rings[1].add([bytes(12), FRAME[::-1]], [])
    there.kick(1)
    there.wait(1)
    while not (done := here.rings[0].poll()):
        engine.reactor.poll(60)
    assert packet(here, done)[12:] == FRAME[::-1]

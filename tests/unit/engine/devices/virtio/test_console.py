"""The console device: ports, control messages, bytes; the control dialogue on QEMU's as well."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.engine.devices.driver import PACKED, Buffer, Driver, Memory
from tests.unit.engine.devices.machines import Engine, Qemu

from vmlab.engine.devices.channel import SocketChannel
from vmlab.engine.devices.virtio.console import Port, VirtioConsole

SIZE, MULTIPORT, EMERGENCY = 0, 1, 2
READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = range(8)


class Pipe:
    """An endpoint in memory."""

    def __init__(self) -> None:
        self.port: Port | None = None
        self.connected = True
        self.sent = bytearray()
        self.waiting = bytearray()
        self.room = 1 << 30
        self.closed = False

    def attach(self, port: Port) -> None:
        self.port = port

    def send(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.sent += taken
        return len(taken)

    def receive(self, size: int) -> bytes:
        data = bytes(self.waiting[:size])
        del self.waiting[: len(data)]
        return data

    def close(self) -> None:
        self.closed = True

    def type(self, data: bytes) -> None:
        self.waiting += data
        assert self.port is not None
        self.port.arrived()


class Dialogue:
    """The driver's part of 5.3.6.2: buffers for control messages, and what they said."""

    def __init__(self, driver: Driver, *features: int) -> None:
        self.driver = driver
        driver.negotiate(MULTIPORT, *features)
        for index in range(6):
            driver.queue(index)
        driver.go()
        for _ in range(12):
            driver.rings[2].add([], [64])
        driver.kick(2)
        self.heard: deque[tuple[int, int, int, bytes]] = deque()

    def say(self, port: int, event: int, value: int) -> None:
        self.driver.rings[3].add([struct.pack("<IHH", port, event, value)], [])
        self.driver.kick(3)
        self.driver.wait(3)

    def hear(self, count: int) -> list[tuple[int, int, int, bytes]]:
        while len(self.heard) < count:
            for buffer in self.driver.wait(2):
                data = self.driver.rings[2].data(buffer)
                self.heard.append((*struct.unpack_from("<IHH", data), data[8:]))
                self.driver.rings[2].add([], [64])
        self.driver.kick(2)
        return [self.heard.popleft() for _ in range(count)]

    def open(self) -> None:
        self.say(0xFFFF_FFFF, READY, 1)
        assert sorted(self.hear(2)) == [(0, ADD, 1, b""), (1, ADD, 1, b"")]
        self.say(0, PORT_READY, 1)
        self.say(1, PORT_READY, 1)


@pytest.fixture
def pipes(engine: Engine) -> list[Pipe]:
    pipes = [Pipe(), Pipe()]
    ports = [Port("", pipes[0], console=True), Port("org.test.channel", pipes[1])]
    engine.plug(lambda e: VirtioConsole("console", e.ram, e.workers, ports, columns=80, rows=25))
    return pipes


@pytest.fixture
def own(engine: Engine, pipes: list[Pipe]) -> Driver:
    return Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))


def test_the_dialogue_with_the_driver_is_qemus(
    engine: Engine, own: Driver, qemu: Callable[..., Qemu], short_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as console, socket.socket(socket.AF_UNIX) as port:
        console.bind(str(short_path / "a"))
        port.bind(str(short_path / "b"))
        console.listen()
        port.listen()
        theirs = qemu(
            "-chardev", f"socket,id=a,path={short_path}/a",
            "-chardev", f"socket,id=b,path={short_path}/b",
            "-device", "virtio-serial-device,bus=virtio-mmio-bus.0,max_ports=2",
            "-device", "virtconsole,chardev=a,nr=0",
            "-device", "virtserialport,chardev=b,nr=1,name=org.test.channel",
        )  # fmt: skip
        far = [console.accept()[0], port.accept()[0]]
        said = []
        for driver in (own, Driver(theirs, 0, Memory(0x8010_0000, 0x8080_0000))):
            dialogue = Dialogue(driver)
            dialogue.open()
            heard = dialogue.hear(4)
            said.append({(p, event, value, text.rstrip(b"\0")) for p, event, value, text in heard})
        for connection in far:
            connection.close()
    assert (
        said[0]
        == said[1]
        == {
            (0, CONSOLE, 1, b""),
            (0, OPEN, 1, b""),
            (1, NAME, 1, b"org.test.channel"),
            (1, OPEN, 1, b""),
        }
    )


@pytest.mark.parametrize("features", [(), (PACKED,)])
def test_bytes_go_both_ways(own: Driver, pipes: list[Pipe], features: tuple[int]) -> None:
    dialogue = Dialogue(own, *features)
    dialogue.open()
    dialogue.hear(4)
    dialogue.say(1, OPEN, 1)
    own.rings[5].add([b"from ", b"guest"], [])
    own.kick(5)
    assert own.wait(5)[0].written == 0
    assert pipes[1].sent == b"from guest"
    pipes[1].type(b"to guest, more than one buffer")
    buffers = [own.rings[4].add([], [10, 5]) for _ in range(3)]
    own.kick(4)
    done = own.wait(4, 2)
    assert b"".join(own.rings[4].data(buffer) for buffer in done) == (
        b"to guest, more than one buffer"
    )
    assert done == buffers[:2]
    pipes[1].type(b"!")
    assert own.rings[4].data(own.wait(4)[0]) == b"!"
    own.rings[1].add([b"login: "], [])
    own.kick(1)
    assert pipes[0].sent == b"login: "


def test_bytes_for_a_port_that_is_not_open_wait(own: Driver, pipes: list[Pipe]) -> None:
    dialogue = Dialogue(own)
    dialogue.open()
    dialogue.hear(4)
    own.rings[4].add([], [16])
    own.kick(4)
    pipes[1].type(b"early")
    assert own.rings[4].poll() == []
    dialogue.say(1, OPEN, 1)
    assert own.rings[4].data(own.wait(4)[0]) == b"early"
    assert pipes[1].port is not None and pipes[1].port.state.guest_open
    dialogue.say(1, OPEN, 0)
    own.rings[4].add([], [16])
    own.kick(4)
    pipes[1].type(b"late")
    assert own.rings[4].poll() == []


def test_a_guest_that_is_faster_than_its_reader_waits_and_loses_nothing(
    own: Driver, pipes: list[Pipe]
) -> None:
    dialogue = Dialogue(own)
    dialogue.open()
    dialogue.hear(4)
    pipes[1].room = 7
    own.rings[5].add([b"abc", b"defghij"], [])
    own.rings[5].add([b"klm"], [])
    own.kick(5)
    assert own.rings[5].poll() == []
    assert pipes[1].sent == b"abcdefg"
    pipes[1].room = 1
    assert pipes[1].port is not None
    pipes[1].port.resume()
    assert own.rings[5].poll() == []
    pipes[1].room = 100
    pipes[1].port.resume()
    assert len(own.rings[5].poll()) == 2
    assert pipes[1].sent == b"abcdefghijklm"


def test_what_is_sent_to_nobody_is_the_endpoint_s_to_drop(own: Driver, pipes: list[Pipe]) -> None:
    """It may have a log, or somebody who reads along."""
    dialogue = Dialogue(own)
    pipes[1].connected = False
    dialogue.open()
    heard = dialogue.hear(3)
    assert (1, OPEN, 1, b"") not in heard
    own.rings[5].add([b"lost"], [])
    own.kick(5)
    assert len(own.wait(5)) == 1
    assert pipes[1].sent == b"lost"
    pipes[1].connected = True
    assert pipes[1].port is not None
    pipes[1].port.connection_changed()
    assert dialogue.hear(1) == [(1, OPEN, 1, b"")]
    pipes[1].connected = False
    pipes[1].port.connection_changed()
    assert dialogue.hear(1) == [(1, OPEN, 0, b"")]


def test_the_size_of_the_console_is_told(own: Driver, engine: Engine) -> None:
    dialogue = Dialogue(own, SIZE)
    dialogue.open()
    dialogue.hear(4)
    assert struct.unpack("<HHI", own.config(0, 8)) == (80, 25, 2)
    device = next(iter(engine.board.devices()))
    assert isinstance(device, VirtioConsole)
    device.resize(132, 43)
    assert struct.unpack("<HH", own.config(0, 4)) == (132, 43)
    assert dialogue.hear(1) == [(0, RESIZE, 0, struct.pack("<HH", 43, 132))]


def test_without_multiport_there_is_one_console(own: Driver, pipes: list[Pipe]) -> None:
    own.negotiate()
    own.queue(0)
    own.queue(1)
    own.go()
    own.rings[0].add([], [16])
    own.kick(0)
    pipes[0].type(b"typed")
    assert own.rings[0].data(own.wait(0)[0]) == b"typed"
    own.rings[1].add([b"printed"], [])
    own.kick(1)
    assert pipes[0].sent == b"printed"


def test_the_emergency_console_needs_no_driver(own: Driver, pipes: list[Pipe]) -> None:
    assert own.offered() >> EMERGENCY & 1
    own.machine.write(own.base + 0x108, 4, ord("!"))
    assert pipes[0].sent == b"!"


def test_a_reset_closes_all_ports(own: Driver, pipes: list[Pipe]) -> None:
    dialogue = Dialogue(own)
    dialogue.open()
    dialogue.hear(4)
    dialogue.say(1, OPEN, 1)
    own.write(0x070, 0)
    assert pipes[1].port is not None
    assert not pipes[1].port.state.guest_open
    dialogue = Dialogue(own)
    dialogue.open()
    assert len(dialogue.hear(4)) == 4


def test_nonsense_on_the_control_queue_is_ignored(own: Driver) -> None:
    dialogue = Dialogue(own)
    for message in (b"", b"abc", struct.pack("<IHH", 99, PORT_READY, 1), bytes(2000)):
        own.rings[3].add([message], [])
        own.kick(3)
        own.wait(3)
    dialogue.open()
    assert len(dialogue.hear(4)) == 4


def test_a_socket_is_an_endpoint(engine: Engine, short_path: Path) -> None:
    channel = SocketChannel(engine.reactor, short_path / "c")
    port = Port("org.test.socket", channel)
    engine.plug(lambda e: VirtioConsole("console", e.ram, e.workers, [port]))
    driver = Driver(engine, 0, Memory(0x8010_0000, 0x8080_0000))
    driver.negotiate(MULTIPORT)
    for index in range(4):
        driver.queue(index)
    driver.go()
    buffers: list[Buffer] = [driver.rings[2].add([], [64]) for _ in range(8)]
    driver.kick(2)
    for event in (PORT_READY, OPEN):
        driver.rings[3].add([struct.pack("<IHH", 0, event, 1)], [])
        driver.kick(3)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(250)
        client.connect(str(short_path / "c"))
        while engine.reactor.poll(0):
            pass
        told = [driver.rings[2].data(buffer) for buffer in driver.wait(2, 2)]
        assert told == [
            struct.pack("<IHH", 0, NAME, 1) + b"org.test.socket\0",
            struct.pack("<IHH", 0, OPEN, 1),
        ]
        assert len(buffers) == 8
        driver.rings[0].add([], [64])
        driver.kick(0)
        client.sendall(b"question")
        while engine.reactor.poll(0):
            pass
        assert driver.rings[0].data(driver.wait(0)[0]) == b"question"
        driver.rings[1].add([b"answer"], [])
        driver.kick(1)
        assert client.recv(100) == b"answer"

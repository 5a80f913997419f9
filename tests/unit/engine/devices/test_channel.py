"""Sockets of consoles and channels, and the thread that waits for them."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmlab.engine.devices.channel import SocketChannel, UartChannel
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.devices.uart import Uart
from vmlab.machine.errors import VmlabError


class Ear:
    """Notes what a channel tells."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def arrived(self) -> None:
        self.told.append("arrived")

    def resume(self) -> None:
        self.told.append("resume")

    def connection_changed(self) -> None:
        self.told.append("connection")


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    def failed(error: BaseException) -> None:
        raise error

    made = Reactor(failed)
    yield made
    made.close()


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(250)
    client.connect(str(path))
    return client


def settle(reactor: Reactor) -> None:
    while reactor.poll(0):
        pass


def test_one_client_at_a_time_talks_with_the_machine(reactor: Reactor, short_path: Path) -> None:
    log = io.BytesIO()
    channel = SocketChannel(reactor, short_path / "c", log)
    ear = Ear()
    channel.attach(ear)
    assert (short_path / "c").stat().st_mode & 0o777 == 0o600
    assert channel.send(b"nobody hears this") == 17
    with connect(short_path / "c") as first, connect(short_path / "c") as second:
        settle(reactor)
        assert channel.connected
        assert ear.told == ["connection"]
        first.sendall(b"hello")
        second.sendall(b"later")
        settle(reactor)
        assert ear.told == ["connection", "arrived"]
        assert channel.receive(3) + channel.receive(100) + channel.receive(100) == b"hello"
        assert channel.send(b"answer") == 6
        assert first.recv(100) == b"answer"
        first.close()
        settle(reactor)
        assert channel.receive(100) == b"later"
        assert channel.connected
    settle(reactor)
    assert not channel.connected
    channel.close()
    assert not (short_path / "c").exists()
    assert log.getvalue() == b"nobody hears thisanswer"


def test_what_is_for_one_client_is_not_given_to_the_next(
    reactor: Reactor, short_path: Path
) -> None:
    channel = SocketChannel(reactor, short_path / "c")
    with connect(short_path / "c") as first, connect(short_path / "c") as second:
        settle(reactor)
        assert channel.number == 1
        assert channel.send(b"one", 1) == 3
        assert first.recv(100) == b"one"
        first.close()
        second.sendall(b"mine")
        settle(reactor)
        assert channel.number == 2
        assert channel.receive(100, 1) == b""
        assert channel.send(b"late", 1) == 4
        assert channel.send(b"two", 2) == 3
        assert second.recv(100) == b"two"
        assert channel.receive(100, 2) == b"mine"
    channel.close()


def test_a_log_that_cannot_be_written_is_given_up_and_the_guest_goes_on(
    reactor: Reactor, short_path: Path
) -> None:
    with Path("/dev/full").open("wb", buffering=0) as log:
        channel = SocketChannel(reactor, short_path / "c", log)
        assert channel.send(b"text") == 4
        assert "No space left" in channel.log_error
        assert channel.send(b"more") == 4
        channel.close()


def test_a_client_that_does_not_read_makes_the_guest_wait(
    reactor: Reactor, short_path: Path
) -> None:
    channel = SocketChannel(reactor, short_path / "c")
    ear = Ear()
    channel.attach(ear)
    client = connect(short_path / "c")
    settle(reactor)
    sent = 0
    while taken := channel.send(b"x" * 65536):
        sent += taken
        if taken < 65536:
            break
    assert channel.send(b"y") == 0
    ear.told.clear()
    got = 0
    client.setblocking(False)
    while "resume" not in ear.told:
        try:
            got += len(client.recv(1 << 20))
        except BlockingIOError:
            pass
        settle(reactor)
    client.setblocking(True)
    while got < sent:
        settle(reactor)
        got += len(client.recv(1 << 20))
    assert got == sent
    assert channel.send(b"z") == 1
    client.close()
    channel.close()


def test_a_guest_that_does_not_read_makes_the_client_wait(
    reactor: Reactor, short_path: Path
) -> None:
    channel = SocketChannel(reactor, short_path / "c")
    client = connect(short_path / "c")
    client.setblocking(False)
    sent = stalled = 0
    while stalled < 3:
        try:
            sent += client.send(b"x" * 65536)
            stalled = 0
        except BlockingIOError:
            stalled += not reactor.poll(0)
    assert sent < 8 << 20
    got = 0
    while got < sent:
        settle(reactor)
        got += len(channel.receive(1 << 20))
    client.close()
    settle(reactor)
    channel.close()


def test_a_path_that_cannot_be_a_socket_is_refused(reactor: Reactor, short_path: Path) -> None:
    (short_path / "file").write_text("x")
    for path in (short_path / "file", short_path / "no" / "folder", short_path / ("x" * 200)):
        with pytest.raises(VmlabError, match="cannot be opened") as caught:
            SocketChannel(reactor, path)
        assert caught.value.hint


def test_a_uart_talks_through_its_channel(reactor: Reactor, short_path: Path) -> None:
    channel = SocketChannel(reactor, short_path / "c")
    uart = Uart(lambda level: None)
    joined = UartChannel(uart, channel)
    data = bytes(n % 251 for n in range(30000))
    with connect(short_path / "c") as client:
        client.sendall(data)
        got = bytearray()
        while len(got) < len(data):
            settle(reactor)
            while uart.read(5, 1) & 1:
                got.append(uart.read(0, 1))
        assert got == data
        for byte in b"prompt$ ":
            uart.write(0, 1, byte)
        settle(reactor)
        assert client.recv(100) == b"prompt$ "
    assert joined.dropped == 0
    channel.close()


def test_the_reactor_serves_from_its_thread_and_stops(short_path: Path) -> None:
    failures: list[BaseException] = []
    reactor = Reactor(failures.append)
    ours, theirs = socket.socketpair()
    arrived = threading.Event()
    got: list[bytes] = []

    def readable() -> None:
        got.append(ours.recv(100))
        arrived.set()
        if got[-1] == b"bad":
            raise ValueError("a mistake")

    watch = reactor.watch(ours, readable)
    watch.want(reading=False)
    reactor.start()
    reactor.start()
    theirs.sendall(b"one")
    watch.want(reading=True)
    assert arrived.wait(250)
    arrived.clear()
    reactor.stop()
    theirs.sendall(b"two")
    assert not arrived.is_set()
    reactor.start()
    assert arrived.wait(250)
    arrived.clear()
    theirs.sendall(b"bad")
    assert arrived.wait(250)
    arrived.clear()
    theirs.sendall(b"three")
    assert arrived.wait(250)
    reactor.stop()
    assert got == [b"one", b"two", b"bad", b"three"]
    assert isinstance(failures[0], ValueError)
    watch.close()
    watch.close()
    reactor.close()
    ours.close()
    theirs.close()

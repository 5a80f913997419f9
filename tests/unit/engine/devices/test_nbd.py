"""Disks served by NBD: QEMU's client is the judge, and whoever sends nonsense."""

from __future__ import annotations

import errno
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmlab.engine.devices.storage.disk import RawDisk
from vmlab.engine.devices.storage.faulty import DiskFault, DiskMishap, DiskOperation, FaultyDisk
from vmlab.engine.devices.storage.nbd import NbdExport

SIZE = 1 << 20
Served = Callable[..., tuple[FaultyDisk, Path, threading.Event]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Served]:
    """A disk, the socket that it is served at, and an event for when the client has left."""
    made: list[FaultyDisk] = []

    def start(*, read_only: bool = False) -> tuple[FaultyDisk, Path, threading.Event]:
        image = tmp_path / "image"
        if not image.exists():
            image.write_bytes(b"\x11" * SIZE)
        made.append(FaultyDisk(RawDisk(image, read_only=read_only), lambda: 0))
        left = threading.Event()
        path = tmp_path / f"{len(made)}.sock"
        NbdExport(made[-1], path, left.set).begin()
        return made[-1], path, left

    yield start
    for disk in made:
        disk.close()


def qemu_io(path: Path, *commands: str, options: tuple[str, ...] = ()) -> str:
    if shutil.which("qemu-io") is None:
        pytest.skip("needs qemu-io, of the Debian package qemu-utils")
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *options, *words, f"nbd+unix:///?socket={path}"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    return done.stdout + done.stderr


def test_qemu_reads_writes_zeroes_and_flushes(serve: Served, tmp_path: Path) -> None:
    disk, path, left = serve()
    told = qemu_io(
        path,
        "length",
        "read -P 0x11 0 1M",
        "write -P 0xab 4096 8192",
        "write -z 65536 4096",
        "write -z -u 131072 4096",
        "discard 262144 65536",
        "write -f -P 0xcd 512 512",
        "flush",
        "read -P 0xab 4096 8192",
        "read -P 0xcd 512 512",
    )
    assert "1 MiB" in told
    assert "failed" not in told, told
    assert left.wait(250)
    disk.lose_power()
    content = (tmp_path / "image").read_bytes()
    assert content[512:1024] == b"\xcd" * 512
    assert content[4096:12288] == b"\xab" * 8192
    assert content[65536:69632] == content[131072:135168] == bytes(4096)


def test_a_read_only_disk_is_one_for_its_client(serve: Served) -> None:
    _, path, left = serve(read_only=True)
    told = qemu_io(path, "read -P 0x11 0 512", options=("-r",))
    assert "read 512/512" in told
    assert left.wait(250)


def test_a_request_fails_with_the_errno_of_its_fault(serve: Served) -> None:
    disk, path, left = serve()
    full = DiskFault(DiskMishap.ERROR, [DiskOperation.WRITE], errno=errno.ENOSPC)
    disk.add("full", full)
    disk.add("bad", DiskFault(DiskMishap.ERROR, [DiskOperation.READ], errno=errno.EIO))
    told = qemu_io(path, "write 0 512", "read 0 512", "flush")
    assert "write failed: No space left on device" in told
    assert "read failed: Input/output error" in told
    assert left.wait(250)


class Client:
    """One that says what it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(250)
        self.socket.connect(str(path))

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "the server has left"
            data += part
        return data

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Ask for something before there are requests; the types and data of the replies."""
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        replies = []
        while True:
            magic, option, kind, size = struct.unpack(">QIII", self.receive(20))
            assert (magic, option) == (0x3E889045565A9, number)
            replies.append((kind, self.receive(size)))
            if kind != 3:
                return replies

    def greet(self, flags: int = 3) -> None:
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        self.socket.sendall(struct.pack(">I", flags))

    def request(self, kind: int, offset: int = 0, size: int = 0, data: bytes = b"") -> int:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, size) + data)
        magic, error, handle = struct.unpack(">IIQ", self.receive(16))
        assert (magic, handle) == (0x67446698, 7)
        return int(error)


@pytest.fixture
def connect() -> Iterator[Callable[[Path], Client]]:
    made: list[Client] = []

    def to(path: Path) -> Client:
        made.append(Client(path))
        return made[-1]

    yield to
    for client in made:
        client.socket.close()


Connect = Callable[[Path], Client]


def test_what_is_not_known_is_refused_and_the_rest_goes_on(serve: Served, connect: Connect) -> None:
    _, path, left = serve()
    client = connect(path)
    client.greet()
    assert client.option(8) == [(0x80000001, b"")]
    assert client.option(7, b"\0") == [(0x80000003, b"")]
    name = struct.pack(">IH", 0, 0)
    (export, sizes, ack) = client.option(6, name)
    assert struct.unpack(">HQH", export[1]) == (0, SIZE, 0b1101101)
    assert struct.unpack(">HIII", sizes[1]) == (3, 512, 4096, 32 << 20)
    assert ack == (1, b"")
    assert client.option(7, name)[-1] == (1, b"")
    assert client.request(0, SIZE, 512) == errno.EINVAL
    assert client.request(0, 0, 33 << 20) == errno.EINVAL
    assert client.request(9) == errno.EINVAL
    assert client.request(1, 0, 512, b"x" * 512) == 0
    client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))
    assert left.wait(250)


def test_an_old_client_names_an_export(serve: Served, connect: Connect) -> None:
    _, path, left = serve()
    client = connect(path)
    client.greet(flags=1)
    client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 0))
    assert struct.unpack(">QH", client.receive(10)) == (SIZE, 0b1101101)
    assert client.receive(124) == bytes(124)
    assert client.request(3) == 0
    client.socket.close()
    assert left.wait(250)


def test_one_that_only_looks_is_let_go(serve: Served, connect: Connect) -> None:
    _, path, left = serve()
    client = connect(path)
    client.greet()
    assert client.option(2) == [(1, b"")]
    assert left.wait(250)


def test_nobody_answers_without_power(serve: Served, connect: Connect) -> None:
    disk, path, left = serve()
    client = connect(path)
    client.greet()
    client.option(7, struct.pack(">IH", 0, 0))
    assert client.request(1, 0, 512, b"x" * 512) == 0
    disk.lose_power()
    client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 512))
    client.socket.shutdown(socket.SHUT_WR)
    assert left.wait(250)
    assert client.socket.recv(1) == b""


@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.binary(max_size=80), st.booleans())
def test_nonsense_ends_the_conversation_and_nothing_else(
    serve: Served, said: bytes, begun: bool
) -> None:
    _, path, left = serve(read_only=True)
    client = Client(path)
    with suppress(AssertionError, OSError):
        if begun:
            client.greet()
            client.option(7, struct.pack(">IH", 0, 0))
        client.socket.sendall(said)
        client.socket.shutdown(socket.SHUT_WR)
    assert left.wait(250)
    client.socket.close()

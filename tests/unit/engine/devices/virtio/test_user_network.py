"""The user network: a real passt, its addresses, ports and end."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.internet import checksum
from tests.unit.engine.devices.machines import Engine

from vmlab.engine.devices.virtio import user_network
from vmlab.engine.devices.virtio.net import VirtioNet
from vmlab.engine.devices.virtio.user_network import PortForward, UserSegment
from vmlab.machine.errors import VmlabError

MAC = bytes.fromhex("525400123456")
IPV4 = 0x0800


def dhcp_discover() -> bytes:
    """DHCPDISCOVER (RFC 2131) in UDP in IPv4 in Ethernet."""
    message = struct.pack(">BBBBIHH16s16s", 1, 1, 6, 0, 7, 0, 0, bytes(16), MAC + bytes(10))
    message += bytes(192) + bytes.fromhex("63825363") + b"\x35\1\1\xff"
    datagram = struct.pack(">HHHH", 68, 67, 8 + len(message), 0) + message
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4
    )
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    return b"\xff" * 6 + MAC + struct.pack(">H", IPV4) + header + datagram


class Wired(VirtioNet):
    """The device, keeping what arrives."""

    frames: list[bytes]

    def arrived(self, frame: bytes) -> None:
        self.frames.append(frame)


def plugged(engine: Engine, segment: UserSegment) -> Wired:
    device = Wired("net", engine.ram, engine.workers, MAC, segment)
    device.frames = []
    return device


@pytest.fixture
def segment(engine: Engine) -> Iterator[UserSegment]:
    forwards = [PortForward(80), PortForward(81), PortForward(82, protocol="udp")]
    made = UserSegment(engine.reactor, MAC, forwards)
    yield made
    made.close()


def test_the_guest_gets_qemus_addresses(engine: Engine, segment: UserSegment) -> None:
    device = plugged(engine, segment)
    assert device.own.link_up
    assert segment.send(dhcp_discover())
    while not (offers := [one for one in device.frames if one[12:14] == b"\x08\0"]):
        engine.reactor.poll(60)
    offer = offers[0][14 + 20 + 8 :]
    assert socket.inet_ntoa(offer[16:20]) == user_network.GUEST
    assert b"\3\4" + socket.inet_aton(user_network.GATEWAY) in offer[240:]


def test_free_ports_of_the_host_lead_into_the_guest(engine: Engine, segment: UserSegment) -> None:
    device = plugged(engine, segment)
    ports = [forward.host_port for forward in segment.forwards]
    assert all(ports)
    assert ports[0] != ports[1]
    for port, guest_port in zip(ports[:2], (80, 81), strict=True):
        with socket.socket() as client:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            wanted = struct.pack(">H", guest_port)
            # A SYN to the guest's port: behind Ethernet and IPv4 headers, the second two bytes.
            while not any(one[23] == 6 and one[36:38] == wanted for one in device.frames):
                engine.reactor.poll(60)


def test_it_ends_with_its_stream_however_that_ends(engine: Engine) -> None:
    segment = UserSegment(engine.reactor, MAC, [])
    device = plugged(engine, segment)
    process = segment._process
    process.kill()
    while device.own.link_up:
        engine.reactor.poll(60)
    segment.close()
    assert process.returncode is not None

    other = UserSegment(engine.reactor, MAC, [])
    other.close()
    assert other._process.returncode == 0


def test_a_port_that_is_taken_is_named(engine: Engine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(VmlabError, match=f"127.0.0.1/{port}:80") as caught:
            UserSegment(engine.reactor, MAC, [PortForward(80, port)])
        assert "free" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("forward", "what"),
    [
        (PortForward(0), "0 is no port"),
        (PortForward(80, 70_000), "70000 is no port"),
        (PortForward(80, host="localhost"), "'localhost' is no IPv4 address"),
        (PortForward(80, protocol="sctp"), "'sctp' is no protocol"),
    ],
)
def test_a_wrong_forward_is_refused(engine: Engine, forward: PortForward, what: str) -> None:
    with pytest.raises(VmlabError, match=what):
        UserSegment(engine.reactor, MAC, [forward])


def test_without_passt_it_says_what_to_install(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VmlabError, match="not installed") as caught:
        UserSegment(engine.reactor, MAC, [])
    assert "install passt" in (caught.value.hint or "")


@pytest.mark.parametrize("program", ["", "#!/bin/sh\necho no good >&2; exit 3\n"])
def test_a_passt_that_does_not_start_is_quoted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    (tmp_path / "passt").write_text(program)
    (tmp_path / "passt").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(VmlabError, match=r"does not start: (no good|.*Exec format error)"):
        UserSegment(engine.reactor, MAC, [PortForward(80)])

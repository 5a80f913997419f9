"""The messages are written out here by RFC 2131, not by the code that is tested."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.internet import checksum

from vmlab.manager.networks.dhcp import Responder, own_mac

MAC = bytes.fromhex("525400000001")
SERVER = own_mac("a" * 32)
RESPONDER = Responder(
    mac=SERVER,
    server=IPv4Interface("10.9.0.1/24"),
    leases={"52:54:00:00:00:01": ("10.9.0.2", "one")},
    dns=["10.9.0.53", "fd00::53"],
)
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)


def question(
    kind: int, options: bytes = b"", *, mac: bytes = MAC, current: bytes = bytes(4), port: int = 67
) -> bytes:
    bootp = (
        b"\x01\x01\x06\x00\xde\xad\xbe\xef\x00\x00\x00\x00"
        + current
        + bytes(12)
        + mac.ljust(16, b"\0")
        + bytes(192)
        + b"\x63\x82\x53\x63"
        + bytes([53, 1, kind])
        + options
        + b"\xff"
    )
    udp = struct.pack("!HHHH", 68, port, 8 + len(bootp), 0) + bootp
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 7, 0, 64, 17, 0, bytes(4), b"\xff" * 4
    )
    return b"\xff" * 6 + mac + b"\x08\x00" + ip + udp


def option(code: int, data: bytes) -> bytes:
    return bytes([code, len(data)]) + data


class Answer:
    """A frame of the server's, taken apart."""

    def __init__(self, frame: bytes | None) -> None:
        assert frame is not None
        self.to, self.source = frame[:6], frame[6:12]
        assert frame[12:14] == b"\x08\x00"
        ip = frame[14:]
        assert checksum(ip[:20]) == 0
        assert struct.unpack("!H", ip[2:4])[0] == len(ip)
        udp = ip[20:]
        pseudo = ip[12:20] + struct.pack("!BBH", 0, 17, len(udp))
        assert checksum(pseudo + udp) == 0
        assert struct.unpack("!HHH", udp[:6]) == (67, 68, len(udp))
        self.bootp = udp[8:]
        assert len(self.bootp) >= 300
        assert self.bootp[:8] == b"\x02\x01\x06\x00\xde\xad\xbe\xef"
        assert self.bootp[28:34] == MAC
        self.given = socket.inet_ntoa(self.bootp[16:20])
        self.options: dict[int, bytes] = {}
        rest = self.bootp[240:]
        while rest[0] != 255:
            self.options[rest[0]] = rest[2 : 2 + rest[1]]
            rest = rest[2 + rest[1] :]


def test_a_machine_that_looks_for_a_server_is_offered_its_own_address() -> None:
    answer = Answer(RESPONDER.answer(question(DISCOVER)))
    assert (answer.to, answer.source) == (b"\xff" * 6, SERVER)
    assert answer.given == "10.9.0.2"
    assert answer.options == {
        53: bytes([OFFER]),
        54: socket.inet_aton("10.9.0.1"),
        51: b"\xff" * 4,
        1: socket.inet_aton("255.255.255.0"),
        12: b"one",
        6: socket.inet_aton("10.9.0.53"),
    }


def test_a_machine_gets_what_it_was_offered() -> None:
    wanted = option(50, socket.inet_aton("10.9.0.2")) + option(54, socket.inet_aton("10.9.0.1"))
    answer = Answer(RESPONDER.answer(question(REQUEST, wanted)))
    assert answer.options[53] == bytes([ACK])
    assert answer.given == "10.9.0.2"


def test_a_machine_that_has_an_address_still_has_it() -> None:
    answer = Answer(RESPONDER.answer(question(REQUEST, current=socket.inet_aton("10.9.0.2"))))
    assert answer.options[53] == bytes([ACK])
    assert answer.bootp[12:16] == socket.inet_aton("10.9.0.2")


def test_a_machine_that_remembers_an_address_of_another_network_is_told_that_it_has_none() -> None:
    wanted = option(50, socket.inet_aton("192.168.1.7"))
    answer = Answer(RESPONDER.answer(question(REQUEST, wanted)))
    assert answer.options == {53: bytes([NAK]), 54: socket.inet_aton("10.9.0.1")}
    assert answer.given == "0.0.0.0"


def test_a_machine_with_an_address_of_its_own_is_told_the_rest() -> None:
    answer = Answer(RESPONDER.answer(question(INFORM, current=socket.inet_aton("10.9.0.2"))))
    assert answer.options[53] == bytes([ACK])
    assert 51 not in answer.options
    assert answer.given == "0.0.0.0"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        question(DISCOVER)[:100],
        question(DISCOVER, mac=bytes.fromhex("525400000002")),
        question(DISCOVER, port=69),
        question(REQUEST, option(54, socket.inet_aton("10.9.0.99"))),
        question(DECLINE),
        question(RELEASE),
        question(DISCOVER, mac=SERVER),
    ],
)
def test_what_is_no_question_of_a_machine_of_the_network_has_no_answer(frame: bytes) -> None:
    assert RESPONDER.answer(frame) is None


def arp(wanted: str, kind: int = 1) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, kind)
    sender = MAC + socket.inet_aton("10.9.0.2")
    return b"\xff" * 6 + MAC + b"\x08\x06" + head + sender + bytes(6) + socket.inet_aton(wanted)


def test_the_server_says_where_it_is_and_where_nobody_else_is() -> None:
    answer = RESPONDER.answer(arp("10.9.0.1"))
    assert answer is not None
    assert answer[:14] == MAC + SERVER + b"\x08\x06"
    assert answer[20:22] == b"\0\2"
    assert answer[22:32] == SERVER + socket.inet_aton("10.9.0.1")
    assert answer[32:42] == MAC + socket.inet_aton("10.9.0.2")
    assert RESPONDER.answer(arp("10.9.0.3")) is None
    assert RESPONDER.answer(arp("10.9.0.1", kind=2)) is None


@given(st.binary(max_size=400), st.integers(0, 400))
def test_whatever_a_guest_sends_the_server_lives_on(noise: bytes, at: int) -> None:
    RESPONDER.answer(noise)
    frame = question(DISCOVER, option(12, b"guest"))
    RESPONDER.answer(frame[:at] + noise + frame[at + len(noise) :])
    RESPONDER.answer(frame[:at])

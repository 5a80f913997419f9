"""The messages are written out here by RFC 4861 and RFC 8415, not by the code that is tested."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv6Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.internet import checksum

from vmlab.manager.networks.dhcp6 import Responder6

MAC = bytes.fromhex("525400000001")
SERVER = bytes.fromhex("02aaaaaaaaaa")
SERVER_LINK = "fe80::aa:aaff:feaa:aaaa"  # RFC 4291, appendix A: the universal/local bit is inverted
CLIENT_LINK = "fe80::5054:ff:fe00:1"
RESPONDER = Responder6(
    mac=SERVER,
    server=IPv6Interface("fd00:9::1/64"),
    leases={"52:54:00:00:00:01": "fd00:9::2"},
    dns=["10.9.0.53", "fd00:9::53"],
)
SOLICIT, ADVERTISE, REQUEST, CONFIRM, RENEW, REBIND, REPLY, RELEASE, DECLINE = range(1, 10)
INFORMATION = 11
NUMBER = b"\xab\xcd\xef"
CLIENT_ID = b"\x00\x02\x00\x00\xab\x11some-machine"
SERVER_ID = b"\x00\x03\x00\x01" + SERVER
FOREVER = b"\xff" * 4


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address)


def packet(
    kind: int, payload: bytes, *, source: str = CLIENT_LINK, mac: bytes = MAC, hops: int = 255
) -> bytes:
    ip = b"\x60\0\0\0" + struct.pack("!HBB", len(payload), kind, hops)
    return (
        b"\x33\x33\0\0\0\x02"
        + mac
        + b"\x86\xdd"
        + ip
        + packed(source)
        + packed("ff02::2")
        + payload
    )


def option(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def wanted(*addresses: str, number: int = 7) -> bytes:
    """A request for addresses (IA_NA)."""
    held = b"".join(option(5, packed(each) + bytes(8)) for each in addresses)
    return option(3, struct.pack("!III", number, 0, 0) + held)


def message(
    kind: int,
    *options: bytes,
    client: bool = True,
    server: bytes | None = None,
    mac: bytes = MAC,
    port: int = 547,
    source: str = CLIENT_LINK,
) -> bytes:
    body = bytes([kind]) + NUMBER
    body += option(1, CLIENT_ID) if client else b""
    body += option(2, server) if server is not None else b""
    body += b"".join(options)
    udp = struct.pack("!HHHH", 546, port, 8 + len(body), 0) + body
    return packet(17, udp, mac=mac, source=source)


class Answer:
    """A frame of the server's, taken apart."""

    def __init__(self, frame: bytes | None) -> None:
        assert frame is not None
        self.to, self.by = frame[:6], frame[6:12]
        assert frame[12:14] == b"\x86\xdd"
        ip = frame[14:]
        assert ip[0] >> 4 == 6
        self.payload = ip[40:]
        assert struct.unpack("!H", ip[4:6])[0] == len(self.payload)
        self.kind, self.hops = ip[6], ip[7]
        self.source = socket.inet_ntop(socket.AF_INET6, ip[8:24])
        self.target = socket.inet_ntop(socket.AF_INET6, ip[24:40])
        pseudo = ip[8:40] + struct.pack("!IHBB", len(self.payload), 0, 0, self.kind)
        assert checksum(pseudo + self.payload) == 0


def said(frame: bytes | None) -> tuple[int, dict[int, bytes]]:
    """The kind and the options of a message of the DHCP server's."""
    answer = Answer(frame)
    assert answer.kind == 17
    assert (answer.to, answer.by) == (MAC, SERVER)
    assert (answer.source, answer.target) == (SERVER_LINK, CLIENT_LINK)
    assert struct.unpack("!HHH", answer.payload[:6]) == (547, 546, len(answer.payload))
    body = answer.payload[8:]
    assert body[1:4] == NUMBER
    found, rest = {}, body[4:]
    while rest:
        code, length = struct.unpack("!HH", rest[:4])
        found[code] = found.get(code, b"") + rest[4 : 4 + length]
        rest = rest[4 + length :]
    assert found[2] == SERVER_ID
    return body[0], found


def given_to(number: int, address: str, *dropped: str) -> bytes:
    """An answer to a request for addresses: one for ever, others not any more."""
    made = struct.pack("!I", number) + FOREVER * 2 + option(5, packed(address) + FOREVER * 2)
    return made + b"".join(option(5, packed(each) + bytes(8)) for each in dropped)


def test_a_machine_that_looks_for_a_router_is_sent_to_dhcp() -> None:
    answer = Answer(RESPONDER.answer(packet(58, bytes([133, 0, 0, 0, 0, 0, 0, 0]))))
    assert (answer.to, answer.source, answer.target) == (MAC, SERVER_LINK, CLIENT_LINK)
    assert answer.hops == 255
    body = answer.payload
    assert body[:2] == bytes([134, 0])
    # Addresses and the rest are had by DHCP; who says so is no router.
    assert (body[5], body[6:8]) == (0xC0, b"\0\0")
    options = body[16:]
    assert options[:8] == b"\x01\x01" + SERVER
    prefix, rest = options[8:40], options[40:]
    # On the link; no address of the machine's own making.
    assert prefix == bytes([3, 4, 64, 0x80]) + FOREVER * 2 + bytes(4) + packed("fd00:9::")
    assert rest == bytes([25, 3, 0, 0]) + FOREVER + packed("fd00:9::53")


def test_a_machine_without_an_address_is_answered_with_all_others() -> None:
    answer = Answer(RESPONDER.answer(packet(58, bytes([133, *bytes(7)]), source="::")))
    assert (answer.to, answer.target) == (bytes.fromhex("333300000001"), "ff02::1")


@pytest.mark.parametrize("target", ["fd00:9::1", SERVER_LINK], ids=["global", "link"])
def test_the_server_says_where_it_is(target: str) -> None:
    answer = Answer(RESPONDER.answer(packet(58, bytes([135, *bytes(7)]) + packed(target))))
    assert (answer.source, answer.target, answer.hops) == (target, CLIENT_LINK, 255)
    # RFC 4861, 4.4: solicited, override.
    assert answer.payload[4:8] == b"\x60\0\0\0"
    assert answer.payload[8:] == packed(target) + b"\x02\x01" + SERVER


def test_the_server_keeps_its_address_to_itself() -> None:
    ask = packet(58, bytes([135, *bytes(7)]) + packed("fd00:9::1"), source="::")
    answer = Answer(RESPONDER.answer(ask))
    assert (answer.target, answer.payload[4:8]) == ("ff02::1", b"\x20\0\0\0")


def test_a_machine_gets_its_address() -> None:
    kind, options = said(RESPONDER.answer(message(SOLICIT, wanted())))
    assert kind == ADVERTISE
    assert options[1] == CLIENT_ID
    assert options[3] == given_to(7, "fd00:9::2")
    assert options[7] == b"\xff"
    assert options[23] == packed("fd00:9::53")
    kind, options = said(RESPONDER.answer(message(REQUEST, wanted("fd00:9::2"), server=SERVER_ID)))
    assert (kind, options[3]) == (REPLY, given_to(7, "fd00:9::2"))
    assert 7 not in options


def test_a_machine_in_a_hurry_gets_its_address_at_once() -> None:
    kind, options = said(RESPONDER.answer(message(SOLICIT, wanted(), option(14, b""))))
    assert (kind, options[14], options[3]) == (REPLY, b"", given_to(7, "fd00:9::2"))


@pytest.mark.parametrize("kind", [RENEW, REBIND], ids=["renew", "rebind"])
def test_a_copy_of_a_machine_is_told_to_drop_what_it_remembers(kind: int) -> None:
    server = SERVER_ID if kind == RENEW else None
    asked = message(kind, wanted("fd00:9::77", "fd00:9::2"), server=server)
    answer, options = said(RESPONDER.answer(asked))
    assert (answer, options[3]) == (REPLY, given_to(7, "fd00:9::2", "fd00:9::77"))


def test_a_machine_has_one_address() -> None:
    asked = message(SOLICIT, wanted(number=7), wanted(number=8))
    _, options = said(RESPONDER.answer(asked))
    none = struct.pack("!I", 8) + FOREVER * 2 + option(13, b"\0\x02")
    assert options[3] == given_to(7, "fd00:9::2") + none


@pytest.mark.parametrize(
    ("address", "status"), [("fd00:9::2", 0), ("fd00:9::3", 4), ("fd00:8::2", 4)]
)
def test_a_machine_that_was_away_learns_whether_its_address_is_right(
    address: str, status: int
) -> None:
    kind, options = said(RESPONDER.answer(message(CONFIRM, wanted(address))))
    assert (kind, options[13]) == (REPLY, status.to_bytes(2))
    assert 3 not in options


@pytest.mark.parametrize("kind", [RELEASE, DECLINE], ids=["release", "decline"])
def test_what_a_machine_gives_back_is_its_own_all_the_same(kind: int) -> None:
    answer, options = said(RESPONDER.answer(message(kind, wanted("fd00:9::2"), server=SERVER_ID)))
    assert (answer, options[13]) == (REPLY, b"\0\0")


def test_a_machine_with_an_address_of_its_own_is_told_the_rest() -> None:
    kind, options = said(RESPONDER.answer(message(INFORMATION, client=False)))
    assert kind == REPLY
    assert options == {2: SERVER_ID, 23: packed("fd00:9::53")}


OTHER = bytes.fromhex("525400000002")


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(message(SOLICIT, wanted())[:60], id="half"),
        pytest.param(message(SOLICIT, wanted(), mac=OTHER), id="stranger"),
        pytest.param(message(SOLICIT, wanted(), mac=SERVER), id="own"),
        pytest.param(message(SOLICIT, wanted(), port=548), id="port"),
        pytest.param(message(SOLICIT, wanted(), source="fd00:9::2"), id="beyond-the-link"),
        pytest.param(message(SOLICIT, wanted(), client=False), id="nameless"),
        pytest.param(message(SOLICIT, wanted(), server=SERVER_ID), id="solicit-of-one"),
        pytest.param(message(REQUEST, wanted()), id="request-of-any"),
        pytest.param(message(REQUEST, wanted(), server=b"\0\x03\0\x01" + OTHER), id="other-server"),
        pytest.param(message(INFORMATION, server=b"another"), id="other-information"),
        pytest.param(message(CONFIRM, wanted()), id="confirm-of-nothing"),
        pytest.param(message(ADVERTISE, wanted()), id="advertise"),
        pytest.param(packet(58, bytes([133, *bytes(7)]), mac=OTHER), id="strange-router-solicit"),
        pytest.param(packet(58, bytes([133, *bytes(7)]), hops=64), id="from-afar"),
        pytest.param(packet(58, bytes([135, *bytes(7)]) + packed("fd00:9::2")), id="neighbour"),
        pytest.param(packet(58, bytes([135, *bytes(7)])), id="no-neighbour"),
        pytest.param(packet(58, bytes([128, *bytes(7)])), id="echo"),
    ],
)
def test_what_is_no_question_of_a_machine_of_the_network_has_no_answer(frame: bytes) -> None:
    assert RESPONDER.answer(frame) is None


@given(st.binary(max_size=300), st.integers(0, 300))
def test_whatever_a_guest_sends_the_server_lives_on(noise: bytes, at: int) -> None:
    RESPONDER.answer(noise)
    for frame in (
        message(REBIND, wanted("fd00:9::3"), option(14, b"")),
        packet(58, bytes([135, *bytes(7)]) + packed("fd00:9::1")),
    ):
        RESPONDER.answer(frame[:at] + noise + frame[at + len(noise) :])
        RESPONDER.answer(frame[:at])

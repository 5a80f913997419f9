"""DHCP for IPv4 and ARP in Ethernet frames: what is asked, and what is answered; no sockets.

For isolated networks, where no interface of the host is on the wire and dnsmasq can serve nobody;
`dhcp6` is the same for IPv6.
Follows RFC 2131 (DHCP), RFC 2132 (its options), RFC 826 (ARP), RFC 791 and RFC 768.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

__all__ = ["Responder", "checksum", "own_mac"]

_BROADCAST: Final = b"\xff" * 6
_ETHERTYPE_IPV4: Final = 0x0800
_ETHERTYPE_ARP: Final = 0x0806
_UDP: Final = 17
_SERVER_PORT: Final = 67
_CLIENT_PORT: Final = 68
_MAGIC: Final = b"\x63\x82\x53\x63"  # RFC 2131, 3

_DISCOVER, _OFFER, _REQUEST, _DECLINE, _ACK, _NAK, _RELEASE, _INFORM = range(1, 9)
# Options, RFC 2132.
_MASK, _DNS, _HOSTNAME, _WANTED, _LEASE, _KIND, _SERVER, _END = 1, 6, 12, 50, 51, 53, 54, 255
_FOREVER: Final = b"\xff" * 4
"""The longest lease: an address is a NIC's as long as the store says so (RFC 2131, 3.3)."""

_BOOTP = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")


def own_mac(network: str) -> bytes:
    """The MAC address of the server of a network, by its id: a locally administered one."""
    return b"\x02" + bytes.fromhex(network[:10])


@dataclass(frozen=True, slots=True)
class Responder:
    """Answers frames of one segment.

    Args:
        mac: Of the server.
        server: Its address and prefix length; nothing else answers for it.
        leases: MAC address, as "52:54:00:12:34:56", to address and host name.
        dns: Servers that machines are told.
    """

    mac: bytes
    server: IPv4Interface
    leases: Mapping[str, tuple[str, str]]
    dns: Sequence[str] = ()

    def asked(self, frame: bytes) -> bool:
        """Whether a frame may be a question: of DHCP, or where the server is."""
        if len(frame) < 14 or frame[6:12] == self.mac:
            return False
        kind = int.from_bytes(frame[12:14])
        return kind == _ETHERTYPE_ARP or (
            kind == _ETHERTYPE_IPV4 and _udp_to(frame[14:], _SERVER_PORT) is not None
        )

    def answer(self, frame: bytes) -> bytes | None:
        """The frame to send back; None where there is nothing to say, or nothing to understand."""
        if not self.asked(frame):
            return None
        if int.from_bytes(frame[12:14]) == _ETHERTYPE_ARP:
            return self._arp(frame[14:])
        message = _udp_to(frame[14:], _SERVER_PORT)
        return self._dhcp(message) if message is not None else None

    def _arp(self, packet: bytes) -> bytes | None:
        head = struct.pack("!HHBB", 1, _ETHERTYPE_IPV4, 6, 4)
        if len(packet) < 28 or packet[:8] != head + b"\0\1":
            return None
        asker, address, wanted = packet[8:14], packet[14:18], packet[24:28]
        own = self.server.ip.packed
        if wanted != own:
            return None
        reply = head + b"\0\2" + self.mac + own + asker + address
        return asker + self.mac + _ETHERTYPE_ARP.to_bytes(2) + reply

    def _dhcp(self, message: bytes) -> bytes | None:
        if len(message) < _BOOTP.size + 4 or message[_BOOTP.size : _BOOTP.size + 4] != _MAGIC:
            return None
        op, kind, length, _, number, _, flags, current, _, _, relay, hardware, _, _ = (
            _BOOTP.unpack_from(message)
        )
        options = _options(message[_BOOTP.size + 4 :])
        asked = options.get(_KIND, b"")
        if (op, kind, length) != (1, 1, 6) or len(asked) != 1:
            return None
        lease = self.leases.get(hardware[:6].hex(":"))
        if lease is None:
            return None  # not of this network: somebody else may know it
        address = IPv4Address(lease[0])
        own = self.server.ip.packed
        if asked[0] == _DISCOVER:
            answer = _OFFER
        elif asked[0] == _REQUEST:
            if options.get(_SERVER, own) != own:
                return None  # it took another server's offer
            wanted = options.get(_WANTED) or current
            answer = _ACK if wanted == address.packed else _NAK
        elif asked[0] == _INFORM:
            answer = _ACK
        else:
            return None  # declined or released: it is the NIC's all the same
        given = bytes(4) if answer == _NAK or asked[0] == _INFORM else address.packed
        head = _BOOTP.pack(
            2, 1, 6, 0, number, 0, flags, current if answer == _ACK else bytes(4), given, own,
            relay, hardware, bytes(64), bytes(128),
        )  # fmt: skip
        said = [(_KIND, bytes([answer])), (_SERVER, own)]
        if answer != _NAK:
            if asked[0] != _INFORM:
                said.append((_LEASE, _FOREVER))
            said += [(_MASK, self.server.netmask.packed), (_HOSTNAME, lease[1].encode("ascii"))]
            servers = b"".join(IPv4Address(each).packed for each in self.dns if ":" not in each)
            if servers:
                said.append((_DNS, servers))
        body = b"".join(bytes([code, len(data)]) + data for code, data in said)
        reply = (head + _MAGIC + body + bytes([_END])).ljust(300, b"\0")  # RFC 1542, 2.1
        # The client may have no address yet and would not take what is sent to one.
        return self._frame(_BROADCAST, IPv4Address("255.255.255.255"), reply)

    def _frame(self, to: bytes, address: IPv4Address, payload: bytes) -> bytes:
        source, target = self.server.ip.packed, address.packed
        udp = struct.pack("!HHHH", _SERVER_PORT, _CLIENT_PORT, 8 + len(payload), 0) + payload
        pseudo = source + target + struct.pack("!BBH", 0, _UDP, len(udp))
        udp = udp[:6] + (checksum(pseudo + udp) or 0xFFFF).to_bytes(2) + udp[8:]
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, _UDP, 0, source, target)
        ip = ip[:10] + checksum(ip).to_bytes(2) + ip[12:]
        return to + self.mac + _ETHERTYPE_IPV4.to_bytes(2) + ip + udp


def _udp_to(packet: bytes, port: int) -> bytes | None:
    """What a packet of IPv4 and UDP carries to a port; None of any other packet."""
    if len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] != _UDP:
        return None
    # A fragment is none of a client's that has no address yet.
    if int.from_bytes(packet[6:8]) & 0x3FFF:
        return None
    header = (packet[0] & 15) * 4
    udp = packet[header : int.from_bytes(packet[2:4])]
    if header < 20 or len(udp) < 8 or int.from_bytes(udp[2:4]) != port:
        return None
    return udp[8 : int.from_bytes(udp[4:6])]


def _options(data: bytes) -> dict[int, bytes]:
    """The options of a message; what is cut off is left out."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _END:
        if data[at] == 0:  # padding
            at += 1
            continue
        if at + 1 >= len(data):
            break
        length = data[at + 1]
        value = data[at + 2 : at + 2 + length]
        if len(value) == length:
            found[data[at]] = value
        at += 2 + length
    return found


def checksum(data: bytes) -> int:
    """The Internet's (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

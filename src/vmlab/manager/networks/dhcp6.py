"""IPv6 for machines in Ethernet frames: who gives addresses, where that is, and which they are.

For isolated networks, beside `dhcp`; no sockets. A machine that comes up asks for a router and is
told that there is none, that the subnet is on the link, and that addresses are had by DHCP; then it
asks for those. Follows RFC 4861 (neighbour discovery), RFC 8106 (DNS servers in it), RFC 8415
(DHCP for IPv6), RFC 3646 (its DNS servers) and RFC 8200.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Interface
from typing import Final

from vmlab.manager.networks.dhcp import checksum

__all__ = ["Responder6"]

_ETHERTYPE_IPV6: Final = 0x86DD
_HEADER: Final = 40
_UDP: Final = 17
_ICMPV6: Final = 58
_HOPS: Final = 255
"""Hop limit of neighbour discovery: nobody beyond a router can have sent it (RFC 4861, 3.1)."""
_ALL_NODES: Final = IPv6Address("ff02::1")
_UNSPECIFIED: Final = IPv6Address("::")
_FOREVER: Final = 0xFFFFFFFF
"""An address is a NIC's as long as the store says so (RFC 8415, 7.7)."""

# ICMPv6, RFC 4861, 4: messages and their options.
_ROUTER_SOLICIT, _ROUTER_ADVERT, _NEIGHBOUR_SOLICIT, _NEIGHBOUR_ADVERT = 133, 134, 135, 136
_SOURCE_LINK, _TARGET_LINK, _PREFIX, _RDNSS = 1, 2, 3, 25
_MANAGED_AND_OTHER: Final = 0xC0
_ON_LINK: Final = 0x80
_SOLICITED, _OVERRIDE = 1 << 30, 1 << 29

# RFC 8415, 7.2, 7.3, 21: ports, messages, options, states.
_SERVER_PORT: Final = 547
_CLIENT_PORT: Final = 546
_SOLICIT, _ADVERTISE, _REQUEST, _CONFIRM, _RENEW, _REBIND, _REPLY = 1, 2, 3, 4, 5, 6, 7
_RELEASE, _DECLINE, _INFORMATION_REQUEST = 8, 9, 11
_CLIENT, _SERVER, _IA_NA, _ADDRESS, _PREFERENCE = 1, 2, 3, 5, 7
_STATUS, _RAPID_COMMIT, _DNS = 13, 14, 23
_SUCCESS, _NO_ADDRESS, _NOT_ON_LINK = 0, 2, 4
_TO_ONE_SERVER: Final = frozenset({_REQUEST, _RENEW, _RELEASE, _DECLINE})
_TO_ANY_SERVER: Final = frozenset({_SOLICIT, _CONFIRM, _REBIND})


@dataclass(frozen=True, slots=True)
class Responder6:
    """Answers frames of one segment.

    Args:
        mac: Of the server.
        server: Its address and prefix length; beside that one it has one of the link.
        leases: MAC address, as "52:54:00:12:34:56", to address.
        dns: Servers that machines are told.
    """

    mac: bytes
    server: IPv6Interface
    leases: Mapping[str, str]
    dns: Sequence[str] = ()

    def asked(self, frame: bytes) -> bool:
        """Whether a frame may be a question: of DHCP, for a router, or where the server is."""
        if len(frame) < 14 + _HEADER or frame[12:14] != b"\x86\xdd" or frame[6:12] == self.mac:
            return False
        follows, payload = frame[20], frame[14 + _HEADER :]
        if follows == _ICMPV6:
            return payload[:1] in {b"\x85", b"\x87"}  # solicitations: of routers, of neighbours
        return follows == _UDP and payload[2:4] == _SERVER_PORT.to_bytes(2)

    def answer(self, frame: bytes) -> bytes | None:
        """The frame to send back; None where there is nothing to say, or nothing to understand."""
        if not self.asked(frame):
            return None
        packet = frame[14:]
        if packet[0] >> 4 != 6:
            return None
        asker, source = frame[6:12], IPv6Address(packet[8:24])
        payload = packet[_HEADER : _HEADER + int.from_bytes(packet[4:6])]
        if packet[6] == _UDP:
            if len(payload) < 8 or not source.is_link_local:
                return None
            said = self._dhcp(asker, payload[8 : int.from_bytes(payload[4:6])])
            return self._udp(asker, source, said) if said is not None else None
        if packet[7] != _HOPS or len(payload) < 8 or payload[1]:
            return None
        if payload[0] == _ROUTER_SOLICIT:
            return self._router(asker, source)
        return self._neighbour(asker, source, payload)

    # ------------------------------------------------------------------- neighbours

    def _router(self, asker: bytes, source: IPv6Address) -> bytes | None:
        if asker.hex(":") not in self.leases:
            return None  # not of this network: somebody else may know it
        subnet = self.server.network
        # A router for 0 seconds is none (RFC 4861, 4.2).
        said = struct.pack("!BBHBBHII", _ROUTER_ADVERT, 0, 0, 64, _MANAGED_AND_OTHER, 0, 0, 0)
        said += bytes([_SOURCE_LINK, 1]) + self.mac
        said += struct.pack(
            "!BBBBIII", _PREFIX, 4, subnet.prefixlen, _ON_LINK, _FOREVER, _FOREVER, 0
        )
        said += subnet.network_address.packed
        servers = self._servers()
        if servers:
            said += struct.pack("!BBHI", _RDNSS, 1 + len(servers) // 8, 0, _FOREVER) + servers
        return self._icmp(asker, source, said)

    def _neighbour(self, asker: bytes, source: IPv6Address, question: bytes) -> bytes | None:
        wanted = IPv6Address(question[8:24]) if len(question) >= 24 else None
        if wanted is None or wanted not in {self.server.ip, self._link_local}:
            return None
        # One that has no address yet wants to know whether it may have that one (RFC 4862, 5.4.3).
        flags = _OVERRIDE | (_SOLICITED if source != _UNSPECIFIED else 0)
        said = struct.pack("!BBHI", _NEIGHBOUR_ADVERT, 0, 0, flags) + wanted.packed
        said += bytes([_TARGET_LINK, 1]) + self.mac
        return self._icmp(asker, source, said, own=wanted)

    # ------------------------------------------------------------------- DHCP

    def _dhcp(self, asker: bytes, message: bytes) -> bytes | None:
        lease = self.leases.get(asker.hex(":"))
        if lease is None or len(message) < 4:
            return None
        kind, number = message[0], message[1:4]
        options = list(_options(message[4:]))
        named = dict(reversed(options))  # the first of each kind
        client, server = named.get(_CLIENT), named.get(_SERVER)
        if not self._is_mine(kind, client, server):
            return None
        address = IPv6Address(lease)
        associations = [data for code, data in options if code == _IA_NA and len(data) >= 12]
        said: list[tuple[int, bytes]] = [(_SERVER, self._duid)]
        if client is not None:
            said.append((_CLIENT, client))
        answer = _REPLY
        if kind == _SOLICIT:
            said.append((_PREFERENCE, b"\xff"))  # there is no other server to wait for
            if _RAPID_COMMIT in named:
                said.append((_RAPID_COMMIT, b""))
            else:
                answer = _ADVERTISE
        if kind == _CONFIRM:
            held = [each for data in associations for each in _addresses(data)]
            if not held:
                return None  # RFC 8415, 18.3.3
            right = all(each == address for each in held)
            said.append((_STATUS, (_SUCCESS if right else _NOT_ON_LINK).to_bytes(2)))
        elif kind in {_RELEASE, _DECLINE}:
            # It is the NIC's all the same.
            said.append((_STATUS, _SUCCESS.to_bytes(2)))
        elif kind != _INFORMATION_REQUEST:
            said += [
                (_IA_NA, _association(data, address if number == 0 else None))
                for number, data in enumerate(associations)
            ]
        servers = self._servers()
        if servers:
            said.append((_DNS, servers))
        return bytes([answer]) + number + b"".join(_option(code, data) for code, data in said)

    def _is_mine(self, kind: int, client: bytes | None, server: bytes | None) -> bool:
        """Whether a message is one for this server (RFC 8415, 16)."""
        if kind in _TO_ONE_SERVER:
            return client is not None and server == self._duid
        if kind in _TO_ANY_SERVER:
            return client is not None and server is None
        return kind == _INFORMATION_REQUEST and server in {None, self._duid}

    @property
    def _duid(self) -> bytes:
        """What DHCP knows the server by: its link-layer address (RFC 8415, 11.4)."""
        return b"\0\x03\0\x01" + self.mac

    @property
    def _link_local(self) -> IPv6Address:
        """RFC 4291, 2.5.6 and appendix A."""
        first = bytes([self.mac[0] ^ 2])
        own = first + self.mac[1:3] + b"\xff\xfe" + self.mac[3:]
        return IPv6Address(b"\xfe\x80".ljust(8, b"\0") + own)

    def _servers(self) -> bytes:
        return b"".join(IPv6Address(each).packed for each in self.dns if ":" in each)

    # ------------------------------------------------------------------- frames

    def _udp(self, to: bytes, target: IPv6Address, payload: bytes) -> bytes:
        udp = struct.pack("!HHHH", _SERVER_PORT, _CLIENT_PORT, 8 + len(payload), 0) + payload
        return self._frame(to, self._link_local, target, _UDP, udp, at=6)

    def _icmp(
        self, to: bytes, target: IPv6Address, message: bytes, *, own: IPv6Address | None = None
    ) -> bytes:
        if target == _UNSPECIFIED:
            to, target = b"\x33\x33\0\0\0\x01", _ALL_NODES
        return self._frame(to, own or self._link_local, target, _ICMPV6, message, at=2)

    def _frame(
        self,
        to: bytes,
        source: IPv6Address,
        target: IPv6Address,
        kind: int,
        data: bytes,
        *,
        at: int,
    ) -> bytes:
        """A frame with a packet in it; its checksum, at that place, covers a header of its own."""
        pseudo = source.packed + target.packed + struct.pack("!II", len(data), kind)
        data = data[:at] + (checksum(pseudo + data) or 0xFFFF).to_bytes(2) + data[at + 2 :]
        ip = struct.pack("!IHBB", 6 << 28, len(data), kind, _HOPS) + source.packed + target.packed
        return to + self.mac + _ETHERTYPE_IPV6.to_bytes(2) + ip + data


def _association(asked: bytes, address: IPv6Address | None) -> bytes:
    """The answer to a request for addresses (IA_NA): the address, and those that it is not."""
    made = asked[:4] + struct.pack("!II", _FOREVER, _FOREVER)
    if address is None:
        return made + _option(_STATUS, _NO_ADDRESS.to_bytes(2))
    made += _option(_ADDRESS, address.packed + struct.pack("!II", _FOREVER, _FOREVER))
    # What it believes to have and has not, it is to drop (RFC 8415, 18.3.4).
    wrong = dict.fromkeys(each for each in _addresses(asked) if each != address)
    return made + b"".join(_option(_ADDRESS, each.packed + bytes(8)) for each in wrong)


def _addresses(association: bytes) -> Iterator[IPv6Address]:
    """The addresses that stand in a request for addresses."""
    for code, data in _options(association[12:]):
        if code == _ADDRESS and len(data) >= 24:
            yield IPv6Address(data[:16])


def _option(code: int, data: bytes) -> bytes:
    return struct.pack("!HH", code, len(data)) + data


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The options of a message; what is cut off is left out."""
    while len(data) >= 4:
        code, length = struct.unpack_from("!HH", data)
        if len(data) < 4 + length:
            return
        yield code, data[4 : 4 + length]
        data = data[4 + length :]

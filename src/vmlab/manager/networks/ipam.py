"""The arithmetic of addresses: which of a subnet may be given, and which is the first free one.

Knows no store: who has an address is `addresses`' to say. Subnets are those of RFC 4632 (CIDR) and
RFC 4291; of IPv4 subnets the first and the last address are nobody's (RFC 919), of IPv6 subnets
the first (RFC 4291, 2.6.1: the routers' anycast address).
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vmlab.machine.errors import InvalidSpec, SpecProblem

__all__ = ["Address", "Pool", "Subnet", "gateway_of", "parse_address", "pools"]

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Subnet: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Pool:
    """Addresses of one subnet that can be given.

    Args:
        subnet: Where they are from.
        ranges: First and last of those that are given to who asks for none in particular, as
            numbers, ascending and without overlap.
        kept: Those that nobody is given: the gateway, and what is reserved; ascending.
    """

    subnet: Subnet
    ranges: tuple[tuple[int, int], ...]
    kept: tuple[tuple[int, int], ...]

    def first_free(self, taken: Iterable[Address]) -> Address | None:
        """The lowest address of the ranges that nobody has; None if there is none.

        Args:
            taken: Addresses that somebody has; those of other subnets do not matter.
        """
        numbers = sorted({int(each) for each in taken if each.version == self.subnet.version})
        return self.lowest_free(
            lambda first, last: bisect_right(numbers, last) - bisect_left(numbers, first)
        )

    def lowest_free(self, count: Callable[[int, int], int]) -> Address | None:
        """As `first_free`, found by counting: a few counts, however many are taken.

        Args:
            count: How many addresses somebody has from one number to another, both included.
        """
        for first, last in self._givable():
            taken = count(first, last)
            if taken > last - first:
                continue
            # As many are taken: one of the first `taken` + 1 is free. Below `low` all are taken.
            low, high = first, first + taken
            while low < high:
                middle = (low + high) // 2
                if count(first, middle) > middle - first:
                    low = middle + 1
                else:
                    high = middle
            return self._address(low)
        return None

    @property
    def size(self) -> int:
        """How many addresses the ranges have."""
        return sum(last - first + 1 for first, last in self._givable())

    def free(self, taken: Iterable[Address]) -> int:
        """How many addresses of the ranges nobody has."""
        numbers = {int(each) for each in taken if each.version == self.subnet.version}
        ranges = list(self._givable())
        return self.size - sum(
            any(first <= number <= last for first, last in ranges) for number in numbers
        )

    def refusal(self, address: Address) -> str | None:
        """Why that address cannot be asked for; None if it can, also outside of the ranges."""
        if address not in self.subnet:
            return f"an address in {self.subnet}"
        number = int(address)
        low, high = _bounds(self.subnet)
        if not low <= number <= high:
            return f"an address of a host: {address} is that of {self.subnet} itself"
        if any(first <= number <= last for first, last in self.kept):
            return f"an address that is not the gateway's and not reserved, as {address} is"
        return None

    def _givable(self) -> Iterator[tuple[int, int]]:
        """The ranges without what is kept."""
        for begin, last in self.ranges:
            first = begin
            for low, high in self.kept:
                if high < first or low > last:
                    continue
                if low > first:
                    yield first, low - 1
                first = high + 1
            if first <= last:
                yield first, last

    def _address(self, number: int) -> Address:
        return type(self.subnet.network_address)(number)


def _bounds(subnet: Subnet) -> tuple[int, int]:
    """The first and the last number that a host can have."""
    first, last = int(subnet.network_address), int(subnet.broadcast_address)
    if subnet.version == 4:
        # Of two addresses both are hosts' (RFC 3021), and of one as well.
        return (first, last) if subnet.prefixlen >= 31 else (first + 1, last - 1)
    return (first, last) if subnet.prefixlen >= 127 else (first + 1, last)


def parse_address(field: str, text: str) -> Address:
    """An address that somebody wrote; none with a zone (RFC 4007, 11), which may be any text.

    Raises:
        InvalidSpec: it is none.
    """
    expected = 'an address such as "10.9.8.7" or "fd00::7"'
    if "%" in text:
        raise _wrong(field, text, expected)
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise _wrong(field, text, expected) from None


def gateway_of(subnet: Subnet, gateway: str | None) -> Address:
    """The gateway of a subnet: the one that was named, if it is of the same version of IP.

    Raises:
        InvalidSpec: it is not an address of a host of the subnet.
    """
    low, high = _bounds(subnet)
    if gateway is not None:
        address = parse_address("gateway", gateway)
        if address.version == subnet.version:
            if address not in subnet or not low <= int(address) <= high:
                raise _wrong("gateway", gateway, f"an address of a host in {subnet}")
            return address
    return type(subnet.network_address)(low)


def pools(
    subnets: Sequence[Subnet],
    *,
    gateway: str | None = None,
    ranges: Sequence[str] = (),
    reserved: Sequence[str] = (),
) -> tuple[Pool, ...]:
    """The pools of a network's subnets, as it was asked for.

    Args:
        subnets: At most one of each version of IP.
        gateway: Its gateway, of one of them; the other one's is its first address.
        ranges: "FIRST-LAST"; a subnet that none is of gives all that it has.
        reserved: Addresses, or "FIRST-LAST", that nobody is given.

    Raises:
        InvalidSpec: naming the field and the value, and what would be right.
    """
    given = [_span("ranges", text, subnets) for text in ranges]
    kept = [_span("reserved", text, subnets) for text in reserved]
    if gateway is not None:
        _in_subnets("gateway", gateway, [parse_address("gateway", gateway)], subnets)
    made = []
    for subnet in subnets:
        low, high = _bounds(subnet)
        if high == low:
            raise _wrong(
                "subnet" if subnet.version == 4 else "subnet6",
                str(subnet),
                "a subnet with room for a gateway and a machine",
            )
        own = [(first, last) for version, first, last in given if version == subnet.version]
        router = int(gateway_of(subnet, gateway))
        held = [(first, last) for version, first, last in kept if version == subnet.version]
        clipped = [(max(first, low), min(last, high)) for first, last in own or [(low, high)]]
        made.append(Pool(subnet, _merged(clipped), _merged([*held, (router, router)])))
    return tuple(made)


def _span(field: str, text: str, subnets: Sequence[Subnet]) -> tuple[int, int, int]:
    """An address or "FIRST-LAST": version of IP, first and last number."""
    first_text, _, last_text = text.partition("-")
    first = parse_address(field, first_text.strip())
    last = parse_address(field, last_text.strip()) if last_text else first
    if first.version != last.version or int(first) > int(last):
        raise _wrong(field, text, '"FIRST-LAST" of one subnet, the lower address first')
    _in_subnets(field, text, [first, last], subnets)
    return first.version, int(first), int(last)


def _in_subnets(
    field: str, text: str, addresses: Collection[Address], subnets: Sequence[Subnet]
) -> None:
    for address in addresses:
        if not any(address in subnet for subnet in subnets):
            known = " or ".join(map(str, subnets))
            raise _wrong(field, text, f"of {known}" if known else "left out without a subnet")


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans in ascending order, those that touch or overlap made one."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(span for span in spans if span[0] <= span[1]):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def _wrong(field: str, value: object, expected: str) -> InvalidSpec:
    return InvalidSpec([SpecProblem(field, value, expected)], what="network")

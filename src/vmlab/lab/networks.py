"""Private networks of a lab: a segment, addresses without a DHCP server, and names for them.

A segment connects machines of one owner and nobody else (`vmlab.hypervisors.monitored.networks`).
Who joins gets an address of the network's; it is set in the guest by its NIC's MAC address, and
everybody's name goes into everybody's hosts(5).
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vmlab.guests.command import quote
from vmlab.machine.errors import InvalidSpec, ResourceExhausted, SpecProblem
from vmlab.machine.fields import NAME_RULE, is_name

__all__ = [
    "Address",
    "LabNetwork",
    "Networks",
    "find_interface_script",
    "hosts_script",
    "interface_script",
    "link_script",
]

_RANGE: Final = ipaddress.IPv4Network("10.213.0.0/16")
"""Where networks get theirs from: of RFC 1918's private addresses, few are less used; 10.0.2.0/24
is that of QEMU's NAT."""

_MARK: Final = "# vmlab"

_TRIES: Final = 2400
"""Looks for an interface that was plugged in a moment ago: two minutes, on a busy host."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address of a machine: in a network, by prefix length."""

    ip: str
    prefix: int

    def __str__(self) -> str:
        return f"{self.ip}/{self.prefix}"


class LabNetwork:
    """A private network that machines of one lab are plugged into.

    Args:
        name: Of the segment.
        subnet: Where its addresses are from.
    """

    def __init__(self, name: str, subnet: ipaddress.IPv4Network) -> None:
        self.name = name
        self.subnet = subnet
        self._members: dict[str, Address] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<LabNetwork {self.name!r} {self.subnet} {', '.join(self._members) or 'empty'}>"

    @property
    def segment(self) -> str:
        """What a NIC's `network` is to be."""
        return f"segment:{self.name}"

    @property
    def members(self) -> Mapping[str, Address]:
        """Who is on it: the machines' names and their addresses."""
        with self._lock:
            return dict(self._members)

    def join(self, machine: str) -> Address:
        """The address of a machine, which is on the network from now on.

        Raises:
            ResourceExhausted: all addresses are taken.
        """
        with self._lock:
            if machine in self._members:
                return self._members[machine]
            taken = {address.ip for address in self._members.values()}
            for host in self.subnet.hosts():
                if str(host) not in taken:
                    address = Address(str(host), self.subnet.prefixlen)
                    self._members[machine] = address
                    return address
        raise ResourceExhausted(
            f"network {self.name!r} has no address left in {self.subnet}",
            hint="make a network with a larger subnet",
        )

    def leave(self, machine: str) -> None:
        """A machine is off the network; again does nothing."""
        with self._lock:
            self._members.pop(machine, None)


class Networks:
    """The networks of one lab. A name is given again once its network is let go of, so that the
    templates that were booted with it can be used again."""

    def __init__(self) -> None:
        self._networks: dict[str, LabNetwork] = {}
        self._lock = threading.Lock()

    def make(self, name: str | None = None, subnet: str | None = None) -> LabNetwork:
        """A network that does not exist yet.

        Args:
            name: Its name; None is the first free one of "net0", "net1", ...
            subnet: Its addresses, as "10.9.8.0/24"; None is a free one.

        Raises:
            InvalidSpec: the name or the subnet is none, or is taken.
        """
        with self._lock:
            if name is None:
                name = next(
                    free for number in range(1 << 16)
                    if (free := f"net{number}") not in self._networks
                )  # fmt: skip
            if not is_name(name):
                raise _wrong("name", name, NAME_RULE)
            if name in self._networks:
                raise _wrong("name", name, "a name that no network of the lab has")
            chosen = self._free_subnet() if subnet is None else _parsed(subnet)
            network = LabNetwork(name, chosen)
            self._networks[name] = network
            return network

    def get(self, name: str) -> LabNetwork:
        """The network of that name, made if there is none."""
        with self._lock:
            found = self._networks.get(name)
        return found if found is not None else self.make(name)

    def release(self, network: LabNetwork) -> None:
        """Let go of a network that nobody is on any more; again does nothing."""
        with self._lock:
            if not network.members and self._networks.get(network.name) is network:
                del self._networks[network.name]

    def _free_subnet(self) -> ipaddress.IPv4Network:
        taken = [network.subnet for network in self._networks.values()]
        for subnet in _RANGE.subnets(new_prefix=24):
            if not any(subnet.overlaps(other) for other in taken):
                return subnet
        raise ResourceExhausted(f"no subnet is left in {_RANGE}", hint="close networks first")


def _parsed(subnet: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(subnet)
    except ValueError as error:
        raise _wrong("subnet", subnet, f'an IPv4 network such as "10.9.8.0/24" ({error})') from None


def _wrong(field: str, value: object, expected: str) -> InvalidSpec:
    return InvalidSpec([SpecProblem(field, value, expected)], what="network")


# ------------------------------------------------------------------- in the guest


def interface_script(mac: str, address: Address, *, tries: int = _TRIES) -> str:
    """Shell text that gives the interface with that MAC address its address, and raises it.

    Args:
        mac: Of an interface that is there, or comes within `tries` looks, 20 in a second.
        address: What it is to have.
        tries: How often it is looked for.
    """
    return (
        f'{find_interface_script(mac, tries=tries)}; ip addr flush dev "$n" && '
        f'ip addr add {address} dev "$n" && ip link set dev "$n" up || exit'
    )


def link_script(mac: str) -> str:
    """Shell text that waits until the interface with that MAC address has its link."""
    return (
        f'{find_interface_script(mac, tries=1)}; until read -r c <"/sys/class/net/$n/carrier" && '
        '[ "$c" = 1 ]; do sleep 0.05; done'
    )


def find_interface_script(mac: str, *, tries: int = _TRIES) -> str:
    """Shell text that finds the interface with that MAC address: $n.

    Args:
        mac: Of an interface that is there, or comes within `tries` looks, 20 in a second.
        tries: How often it is looked for.
    """
    return (
        f"n= t=0; while :; do for i in /sys/class/net/*; do "
        f'read -r a <"$i/address" && [ "$a" = {quote(mac)} ] && n=${{i##*/}}; done; '
        f'[ -z "$n" ] && [ $((t += 1)) -lt {tries} ] || break; sleep 0.05; done; '
        f'[ -n "$n" ] || {{ echo "no interface has the address {mac}" >&2; exit 1; }}'
    )


def hosts_script(hosts: Mapping[str, str]) -> str:
    """Shell text that has the guest know those names, and of ours no others.

    Args:
        hosts: Name -> address.
    """
    lines = "".join(f"{ip} {name} {_MARK}\n" for name, ip in sorted(hosts.items()))
    return (
        f"h=$(grep -v {quote(_MARK + '$')} /etc/hosts 2>/dev/null); "
        f'printf "%s\\n%s" "$h" {quote(lines)} >/etc/hosts || exit'
    )

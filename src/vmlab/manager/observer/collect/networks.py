"""Who has which address on the store's networks, and which of the host's interfaces are ours.

Leases as dnsmasq(8) writes them, the neighbour table and interfaces by rtnetlink(7). Where there is
no rtnetlink, or it may not be asked, nothing is said of those.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks import names
from vmlab.manager.networks.links import links
from vmlab.manager.observer.seen import SeenInterface, SeenLease

__all__ = ["Interfaces", "interfaces_of", "leases_of", "neighbours_of", "network_directories"]

_LOG: Final = logging.getLogger(__name__)

_MAC_LENGTH: Final = 17
_USED: Final = 0x02 | 0x04 | 0x08 | 0x10
"""NUD_REACHABLE, NUD_STALE, NUD_DELAY and NUD_PROBE (linux/neighbour.h): somebody answered."""


def network_directories(directory: Path) -> list[Path]:
    """The directories of networks, named by their ids, below the manager's own."""
    try:
        return sorted(path for path in (directory / "networks").iterdir() if path.is_dir())
    except OSError:
        return []  # no network was made yet


def leases_of(directories: Iterable[Path]) -> list[SeenLease]:
    """What the networks' DHCP servers have given, and to whom.

    A line of a lease file is "EXPIRY MAC ADDRESS NAME CLIENT"; those for IPv6 have no MAC.
    """
    found = []
    for directory in directories:
        try:
            lines = (directory / "leases").read_text("utf-8", "replace").splitlines()
        except OSError:
            continue  # it has no DHCP server, or nobody has asked that yet
        for line in lines:
            words = line.split()
            if len(words) >= 3 and len(words[1]) == _MAC_LENGTH and words[1].count(":") == 5:
                found.append(SeenLease(directory.name, words[2], words[1].lower()))
    return found


class Interfaces(NamedTuple):
    """Interfaces of the host: a home's own, the names of all, and which is on which bridge."""

    mine: list[SeenInterface]
    every: frozenset[str]
    joined: frozenset[tuple[str, str]]


def interfaces_of(home: str) -> Interfaces | None:
    """The host's interfaces, and those that say they are of the home of that digest.

    None where the kernel does not tell.
    """
    try:
        there = links()
    except (ImportError, OSError, OperationFailed) as error:
        _LOG.debug("interfaces were not looked at: %s", error)
        return None
    mine = [
        SeenInterface(link.name, link.kind or "interface", network, link.up)
        for link in there.values()
        if (network := names.of_alias(home, link.alias)) is not None
    ]
    named = {link.index: link.name for link in there.values()}
    joined = {(link.name, named[link.master]) for link in there.values() if link.master in named}
    return Interfaces(mine, frozenset(there), frozenset(joined))


def neighbours_of(interfaces: Iterable[SeenInterface]) -> list[SeenLease]:
    """Who has answered for which address on the networks' interfaces, by the neighbour table."""
    by_name = {interface.name: interface.network for interface in interfaces}
    if not by_name:
        return []
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    found = []
    try:
        with IPRoute() as route:
            for name, network in by_name.items():
                for index in route.link_lookup(ifname=name):
                    for entry in route.get_neighbours(ifindex=index):
                        address, mac = entry.get("dst"), entry.get("lladdr")
                        if address and mac and entry["state"] & _USED and _told(address):
                            found.append(SeenLease(network, address, mac.lower(), "neighbour"))
    except (OSError, NetlinkError) as error:
        _LOG.debug("neighbours were not looked at: %s", error)
    return found


def _told(address: str) -> bool:
    """Whether that address is one that a network gives: those of the link alone are everybody's."""
    return not ip_address(address).is_link_local

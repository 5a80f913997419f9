"""What a network needs of the host, worked out from its row: interfaces, addresses, services.

A layout is all that `host` and the services know of a network, and what is written down before
anything of it is made; so a network can be removed from the host without its row.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from vmlab.hypervisors.process_identity import boot_id
from vmlab.manager.networks import ipam, names
from vmlab.manager.networks.links import namespace
from vmlab.report import write_atomically

if TYPE_CHECKING:
    from vmlab.manager.store.tables import NetworkRow

__all__ = ["RECORD", "Layout", "Lease", "Record", "bridge_of", "network_pools", "subnets_of"]

RECORD: Final = "network.json"


@dataclass(frozen=True, slots=True)
class Lease:
    """Which addresses a NIC is to be told, by its MAC address, and its machine's host name."""

    mac: str
    hostname: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A network as the host is to have it.

    Args:
        network: Its id.
        mode: Of the network.
        bridge: The bridge that machines are on, and the host itself; "" of other modes.
        vlan: Tag of its port on the switch.
        switch: The switch that the bridge is joined to where there is a tag; else "".
        port: The interface that joins the two; else "".
        table: Of the packet filter; "" of other modes.
        gateways: The host's addresses on it, with prefix length.
        dns: Servers that machines are told; none is the host itself, where it is on the network.
        dhcp: Whether machines are told their addresses.
        foreign: Whether the bridge is the host's own: nothing but machines is added to it.
    """

    network: str
    mode: Literal["isolated", "user", "bridged"]
    bridge: str
    vlan: int | None
    switch: str
    port: str
    table: str
    gateways: tuple[str, ...]
    dns: tuple[str, ...]
    dhcp: bool
    foreign: bool = False

    @classmethod
    def of(cls, row: NetworkRow, home: str) -> Layout:
        """The layout of a network, in the home of that digest."""
        bridged = row.mode == "bridged"
        tagged = bridged and row.vlan is not None
        # Networks with tags are on one switch unless they name another: that is what tags are for.
        switch = (row.bridge or names.interface("switch", home)) if tagged else ""
        return cls(
            network=row.id,
            mode="bridged" if bridged else "user" if row.mode == "user" else "isolated",
            bridge=bridge_of(row.id, row.mode, row.bridge, row.vlan),
            vlan=row.vlan if tagged else None,
            switch=switch,
            port=names.interface("port", row.id) if tagged else "",
            table=names.table(home, row.id) if bridged else "",
            gateways=tuple(
                f"{ipam.gateway_of(subnet, row.gateway)}/{subnet.prefixlen}"
                for subnet in subnets_of(row)
            ),
            dns=tuple(row.dns),
            dhcp=row.dhcp,
            foreign=bool(row.data.get("foreign")),
        )

    @property
    def subnets(self) -> tuple[ipam.Subnet, ...]:
        """The subnets that it has."""
        return tuple(ip_network(each, strict=False) for each in self.gateways)


def bridge_of(network: str, mode: str, bridge: str | None, vlan: int | None) -> str:
    """The bridge that machines on a network are on, by what its row says; "" of other modes.

    Where there is a tag, the bridge that is named is the switch, and machines are on one of ours.
    """
    if mode != "bridged":
        return ""
    own = names.interface("bridge", network)
    return own if vlan is not None else bridge or own


def subnets_of(row: NetworkRow) -> tuple[ipam.Subnet, ...]:
    """The subnets of a network, IPv4 first."""
    return tuple(ip_network(each) for each in (row.subnet, row.subnet6) if each is not None)


def network_pools(row: NetworkRow) -> tuple[ipam.Pool, ...]:
    """The pools of a network, one for each of its subnets.

    Raises:
        InvalidSpec: the row says what cannot be.
    """
    return ipam.pools(
        subnets_of(row), gateway=row.gateway, ranges=row.ranges, reserved=row.reserved
    )


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down of a network before anything of it is made on the host.

    Interfaces and rules go with the network namespace and with the boot that they were made in.
    """

    layout: Layout
    namespace: int
    boot: str

    @classmethod
    def now(cls, layout: Layout) -> Record:
        """Of a network that is made here and now."""
        return cls(layout, namespace(), boot_id())

    @property
    def here(self) -> bool:
        """Whether what was made may still be there, and within reach."""
        return self.namespace == namespace() and self.boot == boot_id()

    def write(self, directory: Path) -> None:
        """Write it into a network's directory, durably."""
        write_atomically(directory / RECORD, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, directory: Path) -> Record | None:
        """The record in a network's directory; None if nothing was made yet."""
        try:
            data: dict[str, Any] = json.loads((directory / RECORD).read_bytes())
            layout = data["layout"]
            layout.update(gateways=tuple(layout["gateways"]), dns=tuple(layout["dns"]))
            return cls(Layout(**layout), data["namespace"], data["boot"])
        except (OSError, ValueError, LookupError, TypeError):
            return None  # written atomically: damaged is as good as never written

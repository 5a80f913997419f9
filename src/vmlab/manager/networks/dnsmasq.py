"""dnsmasq(8) on a bridged network: DHCP for IPv4 and IPv6, router advertisements, and names.

It gives no address of its own choosing: the store has one for each NIC, by MAC address, and who
is not in it gets no answer. It runs as an ordinary user once it has its ports, and cannot read
the home then; so what it is told is in its configuration, and it is started anew when that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_interface
from pathlib import Path
from typing import Final

from vmlab.manager.networks.layout import Layout, Lease

__all__ = ["READY", "command", "configuration"]

READY: Final = r"dnsmasq\[\d+\]: started"
"""What it says once it has its ports."""

_LEASE: Final = "12h"
"""An address is a NIC's as long as the store says so: what the guest asks again changes nothing."""


def configuration(layout: Layout, leases: Sequence[Lease], *, index: int, directory: Path) -> str:
    """What dnsmasq is told of a network.

    Args:
        layout: The network; the host has to be on it.
        leases: Who gets which addresses.
        index: Number of the network's bridge: a new bridge needs a new dnsmasq.
        directory: Where it keeps who has asked.
    """
    lines = [
        f"# interface {index}",
        # By name: one that listens by address advertises no router. It takes the addresses whose
        # label is that name, so not the metadata service's, which every network's bridge has.
        f"interface={layout.bridge}",
        "except-interface=lo",
        "bind-interfaces",
        "no-hosts",
        "no-ping",
        "dhcp-authoritative",
        # Only NICs of the store: anybody else on a bridge is not ours to serve.
        "dhcp-ignore=tag:!known",
        f"dhcp-leasefile={directory / 'leases'}",
    ]
    own: list[str] = []
    for text in layout.gateways:
        gateway = ip_interface(text)
        subnet = gateway.network
        own.append(str(gateway.ip))
        if not layout.dhcp:
            continue
        if gateway.version == 4:
            lines += [
                f"dhcp-range={subnet.network_address},static,{subnet.netmask},{_LEASE}",
                f"dhcp-option=option:router,{gateway.ip}",
            ]
        else:
            lines += [
                "enable-ra",
                f"dhcp-range={subnet.network_address},static,{subnet.prefixlen},{_LEASE}",
            ]
    servers = layout.dns or own
    for option, version in (("option:dns-server", False), ("option6:dns-server", True)):
        said = [f"[{each}]" if version else each for each in servers if (":" in each) is version]
        if said and layout.dhcp:
            lines.append(f"dhcp-option={option},{','.join(said)}")
    for lease in leases:
        lines += [*_lease(lease, dhcp=layout.dhcp)]
    return "\n".join(lines) + "\n"


def _lease(lease: Lease, *, dhcp: bool) -> list[str]:
    four = [each for each in lease.addresses if ":" not in each]
    six = [each for each in lease.addresses if ":" in each]
    told = [*four, *(f"[{each}]" for each in six)]
    return [
        *([f"dhcp-host={lease.mac},{','.join(told)},{lease.hostname}"] if dhcp else []),
        # Names are known also of machines that have not asked, or were not told by DHCP.
        f"host-record={lease.hostname},{','.join([*four, *six])}",
    ]


def command(configuration: Path) -> list[str | Path]:
    """The command line: in the foreground, saying on its standard error what it does."""
    return ["dnsmasq", "--keep-in-foreground", f"--conf-file={configuration}", "--log-facility=-"]

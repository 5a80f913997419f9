"""The packet filter of a bridged network: NAT to the outside, and a wall to everything else.

One table of nftables for each network (nft(8)), named by its id, replaced as a whole; removing it
removes all of it. Machines reach the outside by IPv4 (masquerading), each other, and of the host
only its services on that network. They do not reach other networks of vmlab's, whatever the
host's routes say. IPv6 stays on the network: forwarding it would turn the host into a router, which
then takes no router advertisements any more (Documentation/networking/ip-sysctl.rst).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Final

from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks.layout import Layout

__all__ = ["FORWARDING", "METADATA_ADDRESS", "apply", "remove", "rules", "tables"]

METADATA_ADDRESS: Final = "169.254.169.254"
"""Where instances of EC2, and of most clouds since, find their metadata."""

FORWARDING: Final = Path("/proc/sys/net/ipv4/ip_forward")

_SECONDS: Final = 120.0


def rules(layout: Layout) -> str:
    """The table of a network, as nft(8) reads it: what was there of it before is replaced."""
    table, port = layout.table, layout.bridge
    four = [each for each in layout.gateways if ":" not in each]
    six = [each for each in layout.gateways if ":" in each]
    broadcasts = [str(each.broadcast_address) for each in layout.subnets if each.version == 4]
    own = ", ".join([*(each.partition("/")[0] for each in four), *broadcasts, METADATA_ADDRESS])
    own6 = ", ".join([*(each.partition("/")[0] for each in six), "fe80::/10", "ff00::/8"])
    masquerade = "\n".join(
        f'    ip saddr {subnet} oifname != "{port}" masquerade'
        for subnet in layout.subnets
        if subnet.version == 4
    )
    return f"""\
table inet {table}
delete table inet {table}
table inet {table} {{
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{port}" ip daddr {{ {own}, 224.0.0.0/4, 255.255.255.255 }} accept
    iifname "{port}" ip6 daddr {{ {own6} }} accept
    iifname "{port}" drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{port}" oifname "{port}" accept
    iifname "{port}" accept
    oifname "{port}" ct state established,related accept
    oifname "{port}" drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
{masquerade}
  }}
}}
"""


def apply(layout: Layout) -> None:
    """Put the network's table in place, at once.

    Raises:
        OperationFailed: nft(8) is not there, or the kernel refused.
    """
    _nft(["-f", "-"], rules(layout), doing="filter its packets")


def remove(name: str) -> bool:
    """Remove a table; False if there was none of that name."""
    if name not in tables():
        return False
    _nft(["delete", "table", "inet", name], doing="remove its packet filter")
    return True


def tables() -> frozenset[str]:
    """The names of this network namespace's tables.

    Raises:
        OperationFailed: nft(8) is not there, or may not look.
    """
    said = json.loads(_nft(["-j", "list", "tables", "inet"], doing="list packet filters"))
    return frozenset(each["table"]["name"] for each in said["nftables"] if "table" in each)


def _nft(arguments: list[str], text: str = "", *, doing: str) -> str:
    try:
        done = subprocess.run(
            ["nft", *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except FileNotFoundError as error:
        raise OperationFailed(
            f"cannot {doing}: nft is not installed", hint="install nftables"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise OperationFailed(f"cannot {doing}: nft did not answer for {_SECONDS:g} s") from error
    if done.returncode != 0:
        raise OperationFailed(
            f"cannot {doing}: nft {' '.join(arguments)}: {done.stderr.strip()}",
            hint="bridged networks need root, or CAP_NET_ADMIN, and a kernel with nftables",
        )
    return done.stdout

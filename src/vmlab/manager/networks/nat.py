"""The packet filter of a bridged network: NAT to the outside, and a wall to everything else.

One table of nftables for each network (nft(8)), named by its id, replaced as a whole; removing it
removes all of it. Machines reach the outside (masquerading, of IPv6 as well: nobody out there knows
a way to the store's subnets), each other, and of the host only its services on that network. They
do not reach other networks of vmlab's, whatever the host's routes say.

A host that forwards IPv6 is a router, which takes no router advertisements unless it is told to
(Documentation/networking/ip-sysctl.rst, accept_ra): interfaces that took them go on doing so.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks.layout import Layout

__all__ = [
    "FORWARDING",
    "FORWARDING6",
    "METADATA_ADDRESS",
    "SETTINGS",
    "apply",
    "forwarding",
    "hear_no_routers",
    "remove",
    "rules",
    "said",
    "set_back",
    "set_kernel",
    "tables",
]

METADATA_ADDRESS: Final = "169.254.169.254"
"""Where instances of EC2, and of most clouds since, find their metadata."""

SETTINGS: Final = Path("/proc/sys/net")
"""The kernel's settings of networks: those of the network namespace of who looks."""

FORWARDING: Final = SETTINGS / "ipv4/ip_forward"
FORWARDING6: Final = SETTINGS / "ipv6/conf/all/forwarding"

_INTERFACES6: Final = SETTINGS / "ipv6/conf"
_HEARS: Final = "1"
"""accept_ra: router advertisements are taken, but not by a router."""
_HEARS_ALL_THE_SAME: Final = "2"
"""accept_ra: also by a router."""

_SECONDS: Final = 120.0
_FAMILY: Final = {4: "ip", 6: "ip6"}


def rules(layout: Layout) -> str:
    """The table of a network, as nft(8) reads it: what was there of it before is replaced."""
    table, port = layout.table, layout.bridge
    four = [each for each in layout.gateways if ":" not in each]
    six = [each for each in layout.gateways if ":" in each]
    broadcasts = [str(each.broadcast_address) for each in layout.subnets if each.version == 4]
    own = ", ".join([*(each.partition("/")[0] for each in four), *broadcasts, METADATA_ADDRESS])
    own6 = ", ".join([*(each.partition("/")[0] for each in six), "fe80::/10", "ff00::/8"])
    masquerade = "\n".join(
        f'    {_FAMILY[subnet.version]} saddr {subnet} oifname != "{port}" masquerade'
        for subnet in layout.subnets
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


def forwarding(layout: Layout) -> dict[Path, str]:
    """What the kernel has to be told so that it forwards a network's packets, in that order.

    Nothing where it forwards already, or has no IPv6 at all.
    """
    versions = {subnet.version for subnet in layout.subnets}
    told: dict[Path, str] = {}
    if 4 in versions and said(FORWARDING) == "0":
        told[FORWARDING] = "1"
    if 6 in versions and said(FORWARDING6) == "0":
        for path in sorted(_INTERFACES6.glob("*/accept_ra")):
            # Those of "all" and "default" say nothing of an interface that is there.
            if path.parent.name not in {"all", "default"} and said(path) == _HEARS:
                told[path] = _HEARS_ALL_THE_SAME
        told[FORWARDING6] = "1"
    return told


def hear_no_routers(interface: str) -> None:
    """Have the host take no router advertisements there: whoever is on it would be its router.

    Raises:
        OperationFailed: the kernel's settings cannot be changed here.
    """
    with suppress(FileNotFoundError):  # a kernel without IPv6
        _tell(_INTERFACES6 / interface / "accept_ra", "0")


def set_kernel(told: Mapping[Path, str]) -> None:
    """Tell the kernel that, in that order; an interface that went meanwhile is told nothing.

    Raises:
        OperationFailed: the kernel's settings cannot be changed here.
    """
    for path, value in told.items():
        with suppress(FileNotFoundError):
            _tell(path, value)


def set_back(before: Mapping[Path, str]) -> None:
    """Tell the kernel what it said before it was told otherwise; the last that was told first."""
    for path, value in reversed(list(before.items())):
        with suppress(FileNotFoundError):  # its interface is gone
            _tell(path, value)


def _tell(path: Path, value: str) -> None:
    try:
        path.write_text(value, "ascii")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OperationFailed(
            f"cannot write {value} to {path}: {error.strerror}",
            hint="bridged networks need root, and a /proc/sys that can be written to",
        ) from error


def said(path: Path) -> str:
    """What the kernel says there; "" where it has no such setting, or no more."""
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        return ""


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

"""Interfaces of the host, by rtnetlink(7): bridges, their ports, their addresses; by pyroute2.

Each call is a short conversation with the kernel, for a thread of its own where an event loop
runs. Needs CAP_NET_ADMIN to change anything, nothing to look.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.machine.errors import OperationFailed

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = [
    "Link",
    "add_addresses",
    "addresses",
    "alone",
    "join",
    "links",
    "make_bridge",
    "may_administer",
    "namespace",
    "remove",
    "set_alias",
]

_CAP_NET_ADMIN: Final = 12  # linux/capability.h
_IFA_F_NODAD: Final = 0x02  # linux/if_addr.h: nobody else can have an address on our own bridge


@dataclass(frozen=True, slots=True)
class Link:
    """An interface: its kind ("bridge", "tun", "veth"; None of a real one), and what it is for.

    `carrier` of a tap is whether a process has it open.
    """

    name: str
    index: int
    kind: str | None
    alias: str | None
    up: bool
    carrier: bool
    master: int | None


@contextmanager
def _kernel(doing: str) -> Iterator[IPRoute]:
    """A conversation with the kernel.

    Raises:
        OperationFailed: it refused, saying what was being done.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        denied = error.code in {errno.EPERM, errno.EACCES}
        raise OperationFailed(
            f"cannot {doing}: {os.strerror(error.code)}",
            hint="bridged networks need root, or CAP_NET_ADMIN; isolated and user ones do not"
            if denied
            else "`vmlab doctor` tells what this host's kernel can do",
        ) from error


def namespace() -> int:
    """Which network namespace this process is in (network_namespaces(7)); 0 where there is none."""
    return Path("/proc/self/ns/net").stat().st_ino if sys.platform == "linux" else 0


@contextmanager
def alone() -> Iterator[None]:
    """Be the only one here of all managers that are in this network namespace; threads wait.

    The lock (flock(2)) is on the namespace itself: it goes with whoever holds it.
    """
    namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        yield
    finally:
        os.close(namespace)


def links() -> dict[str, Link]:
    """The interfaces that there are, by name; none where there is no rtnetlink to ask."""
    if sys.platform != "linux":
        return {}
    with _kernel("list the host's interfaces") as route:
        return {link.name: link for link in map(_link, route.get_links())}


def addresses() -> list[tuple[str, IPv4Interface | IPv6Interface]]:
    """The host's addresses with their prefix lengths, by name of the interface."""
    with _kernel("list the host's addresses") as route:
        named = {each["index"]: each.get("ifname") for each in route.get_links()}
        return [
            (named.get(each["index"], ""), ip_interface((each.get("address"), each["prefixlen"])))
            for each in route.get_addr()
        ]


def make_bridge(name: str, alias: str) -> None:
    """Make a bridge of that name if there is none, and raise it."""
    with _kernel(f"make the bridge {name}") as route:
        _add(route, ifname=name, kind="bridge", br_stp_state=0, br_forward_delay=0)
        index = _index(route, name)
        route.link("set", index=index, ifalias=alias)
        route.link("set", index=index, state="up")


def join(name: str, bridge: str) -> None:
    """Put an interface on a bridge, and raise it."""
    with _kernel(f"put {name} on the bridge {bridge}") as route:
        route.link("set", index=_index(route, name), master=_index(route, bridge), state="up")


def set_alias(name: str, alias: str) -> None:
    """Have an interface say what it is for."""
    with _kernel(f"name what {name} is for") as route:
        route.link("set", index=_index(route, name), ifalias=alias)


def add_addresses(name: str, addresses: Sequence[str], *, label: str | None = None) -> None:
    """Give an interface addresses with prefix length; those that it has already stay.

    Args:
        name: Of the interface.
        addresses: What it is to have.
        label: What programs are to know them by, in place of its name; of IPv4 only.
    """
    from pyroute2.netlink.exceptions import NetlinkError

    for text in addresses:
        address, _, prefix = text.partition("/")
        with _kernel(f"give {name} the address {text}") as route:
            try:
                route.addr(
                    "add",
                    index=_index(route, name),
                    address=address,
                    prefixlen=int(prefix),
                    **({"flags": _IFA_F_NODAD} if ":" in address else {}),
                    **({"label": label} if label is not None else {}),
                )
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise


def remove(name: str) -> bool:
    """Remove an interface; False if there was none of that name."""
    from pyroute2.netlink.exceptions import NetlinkError

    with _kernel(f"remove the interface {name}") as route:
        found = list(route.link_lookup(ifname=name))
        if not found:
            return False
        try:
            route.link("del", index=found[0])
        except NetlinkError as error:
            if error.code != errno.ENODEV:  # it went by itself
                raise
            return False
    return True


def _add(route: IPRoute, **what: Any) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route.link("add", **what)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise


def _index(route: IPRoute, name: str) -> int:
    from pyroute2.netlink.exceptions import NetlinkError

    found = list(route.link_lookup(ifname=name))
    if not found:
        raise NetlinkError(errno.ENODEV)
    index: int = found[0]
    return index


def _link(message: Any) -> Link:
    return Link(
        name=message.get("ifname"),
        index=message["index"],
        kind=message.get(("linkinfo", "kind")),
        alias=message.get("ifalias"),
        up=bool(message["flags"] & 1),  # IFF_UP
        carrier=bool(message.get("carrier")),
        master=message.get("master"),
    )


def may_administer() -> bool:
    """Whether this process may change the host's networks (CAP_NET_ADMIN, capabilities(7))."""
    if sys.platform != "linux":
        return False
    status = Path("/proc/self/status").read_text("ascii", "replace")
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_NET_ADMIN & 1)

"""The DHCP server of an isolated network: `python -m vmlab.manager.networks.segment_server FILE`.

A process without rights of any kind. It is on the segment as machines are: a multicast group on
the loopback interface that carries Ethernet frames (`vmlab.hypervisors.monitored.networks`).
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from ipaddress import IPv4Interface, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.manager.networks.dhcp import Responder, own_mac
from vmlab.manager.networks.dhcp6 import Responder6

if TYPE_CHECKING:
    from vmlab.manager.networks.layout import Layout, Lease

__all__ = ["READY", "command", "configuration", "main"]

READY: Final = r"serving "
_LARGEST: Final = 1 << 16
_LOOK_SECONDS: Final = 5.0
"""How often a quiet server looks whether it is still wanted."""


def configuration(layout: Layout, leases: Sequence[Lease], group: tuple[str, int]) -> str:
    """What the server of a network is told; "" where it has nothing to serve.

    Args:
        layout: The network.
        leases: Who gets which addresses.
        group: Multicast group and port of its segment.
    """
    if not layout.gateways or not layout.dhcp:
        return ""
    return json.dumps(
        {
            "network": layout.network,
            "group": group[0],
            "port": group[1],
            # An address of each version of IP at most; a machine has one of each.
            "servers": list(layout.gateways),
            "dns": list(layout.dns),
            "leases": [[each.mac, each.hostname, list(each.addresses)] for each in leases],
        },
        indent=1,
    )


def command(configuration: Path) -> list[str | Path]:
    """The command line."""
    module = "vmlab.manager.networks.segment_server"
    return [sys.executable, "-P", "-m", module, configuration]


def join(group: str, port: int) -> socket.socket:
    """A socket that has all frames of a segment, and sends to it."""
    wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wire.bind((group, port))
        loopback = socket.inet_aton("127.0.0.1")
        wire.setsockopt(
            socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + loopback
        )
        wire.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
        wire.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    except OSError:
        wire.close()
        raise
    return wire


def _told(path: Path) -> tuple[tuple[int, int], dict[str, Any]]:
    """What stands in the file, and which file that was: it is replaced when somebody comes."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        return (found.st_ino, found.st_mtime_ns), json.loads(file.read())


def _responders(told: dict[str, Any]) -> list[Responder | Responder6]:
    """Who answers, for each version of IP that the network has."""
    made: list[Responder | Responder6] = []
    leases = [
        (mac, hostname, address)
        for mac, hostname, addresses in told["leases"]
        for address in addresses
    ]
    for text in told["servers"]:
        server, mac = ip_interface(text), own_mac(told["network"])
        if isinstance(server, IPv4Interface):
            four = {who: (address, name) for who, name, address in leases if ":" not in address}
            made.append(Responder(mac, server, four, told["dns"]))
        else:
            six = {who: address for who, _, address in leases if ":" in address}
            made.append(Responder6(mac, server, six, told["dns"]))
    return made


def main(arguments: Sequence[str]) -> None:
    """Serve until a signal ends it, or its file is gone, as when somebody removed the home.

    What the file says when a frame comes is what is told.
    """
    path = Path(arguments[0])
    read, told = _told(path)
    responders = _responders(told)
    group, port = told["group"], told["port"]
    with join(group, port) as wire:
        wire.settimeout(_LOOK_SECONDS)
        print(f"serving {told['network']} on {group}:{port}", flush=True)
        while True:
            try:
                frame = wire.recv(_LARGEST)
            except TimeoutError:
                frame = b""
            if frame and not any(each.asked(frame) for each in responders):
                continue
            try:
                found = path.stat()
            except FileNotFoundError:
                return
            if (found.st_ino, found.st_mtime_ns) != read:
                read, told = _told(path)
                responders = _responders(told)
            for each in responders:
                answer = each.answer(frame)
                if answer is not None:
                    wire.sendto(answer, (group, port))


if __name__ == "__main__":
    main(sys.argv[1:])

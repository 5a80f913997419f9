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
from ipaddress import IPv4Interface
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.manager.networks.dhcp import Responder, own_mac

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
        leases: Who gets which addresses; IPv4 ones are told.
        group: Multicast group and port of its segment.
    """
    server = next((each for each in layout.gateways if ":" not in each), None)
    if server is None or not layout.dhcp:
        return ""
    told = {
        lease.mac: [address, lease.hostname]
        for lease in leases
        for address in lease.addresses
        if ":" not in address
    }
    return json.dumps(
        {
            "network": layout.network,
            "group": group[0],
            "port": group[1],
            "server": server,
            "dns": [each for each in layout.dns if ":" not in each],
            "leases": told,
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


def _responder(told: dict[str, Any]) -> Responder:
    return Responder(
        mac=own_mac(told["network"]),
        server=IPv4Interface(told["server"]),
        leases={mac: (address, name) for mac, (address, name) in told["leases"].items()},
        dns=told["dns"],
    )


def main(arguments: Sequence[str]) -> None:
    """Serve until a signal ends it, or its file is gone, as when somebody removed the home.

    What the file says when a frame comes is what is told.
    """
    path = Path(arguments[0])
    read, told = _told(path)
    responder = _responder(told)
    group, port = told["group"], told["port"]
    with join(group, port) as wire:
        wire.settimeout(_LOOK_SECONDS)
        print(f"serving {told['network']} on {group}:{port}", flush=True)
        while True:
            try:
                frame = wire.recv(_LARGEST)
            except TimeoutError:
                frame = b""
            if frame and not responder.asked(frame):
                continue
            try:
                found = path.stat()
            except FileNotFoundError:
                return
            if (found.st_ino, found.st_mtime_ns) != read:
                read, told = _told(path)
                responder = _responder(told)
            answer = responder.answer(frame)
            if answer is not None:
                wire.sendto(answer, (group, port))


if __name__ == "__main__":
    main(sys.argv[1:])

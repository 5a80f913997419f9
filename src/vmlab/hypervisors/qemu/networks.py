"""What a NIC is connected to on the host: NAT, segments between machines, taps and bridges.

NAT ("user") and segments need no privileges.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from vmlab.hypervisors.monitored.names import nic_backend
from vmlab.hypervisors.monitored.networks import bridge_port, segment_group
from vmlab.machine.spec import Nic

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

_FORWARD = re.compile(
    r"^\s*(?P<protocol>TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+\S+\s+(?P<host>\d+)\s+\S+\s+(?P<guest>\d+)\s"
)
_BACKEND = re.compile(r"^Hub -?\d+ \((?P<id>[^)]+)\):|^(?P<name>\S+)\\?.*:$")


def backend(nic: Nic, owner: Owner, machine: str) -> dict[str, Any]:
    """What `netdev_add` and `-netdev` take for a NIC (NetdevUser and others in QEMU's net.json)."""
    kind, _, name = nic.network.partition(":")
    netdev: dict[str, Any] = {"id": nic_backend(nic.name)}
    if kind == "user":
        return {"type": "user", **netdev, "hostfwd": _forwards(nic)}
    if kind == "segment":
        group, port = segment_group(owner, name)
        return {"type": "socket", **netdev, "mcast": f"{group}:{port}", "localaddr": "127.0.0.1"}
    if kind == "tap":
        return {"type": "tap", **netdev, "ifname": name, "script": "no", "downscript": "no"}
    if kind == "bridge":
        # QEMU makes the tap, which goes when QEMU does.
        ifname = bridge_port(owner, machine, nic.name)
        return {"type": "tap", **netdev, "ifname": ifname, "script": "no", "downscript": "no"}
    # A hub port of its own: nobody else is on the hub.
    return {"type": "hubport", **netdev, "hubid": _lonely_hub(nic.name)}


def _lonely_hub(nic: str) -> int:
    return int.from_bytes(hashlib.sha256(nic.encode()).digest()[:3])


def _forwards(nic: Nic) -> list[dict[str, str]]:
    return [
        {"str": f"{forward.protocol}:127.0.0.1:{forward.host}-:{forward.guest}"}
        for forward in nic.forwards
    ]


def parse_usernet(text: str) -> dict[str, list[tuple[str, int, int]]]:
    """Forwards by netdev out of the monitor's `info usernet`: protocol, host port, guest port."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    current: list[tuple[str, int, int]] = []
    for line in text.splitlines():
        if match := _BACKEND.match(line):
            current = found.setdefault(match["id"] or match["name"], [])
        elif match := _FORWARD.match(line):
            current.append((match["protocol"].lower(), int(match["host"]), int(match["guest"])))
    return found

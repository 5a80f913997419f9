"""What a NIC is connected to on the host: NAT, segments between machines, taps and bridges.

NAT ("user") and segments need no privileges. A segment is a multicast group on the loopback
interface, named by the owner's identity and the segment's name, so that two owners' segments of
one name are two. It keeps machines apart; it is no secret from other users of the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from typing import TYPE_CHECKING, Any

from vmlab.hypervisors.monitored.names import nic_backend
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import Nic

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

_FORWARD = re.compile(
    r"^\s*(?P<protocol>TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+\S+\s+(?P<host>\d+)\s+\S+\s+(?P<guest>\d+)\s"
)
_BACKEND = re.compile(r"^Hub -?\d+ \((?P<id>[^)]+)\):|^(?P<name>\S+)\\?.*:$")


def segment_group(owner: Owner, segment: str) -> tuple[str, int]:
    """The multicast group and port of a segment: 239.0.0.0/8 is "organization-local" (RFC 2365)."""
    identity = f"{owner}\0{owner.directory}\0{segment}"
    digest = hashlib.sha256(identity.encode()).digest()
    return f"239.{digest[0]}.{digest[1]}.{digest[2]}", 20_000 + int.from_bytes(digest[3:5]) % 40_000


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


def bridge_port(owner: Owner, machine: str, nic: str) -> str:
    """A name for the tap of a machine's NIC on a bridge: 15 bytes at most (IFNAMSIZ)."""
    digest = hashlib.sha256(f"{owner}/{machine}/{nic}".encode()).hexdigest()
    return f"vml{digest[:11]}"


async def join_bridge(tap: str, bridge: str) -> None:
    """Put a tap on a bridge and raise it.

    Raises:
        OperationFailed: `ip` is not there, or refused.
    """
    for words in (("link", "set", tap, "master", bridge), ("link", "set", tap, "up")):
        try:
            process = await asyncio.create_subprocess_exec(
                "ip",
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError as error:
            raise OperationFailed(
                "the command `ip` is not installed", hint="install iproute2", hypervisor="qemu"
            ) from error
        try:
            _, complaint = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            said = complaint.decode(errors="replace").strip()
            raise OperationFailed(
                f"ip {' '.join(words)} failed: {said}",
                hint=f"look whether the bridge {bridge!r} exists, and whether you are root",
                hypervisor="qemu",
            )


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

"""What machines' NICs are connected to on the host: segments between machines, and bridges.

A segment is a multicast group on the loopback interface, named by the owner's identity and the
segment's name, so that two owners' segments of one name are two. It keeps machines apart; it is no
secret from other users of the host.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vmlab.hypervisors.monitored.commands import run_command
from vmlab.machine.errors import OperationFailed

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner


def segment_group(owner: Owner, segment: str) -> tuple[str, int]:
    """The multicast group and port of a segment: 239.0.0.0/8 is "organization-local" (RFC 2365)."""
    whose = owner.segments or owner
    identity = f"{whose}\0{whose.directory}\0{segment}"
    digest = hashlib.sha256(identity.encode()).digest()
    return f"239.{digest[0]}.{digest[1]}.{digest[2]}", 20_000 + int.from_bytes(digest[3:5]) % 40_000


def bridge_port(owner: Owner, machine: str, nic: str) -> str:
    """A name for the tap of a machine's NIC on a bridge: 15 bytes at most (IFNAMSIZ)."""
    digest = hashlib.sha256(f"{owner}/{machine}/{nic}".encode()).hexdigest()
    return f"vml{digest[:11]}"


def port_alias(bridge: str) -> str:
    """What a tap says by its alias: which bridge it is a port of, also when that was removed."""
    return f"vmlab-port {bridge}"


async def join_bridge(tap: str, bridge: str) -> None:
    """Put a tap on a bridge and raise it; it says from then on which bridge that is.

    Raises:
        OperationFailed: `ip` is not there, or refused.
    """
    for words in (
        ("link", "set", tap, "master", bridge),
        ("link", "set", tap, "alias", port_alias(bridge)),
        ("link", "set", tap, "up"),
    ):
        try:
            status, _, said = await run_command("ip", *words)
        except FileNotFoundError as error:
            raise OperationFailed(
                "the command `ip` is not installed", hint="install iproute2"
            ) from error
        if status != 0:
            raise OperationFailed(
                f"ip {' '.join(words)} failed: {said}",
                hint=f"look whether the bridge {bridge!r} exists, and whether you are root",
            )

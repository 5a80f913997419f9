"""Faults as the commands that vmlab.engine.fault_commands takes, for whoever serves devices."""

from __future__ import annotations

import errno
import random
from typing import Any, Final

from vmlab.machine.faults import (
    Chance,
    DiskCorrupt,
    DiskError,
    DiskSlow,
    DiskTornWrite,
    Fault,
    NetDelay,
    NetLoss,
    Nth,
)

_ERRNO: Final = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
_ALL: Final = ("read", "write", "flush")
_SEED_BITS: Final = 63

RequestFault = DiskError | DiskSlow | DiskTornWrite
"""What happens to a disk's requests."""
FrameFault = NetLoss | NetDelay
"""What happens to a NIC's frames."""
Command = tuple[str, dict[str, Any]]


def trigger(fault: Fault, seed: int, identity: str) -> dict[str, Any]:
    """Which occasions are struck.

    Args:
        fault: Which; one that names no seed of its own draws from the machine's and its id.
        seed: The machine's.
        identity: The fault's id.
    """
    own = fault.seed
    if own is None:
        own = random.Random(f"{seed}/{identity}").getrandbits(_SEED_BITS)
    when: dict[str, Any] = {"seed": own}
    if isinstance(fault.when, Nth):
        when |= {"nth": fault.when.n, "every": fault.when.every}
    elif isinstance(fault.when, Chance):
        when |= {"probability": fault.when.probability}
    else:
        return when
    return when | {"duration": fault.duration or 0.0}


def disk_fault(fault: RequestFault, node: str, identity: str, seed: int) -> Command:
    """The command that has requests to a disk struck."""
    struck: dict[str, Any]
    if isinstance(fault, DiskError):
        operations = _ALL if fault.operation == "any" else (fault.operation,)
        struck = {"mishap": "error", "operations": [*operations], "errno": _ERRNO[fault.errno]}
    elif isinstance(fault, DiskSlow):
        struck = {"mishap": "slow", "delay": fault.delay}
    else:
        struck = {"mishap": "torn", "operations": ["write"], "keep": fault.keep}
    struck["when"] = trigger(fault, seed, identity)
    return "x-disk-fault", {"id": identity, "node-name": node, "fault": struck}


def corruption(fault: DiskCorrupt, node: str) -> Command:
    """The command that changes bytes of a disk."""
    place = {"offset": fault.offset, "length": fault.length}
    return "x-disk-corrupt", {"node-name": node, **place}


def net_fault(fault: FrameFault, device: str, identity: str, seed: int) -> Command:
    """The command that has frames of a NIC struck."""
    struck: dict[str, Any] = {"when": trigger(fault, seed, identity)}
    if isinstance(fault, NetLoss):
        struck["ratio"] = fault.ratio
    else:
        struck |= {"delay": fault.delay, "jitter": fault.jitter}
    return "x-net-fault", {"id": identity, "name": device, "fault": struck}


def ending(identity: str) -> Command:
    """The command that ends a fault of a disk's or a NIC's."""
    return "x-fault-end", {"id": identity}

"""Names and addresses of a machine's devices: the same in every process of the machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from vmlab.machine.errors import ResourceExhausted
from vmlab.machine.spec import MachineSpec

_LONGEST_NODE = 31
"""Bytes of a node name (BlockDriverState.node_name in QEMU's block_int-common.h, less the NUL)."""


def node_name(disk: str) -> str:
    """The name of a disk's block node; QEMU's names are shorter than ours may be."""
    name = f"d-{disk}"
    return (
        name if len(name) <= _LONGEST_NODE else "x-" + hashlib.sha1(name.encode()).hexdigest()[:28]
    )


def disk_device(disk: str) -> str:
    """The id of a disk's device."""
    return f"disk-{disk}"


def nic_device(nic: str) -> str:
    """The id of a NIC's device."""
    return f"nic-{nic}"


def nic_backend(nic: str) -> str:
    """The id of a NIC's other side on the host."""
    return f"net-{nic}"


def made_mac(spec: MachineSpec, nic: str, taken: Iterable[str] = ()) -> str:
    """A MAC address out of the seed and the names, in QEMU's range 52:54:00."""
    for attempt in range(1 << 16):
        text = f"{spec.seed}/{spec.name}/{nic}/{attempt}"
        digest = hashlib.sha256(text.encode()).digest()
        mac = "52:54:00:" + digest[:3].hex(":")
        if mac not in taken:
            return mac
    raise ResourceExhausted("no MAC address is left in 52:54:00")

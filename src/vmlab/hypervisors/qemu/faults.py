"""Errors of a disk, by QEMU's blkdebug filter between the disk and its image while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.names import disk_device
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.hotplug import drop_made_node
from vmlab.hypervisors.qmp import QmpError, QmpTimeout
from vmlab.machine.faults import DiskError

_ERRNO: Final = {"EIO": 5, "ENOSPC": 28}
_IOTYPES: Final = {
    "read": ("read",),
    "write": ("write", "write-zeroes", "discard"),
    "flush": ("flush",),
    "any": ("read", "write", "write-zeroes", "discard", "flush"),
}
"""BlkdebugIOType of each operation (QEMU's block-core.json)."""

_numbers = itertools.count(1)


async def fail_disk(
    emulator: Emulator, disk: DiskFile, bus: str, fault: DiskError
) -> Callable[[], Awaitable[None]]:
    """Have a disk on that bus fail; what is returned mends it."""
    broken = f"broken-{next(_numbers)}"
    rules = [
        {"event": "none", "iotype": kind, "errno": _ERRNO[fault.errno], "once": False}
        for kind in _IOTYPES[fault.operation]
    ]
    node = {
        "driver": "blkdebug",
        "node-name": broken,
        "image": disk.node,
        "read-only": disk.readonly,
        "inject-error": rules,
    }
    try:
        await emulator.execute("blockdev-add", node)
        await _insert(emulator, disk, bus, broken)
    except (QmpError, QmpTimeout):
        with suppress(QmpError):
            await _insert(emulator, disk, bus, disk.node)
        await drop_made_node(emulator, broken)
        raise

    async def mend() -> None:
        await _insert(emulator, disk, bus, disk.node)
        await emulator.execute("blockdev-del", {"node-name": broken})

    return mend


async def _insert(emulator: Emulator, disk: DiskFile, bus: str, node: str) -> None:
    """Have a disk's device use another block node."""
    device = f"/machine/peripheral/{disk_device(disk.name)}"
    if bus == "virtio":
        device += "/virtio-backend"
    await emulator.execute("qom-set", {"path": device, "property": "drive", "value": node})

"""Disks and NICs that come and go while the machine runs.

A device is gone when QEMU says so (DEVICE_DELETED), which a guest with PCI hot-plug has to agree
to; only then is its other side on the host taken away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.hotplug import remove_device
from vmlab.hypervisors.monitored.names import disk_device, nic_backend, nic_device
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.boards import Board
from vmlab.hypervisors.qemu.command_line import disk_options, nic_options
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import Layout
from vmlab.hypervisors.qmp import QmpError

_RELEASE_S: Final = 0.01
"""Seconds between two tries to take a node away that a device was just taken off."""
_STUCK_S: Final = 1.0
"""Seconds after which such a node is in use because of a guest in a loop."""
_HELD_S: Final = 30.0
"""Seconds after which somebody else uses it."""


async def add_disk(emulator: Emulator, layout: Layout, board: Board, disk: DiskFile) -> None:
    """Add a disk; nothing is left of one that is refused.

    When it is cancelled QEMU may add the disk all the same: `take_back` is for that.
    """
    await emulator.execute("blockdev-add", disk.block_node())
    try:
        await emulator.execute("device_add", disk_options(layout, board, disk))
    except QmpError:
        await uninterrupted(drop_node(emulator, disk.node))
        raise


async def drop_node(emulator: Emulator, node: str) -> None:
    """Take away a block node that no device uses any more."""
    now = asyncio.get_running_loop().time
    began = now()
    stuck = began + _STUCK_S
    while True:
        try:
            if emulator.running:
                await emulator.execute("blockdev-del", {"node-name": node})
            return
        except QmpError as error:
            if "in use" not in error.message or now() >= began + _HELD_S:
                raise
        # A device lets go of its node a moment after it has told that it is gone, when QEMU's RCU
        # callbacks run.
        await asyncio.sleep(_RELEASE_S)
        if now() >= stuck:
            await _interrupt(emulator)
            stuck = now() + _STUCK_S


async def _interrupt(emulator: Emulator) -> None:
    """Have the vCPUs leave the code they are in for a moment.

    Under TCG a guest in a loop without interrupts keeps RCU's callbacks from running for ever. A
    device_add that fails has them run as well, but hangs for as long, and all of QMP with it, if
    they have begun to wait by then (util/rcu.c: drain_call_rcu, wait_for_readers).
    """
    if (await emulator.execute("query-status"))["status"] == "running":
        await emulator.execute("stop")
        with suppress(QmpError):
            # The guest may have ended just before it.
            await emulator.execute("cont")


async def drop_made_node(emulator: Emulator, node: str) -> None:
    """Take away a block node that was being made, whether it came about or not.

    One that stays in use is an error.
    """
    try:
        await drop_node(emulator, node)
    except QmpError as error:
        if "in use" in error.message:
            raise


async def add_nic(
    emulator: Emulator, layout: Layout, board: Board, nic: str, netdev: Mapping[str, Any]
) -> None:
    """Add a NIC; nothing is left of one that is refused.

    When it is cancelled QEMU may add the NIC all the same: `take_back_nic` is for that.
    """
    await emulator.execute("netdev_add", netdev)
    try:
        await emulator.execute("device_add", nic_options(layout, board, nic))
    except QmpError:
        await uninterrupted(_drop_netdev(emulator, nic))
        raise


async def _drop_netdev(emulator: Emulator, nic: str) -> None:
    if emulator.running:
        await emulator.execute("netdev_del", {"id": nic_backend(nic)})


async def remove_disk(emulator: Emulator, disk: DiskFile) -> None:
    """Remove a disk and wait until the guest has let go of it.

    Raises:
        QmpLost: the process has ended.
    """
    await remove_device(emulator, disk_device(disk.name))
    await uninterrupted(drop_node(emulator, disk.node))


async def remove_nic(emulator: Emulator, nic: str) -> None:
    """Remove a NIC and wait until the guest has let go of it."""
    await remove_device(emulator, nic_device(nic))
    await uninterrupted(_drop_netdev(emulator, nic))


async def take_back(emulator: Emulator, disk: DiskFile) -> None:
    """Remove a disk whose adding was interrupted, as far as it got."""
    if emulator.running:
        await remove_device(emulator, disk_device(disk.name))
        await drop_made_node(emulator, disk.node)


async def take_back_nic(emulator: Emulator, nic: str) -> None:
    """Remove a NIC whose adding was interrupted, as far as it got."""
    if emulator.running:
        await remove_device(emulator, nic_device(nic))
        with suppress(QmpError):
            # It may not have come about.
            await _drop_netdev(emulator, nic)

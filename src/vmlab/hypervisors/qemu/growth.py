"""vCPUs and memory that come to a running machine by ACPI.

Something has come when the guest says so (ACPI_DEVICE_OST with status 0: ACPI 6.4, 6.3.5). Whether
it then uses it is up to its udev rules; of memory the kernel is told to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from vmlab.hypervisors.monitored.hotplug import remove_device
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import dimm_device, memory_object, vcpu_device
from vmlab.hypervisors.qmp import QmpError, QmpLost, QmpTimeout
from vmlab.machine.errors import OperationFailed
from vmlab.machine.sizes import MIB, format_size

BLOCK: Final = 128 * MIB
"""Bytes that Linux takes memory in by (MIN_MEMORY_BLOCK_SIZE on x86, a sparse section)."""
_TAKE_BACK_S: Final = 10.0
"""Seconds that a guest has to let go of memory that it was about to take."""


async def add_vcpus(emulator: Emulator, count: int, came: list[dict[str, Any]]) -> None:
    """Add vCPUs up to `count`.

    Args:
        emulator: The process.
        count: vCPUs that there are to be.
        came: The devices of those that came while it ran; those that come are added.

    Raises:
        OperationFailed: there is no place for so many, or there are more.
    """
    while True:
        slots = await emulator.execute("query-hotpluggable-cpus")
        free = [slot for slot in slots if "qom-path" not in slot]
        present = len(slots) - len(free)
        if present == count:
            return
        if present > count:
            # QEMU can take them away, but its TCG frees what it goes on using (seen with 7.2: the
            # process dies of a corrupted heap some time afterwards).
            raise _refused(
                emulator,
                f"a running machine keeps its {present} vCPUs, and cannot go on with {count}: "
                "QEMU's TCG crashes some time after one was taken away",
                "stop the machine first: at rest the number of vCPUs can be made smaller",
            )
        if not free:
            raise _refused(
                emulator,
                f"there is room for {len(slots)} vCPUs only, not for {count}",
                "give cpus.maximum when the machine is created",
            )
        # The list begins with the last one.
        slot, device = free[-1], vcpu_device(present)
        options = {"driver": slot["type"], "id": device, **slot["props"]}
        try:
            await _add_device(emulator, device, options)
        except (asyncio.CancelledError, QmpTimeout):
            # Only QEMU knows how far it got.
            if await uninterrupted(_has_vcpu(emulator, slot)):
                came.append(options)
            raise
        came.append(options)


async def _has_vcpu(emulator: Emulator, slot: Mapping[str, Any]) -> bool:
    """Whether there is a vCPU in a place that was free."""
    if not emulator.running:
        return False
    slots = await emulator.execute("query-hotpluggable-cpus")
    return any("qom-path" in found and found["props"] == slot["props"] for found in slots)


async def add_memory(emulator: Emulator, number: int, size: int) -> None:
    """Add a memory module.

    Args:
        emulator: The process.
        number: Of its memory object.
        size: Bytes.

    Raises:
        OperationFailed: the size is none that a guest takes, or the guest refused it.
    """
    if size % BLOCK:
        raise _refused(
            emulator,
            f"{format_size(size)} of memory cannot be added: Linux takes it in blocks of "
            f"{format_size(BLOCK)}",
            "add a multiple of that",
        )
    name = memory_object(number)
    backend = {"qom-type": "memory-backend-memfd", "id": name, "size": size, "share": True}
    await emulator.execute("object-add", backend)
    device = dimm_device(number)
    try:
        await _add_device(emulator, device, {"driver": "pc-dimm", "id": device, "memdev": name})
    except QmpError:
        await emulator.execute("object-del", {"id": name})
        raise


async def _add_device(emulator: Emulator, device: str, options: Mapping[str, Any]) -> None:
    """Add a device and wait until the guest has taken it.

    Raises:
        OperationFailed: the guest did not take it.
        MachineCrashed: the process ended meanwhile.
    """
    with emulator.qmp.listen(
        "ACPI_DEVICE_OST", match=lambda event: event.data["info"].get("device") == device
    ) as answered:
        await emulator.execute("device_add", options)
        try:
            status = (await answered.wait()).data["info"]["status"]
        except QmpLost as error:
            raise await emulator.crashed("device_add", error) from error
    if status != 0:
        with suppress(QmpError):
            await emulator.execute("device_del", {"id": device})
        raise _refused(
            emulator,
            f"the guest did not take {device} (_OST status {status:#x})",
            "the guest's kernel log says why",
        )


async def take_memory_back(emulator: Emulator, number: int) -> bool:
    """Take away a memory module whose adding was interrupted; False if the guest keeps it."""
    if not emulator.running:
        return True
    try:
        async with asyncio.timeout(_TAKE_BACK_S):
            await remove_device(emulator, dimm_device(number))
    except TimeoutError:
        return False
    with suppress(QmpError):
        # It may not have come about.
        await emulator.execute("object-del", {"id": memory_object(number)})
    return True


def _refused(emulator: Emulator, message: str, hint: str) -> OperationFailed:
    return OperationFailed(
        message, hint=hint, machine=emulator.machine, hypervisor="qemu", operation="resize"
    )

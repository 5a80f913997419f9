"""Disk images by qemu-img, and disks as QEMU's command line and `device_add` take them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmlab.hypervisors.monitored import disks
from vmlab.hypervisors.monitored.commands import run_command
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import Disk


def device_options(disk: DiskFile, bus: str) -> dict[str, Any]:
    """A disk's device, without its place."""
    driver = "scsi-hd" if bus == "scsi" else "virtio-blk-pci"
    device = {"driver": driver, "drive": disk.node, "serial": disk.serial_number}
    # Whoever breaks a disk wants its guest to see that; QEMU stops it when there is no space left.
    return device | ({"werror": "report", "rerror": "report"} if disk.breakable else {})


class QemuImg:
    """Makes images by qemu-img."""

    async def create(self, path: Path, size: int, base: Path | None, base_format: str) -> str:
        below = ("-b", str(base), "-F", base_format) if base is not None else ()
        await qemu_img("create", "-q", "-f", "qcow2", *below, str(path), str(size))
        return "qcow2"

    async def virtual_size(self, path: Path, form: str) -> int:
        return int((await image_info(path, form))["virtual-size"])


async def make_disk(disk: Disk, path: Path) -> DiskFile:
    """Make a machine's disk: an image at `path`, or nothing where `source` is only read.

    Raises:
        InvalidSpec: `source` is not there, is larger than `size`, or is no disk image.
        OperationFailed: qemu-img failed.
    """
    made = await disks.make_disk(disk, path, QemuImg(), "qemu")
    return replace(made, breakable=disk.breakable)


async def image_info(path: Path, form: str) -> dict[str, Any]:
    """What qemu-img says of an image, which may be in use.

    Raises:
        OperationFailed: it is no image of that format.
    """
    answer = await qemu_img("info", "-U", "--output=json", "-f", form, str(path))
    described: dict[str, Any] = json.loads(answer)
    return described


async def grow_image(disk: DiskFile, size: int) -> None:
    """Make an image that is not in use `size` bytes large.

    Raises:
        OperationFailed: qemu-img failed.
    """
    await qemu_img("resize", "-q", "-f", disk.format, str(disk.path), str(size))


async def qemu_img(*arguments: str) -> str:
    """Run qemu-img and return what it prints; a cancelled call leaves no process.

    Raises:
        OperationFailed: it is not installed, or it failed; with what it said.
    """
    try:
        status, output, complaint = await run_command("qemu-img", *arguments)
    except FileNotFoundError as error:
        raise OperationFailed(
            "qemu-img is not installed",
            hint="`vmlab doctor` tells how to install it",
            hypervisor="qemu",
        ) from error
    if status != 0:
        said = complaint.rpartition("\n")[2]
        raise OperationFailed(
            f"qemu-img {arguments[0]} failed: {said or f'status {status}'}",
            hint="look whether the image is whole and the file system has space",
            hypervisor="qemu",
        )
    return output

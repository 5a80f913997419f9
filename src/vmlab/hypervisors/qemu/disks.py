"""Disk images: made, grown and copied by qemu-img, and described to QEMU as block nodes.

A disk that the guest may write to is a qcow2 overlay in the machine's directory; what lies below
it, its `source`, is never written to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from vmlab.hypervisors.qemu.layout import node_name
from vmlab.hypervisors.qemu.threads import done_in_thread
from vmlab.machine.errors import InvalidSpec, OperationFailed, SpecProblem
from vmlab.machine.spec import Disk

_QCOW2_MAGIC = b"QFI\xfb"
_SECTOR = 512
_LONGEST_SERIAL = 20
"""Bytes of a virtio-blk serial number (VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6)."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A disk of a machine and the file that holds it; `size` in bytes.

    `made` tells a file that was made for the machine, and goes with it, from a `source`.
    """

    name: str
    path: Path
    format: str
    size: int
    readonly: bool
    made: bool
    serial: str | None = None

    @property
    def node(self) -> str:
        """Name of its block node."""
        return node_name(self.name)

    def block_node(self) -> dict[str, Any]:
        """What `blockdev-add` and `-blockdev` take (docs/interop/qemu-qmp-ref, BlockdevOptions)."""
        node: dict[str, Any] = {
            "driver": self.format,
            "node-name": self.node,
            "read-only": self.readonly,
            "discard": "unmap",
            "file": {
                "driver": "file",
                "filename": str(self.path),
                "read-only": self.readonly,
                "discard": "unmap",
            },
        }
        return node

    def device(self, bus: str) -> dict[str, Any]:
        """What `device_add` and `-device` take, without the place."""
        driver = "scsi-hd" if bus == "scsi" else "virtio-blk-pci"
        device: dict[str, Any] = {"driver": driver, "drive": self.node}
        # Without a serial number of its own a disk is found in the guest by its name.
        device["serial"] = self.serial or self.name[:_LONGEST_SERIAL]
        return device

    def to_record(self) -> dict[str, Any]:
        """The disk as JSON-ready data."""
        return {
            "name": self.name,
            "path": str(self.path),
            "format": self.format,
            "size": self.size,
            "readonly": self.readonly,
            "made": self.made,
            "serial": self.serial,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The disk that `to_record` described."""
        return cls(**{**record, "path": Path(record["path"])})

    def grown(self, size: int) -> Self:
        """The same disk, larger."""
        return replace(self, size=size)

    def at(self, path: Path) -> Self:
        """The same disk in another file."""
        return replace(self, path=path)


def image_format(path: Path) -> str:
    """Whether an image is "qcow2" or "raw", by its first bytes."""
    with path.open("rb") as image:
        return "qcow2" if image.read(4) == _QCOW2_MAGIC else "raw"


async def make_disk(disk: Disk, path: Path, *, field: str = "disks") -> DiskFile:
    """Make a machine's disk: an overlay at `path`, or nothing where `source` is only read.

    Raises:
        InvalidSpec: `source` is not there, is larger than `size`, or is no disk image.
        OperationFailed: qemu-img failed.
    """
    if disk.source is None:
        assert disk.size is not None
        await qemu_img("create", "-q", "-f", "qcow2", str(path), str(disk.size))
        return DiskFile(disk.name, path, "qcow2", disk.size, disk.readonly, True, disk.serial)
    source = disk.source.absolute()
    try:
        form: str
        form = await done_in_thread(image_format, source) if not disk.format else disk.format
    except OSError as error:
        raise _wrong(
            f"{field}.{disk.name}.source", source, f"an image that can be read: {error.strerror}"
        ) from error
    below = int((await image_info(source, form))["virtual-size"])
    size = disk.size or -(-below // _SECTOR) * _SECTOR
    if size < below:
        raise _wrong(f"{field}.{disk.name}.size", size, f"at least the {below} of its source")
    if disk.readonly and disk.size in {None, below}:
        return DiskFile(disk.name, source, form, size, True, False, disk.serial)
    overlay = ("-b", str(source), "-F", form, str(path), str(size))
    await qemu_img("create", "-q", "-f", "qcow2", *overlay)
    return DiskFile(disk.name, path, "qcow2", size, disk.readonly, True, disk.serial)


def _wrong(field: str, value: object, expected: str) -> InvalidSpec:
    return InvalidSpec([SpecProblem(field, value, expected)], hypervisor="qemu")


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
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise OperationFailed(
            "qemu-img is not installed",
            hint="`vmlab doctor` tells how to install it",
            hypervisor="qemu",
        ) from error
    try:
        output, complaint = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        said = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise OperationFailed(
            f"qemu-img {arguments[0]} failed: {said or f'status {process.returncode}'}",
            hint="look whether the image is whole and the file system has space",
            hypervisor="qemu",
        )
    return output.decode()

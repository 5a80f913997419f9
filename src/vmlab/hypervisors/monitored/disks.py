"""Disk images of machines: which file a disk is in, and what makes it.

A disk that the guest may write to is an image in the machine's directory; what lies below it, its
`source`, is never written to. One with a `file` of its own is that file, which nobody removes here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from vmlab.hypervisors.monitored.names import node_name
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.spec import Disk

_QCOW2_MAGIC = b"QFI\xfb"
_SECTOR = 512
_LONGEST_SERIAL = 20
"""Bytes of a virtio-blk serial number (VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6)."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A disk of a machine and the file that holds it; `size` in bytes.

    `made` tells a file that was made for the machine, and goes with it, from a `source` that is
    only read or a `file` that is written to; one that is `breakable` is served by a process of
    its own, where the machine's process would not do.
    """

    name: str
    path: Path
    format: str
    size: int
    readonly: bool
    made: bool
    serial: str | None = None
    breakable: bool = False

    @property
    def socket(self) -> str:
        """Name of the socket at which a breakable disk is served, beside its process."""
        return f"{self.node}.nbd.sock"

    @property
    def node(self) -> str:
        """Name of its block node."""
        return node_name(self.name)

    def block_node(self) -> dict[str, Any]:
        """What `blockdev-add` and `-blockdev` take (docs/interop/qemu-qmp-ref, BlockdevOptions)."""
        if self.breakable:
            return {
                "driver": "nbd",
                "node-name": self.node,
                "read-only": self.readonly,
                "discard": "unmap",
                "server": {"type": "unix", "path": self.socket},
            }
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

    @property
    def serial_number(self) -> str:
        """What a guest finds the disk by: without a serial number of its own, its name."""
        return self.serial or self.name[:_LONGEST_SERIAL]

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
            "breakable": self.breakable,
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


class ImageMaker(Protocol):
    """What makes images and knows how large they are."""

    async def create(self, path: Path, size: int, base: Path | None, base_format: str) -> str:
        """Make an image of `size` bytes, over `base` if there is one; returns its format.

        Raises:
            OperationFailed: it cannot be made.
        """

    async def virtual_size(self, path: Path, form: str) -> int:
        """The bytes of the disk in an image, which may be in use.

        Raises:
            OperationFailed: it is no image of that format.
        """


async def make_disk(disk: Disk, path: Path, maker: ImageMaker, hypervisor: str) -> DiskFile:
    """Make a machine's disk: an image at `path`, or nothing where `source` is only read.

    Raises:
        InvalidSpec: `source` or `file` is not there, has not a fitting `size`, or is no disk image.
        OperationFailed: it cannot be made.
    """
    if disk.file is not None:
        return await _in_place(disk, disk.file.absolute(), maker, hypervisor)
    if disk.source is None:
        assert disk.size is not None
        made = await maker.create(path, disk.size, None, "")
        return DiskFile(disk.name, path, made, disk.size, disk.readonly, True, disk.serial)
    source = disk.source.absolute()
    wrong = partial(_wrong, disk, hypervisor)
    try:
        form: str
        form = await done_in_thread(image_format, source) if not disk.format else disk.format
    except OSError as error:
        expected = f"an image that can be read: {error.strerror}"
        raise wrong("source", source, expected) from error
    below = await maker.virtual_size(source, form)
    size = disk.size or -(-below // _SECTOR) * _SECTOR
    if size < below:
        raise wrong("size", size, f"at least the {below} of its source")
    if disk.readonly and disk.size in {None, below}:
        return DiskFile(disk.name, source, form, size, True, False, disk.serial)
    made = await maker.create(path, size, source, form)
    return DiskFile(disk.name, path, made, size, disk.readonly, True, disk.serial)


def _wrong(disk: Disk, hypervisor: str, field: str, value: object, expected: str) -> InvalidSpec:
    problem = SpecProblem(f"disks.{disk.name}.{field}", value, expected)
    return InvalidSpec([problem], hypervisor=hypervisor)


async def _in_place(disk: Disk, path: Path, maker: ImageMaker, hypervisor: str) -> DiskFile:
    """A disk that is a file of somebody else's, which stays where it is."""
    wrong = partial(_wrong, disk, hypervisor)
    assert disk.format is not None
    try:
        found, size = await done_in_thread(_looked_at, path, disk.readonly)
    except OSError as error:
        expected = f"an image that can be {'read' if disk.readonly else 'written to'}"
        raise wrong("file", path, f"{expected}: {error.strerror}") from error
    if disk.format == "qcow2" and found != "qcow2":
        raise wrong("format", disk.format, f'"raw": {path} is no image in qcow2')
    if disk.format == "qcow2":
        size = await maker.virtual_size(path, disk.format)
    if size == 0 or size % _SECTOR:
        expected = f"an image of a positive multiple of {_SECTOR} bytes: it has {size}"
        raise wrong("file", path, expected)
    if disk.size not in {None, size}:
        raise wrong("size", disk.size, f"left out, or the {size} that its file has")
    return DiskFile(disk.name, path, disk.format, size, disk.readonly, False, disk.serial)


def _looked_at(path: Path, readonly: bool) -> tuple[str, int]:
    """The format of an image by its first bytes, and the bytes that it has as a raw one.

    Raises:
        OSError: it cannot be opened as it has to be.
    """
    with path.open("rb" if readonly else "r+b") as image:
        size = image.seek(0, os.SEEK_END)
    return image_format(path), size

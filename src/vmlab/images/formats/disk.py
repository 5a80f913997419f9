"""Telling disk images apart, and refusing what a guest's disk must not be.

Not a converter: that is qemu-img's. Follows docs/interop/qcow2.rst of QEMU.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.errors import FormatError
from vmlab.images.formats.compression import decompressed, identify
from vmlab.images.progress import Progress, ProgressEvent, silent

_QCOW2 = b"QFI\xfb"
_EXTERNAL_DATA = 1 << 2  # incompatible feature bit 2
_FOREIGN = {
    b"KDMV": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"# Disk DescriptorFile": "VMDK",
    b"<<< Oracle VM": "VDI",
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class DiskInfo:
    """A disk image: `format` "raw" or "qcow2", and the disk's size in bytes."""

    format: str
    size: int


def inspect(path: Path) -> DiskInfo:
    """What kind of disk image a file holds.

    Raises:
        FormatError: of a kind that cannot be used, or a qcow2 that refers to other files, which
            could make a guest read any file of the host.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(_QCOW2):
        return _qcow2(head, path.name)
    foreign = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None)
    if foreign is not None:
        raise FormatError(
            f"{path.name} is a {foreign} image", hint=f"convert it: qemu-img convert -O qcow2 "
            f"{path.name} disk.qcow2"
        )  # fmt: skip
    size = path.stat().st_size
    if size == 0 or size % 512:
        raise FormatError(
            f"{path.name} is no disk image: {size} bytes are no whole number of sectors",
            hint="give a qcow2 or raw image; compressed ones may end in .gz, .xz or .zst",
        )
    return DiskInfo("raw", size)


def _qcow2(head: bytes, source: str) -> DiskInfo:
    if len(head) < 104:
        raise FormatError(f"{source} is a qcow2 image that is cut short")
    version, backing = struct.unpack_from(">IQ", head, 4)
    (size,) = struct.unpack_from(">Q", head, 24)
    if version not in (2, 3):
        raise FormatError(f"{source} is a qcow2 image of the unknown version {version}")
    features = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
    if backing or features & _EXTERNAL_DATA:
        raise FormatError(
            f"{source} is a qcow2 image that needs another file",
            hint=f"make it stand alone: qemu-img convert -O qcow2 {source} disk.qcow2",
        )
    return DiskInfo("qcow2", size)


def copy(source: Path, target: Path, *, progress: Progress = silent) -> None:
    """Copy a disk image, decompressed if it is compressed, with holes where it holds zeros.

    Raises:
        FormatError: the compressed image is damaged.
    """
    with source.open("rb") as file:
        compressed = identify(file.read(8)) is not None
        file.seek(0)
        total = None if compressed else source.stat().st_size
        step = f"copying {source.name}"
        done = 0
        zeros = bytes(_BLOCK)
        with decompressed(file, source=source.name) as stream, target.open("wb") as output:
            while block := stream.read(_BLOCK):
                if block == zeros[: len(block)]:
                    output.seek(len(block), os.SEEK_CUR)
                else:
                    output.write(block)
                done += len(block)
                progress(ProgressEvent(step, done, total))
            output.truncate(done)
        progress(ProgressEvent(step, done, done, finished=True))

"""Disks as Debian's generic cloud images have them: a GPT with root, BIOS boot and EFI partitions.

UEFI specification 2.10, chapter 5. The numbers are those of `debian-12-generic-amd64`: the root is
partition 1 and comes last, so that it can grow; 14 is GRUB's, 15 the EFI system partition.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
ROOT = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
BIOS_BOOT = uuid.UUID("21686148-6449-6e6f-744e-656564454649")
EFI_SYSTEM = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
FIRST = 34
"""The first sector after the table."""
_ENTRIES = 128
_KERNEL_SECTOR = 0x5C  # of GRUB's boot.img (include/grub/i386/pc/boot.h)
_BLOCKLIST = SECTOR - 12  # of the first sector of GRUB's core.img: start, length, segment


@dataclass(frozen=True)
class Partition:
    """A partition: its number, its type, its first sector, its bytes."""

    number: int
    kind: uuid.UUID
    start: int
    size: int


def write(disk: Path, size: int, partitions: Sequence[Partition], *, boot_code: bytes) -> None:
    """Write the tables into a file that is made `size` bytes long; what else it has stays."""
    sectors = size // SECTOR
    table = bytearray(_ENTRIES * 128)
    for part in partitions:
        struct.pack_into(
            "<16s16sQQQ72s", table, (part.number - 1) * 128, part.kind.bytes_le,
            uuid.uuid5(part.kind, str(part.number)).bytes_le, part.start,
            part.start + part.size // SECTOR - 1, 0, b"",
        )  # fmt: skip
    protective = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, sectors - 1)
    with disk.open("r+b" if disk.exists() else "w+b") as file:
        file.truncate(size)
        file.seek(0)
        file.write(boot_code[:440].ljust(446, b"\0") + protective.ljust(64, b"\0") + b"\x55\xaa")
        for own, other, entries in ((1, sectors - 1, 2), (sectors - 1, 1, sectors - 33)):
            header = bytearray(struct.pack(
                "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, own, other, FIRST,
                sectors - FIRST, uuid.uuid5(ROOT, disk.name).bytes_le, entries, _ENTRIES, 128,
                zlib.crc32(table),
            ))  # fmt: skip
            struct.pack_into("<I", header, 16, zlib.crc32(header))
            file.seek(own * SECTOR)
            file.write(header)
            file.seek(entries * SECTOR)
            file.write(table)


def place(disk: Path, start: int, data: bytes) -> None:
    """Write the contents of a partition that begins at a sector."""
    with disk.open("r+b") as file:
        file.seek(start * SECTOR)
        file.write(data)


def grub(boot_image: bytes, core_image: bytes, start: int) -> tuple[bytes, bytes]:
    """What `grub-bios-setup` makes of GRUB's two images for a core image at a sector."""
    first, core = bytearray(boot_image), bytearray(core_image)
    struct.pack_into("<Q", first, _KERNEL_SECTOR, start)
    length = -(-len(core) // SECTOR) - 1
    struct.pack_into("<QHH", core, _BLOCKLIST, start + 1, length, 0x820)
    return bytes(first), bytes(core)

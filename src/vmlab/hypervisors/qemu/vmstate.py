"""The stream of vCPU, device and memory state that `snapshot-save` hides inside a qcow2 image.

QEMU writes it behind the end of the virtual disk, mapped by the snapshot's own L1 table. Read out,
it is what `migrate-incoming` takes. Layout: QEMU's docs/interop/qcow2.txt, "Snapshots" and
"Cluster mapping".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from vmlab.machine.errors import CorruptSnapshot

_MAGIC: Final = b"QFI\xfb"
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_LARGEST_TABLE: Final = 32 << 20
"""Bytes of an L1 table (QCOW_MAX_L1_SIZE in QEMU's block/qcow2.h)."""
_LARGEST_EXTRA: Final = 1024
"""Bytes of what QEMU adds to a snapshot's description (QCOW_MAX_SNAPSHOT_EXTRA_DATA)."""


@dataclass(frozen=True, slots=True)
class _SavedState:
    """Where a snapshot's state is: its L1 table, and the bytes that count."""

    table: int
    entries: int
    size: int


def extract(image: Path, output: Path, snapshot: str) -> int:
    """Write the state that `snapshot` holds in `image` to `output`; returns its size in bytes.

    Raises:
        CorruptSnapshot: the image is no qcow2 image or does not hold that state.
        OSError: it cannot be read, or `output` not written.
    """
    try:
        with image.open("rb") as source, output.open("wb") as target:
            return sum(target.write(part) for part in _parts(source, snapshot))
    except (struct.error, ValueError) as error:
        raise CorruptSnapshot(
            f"the saved state {image.name} cannot be read: {error}",
            hint="take the snapshot again",
        ) from error


def _parts(source: BinaryIO, snapshot: str) -> Iterator[bytes]:
    """The state, cluster by cluster."""
    header = _HEADER.unpack(source.read(_HEADER.size))
    magic, version, cluster_bits, disk_size = header[0], header[1], header[4], header[5]
    if magic != _MAGIC or version not in {2, 3} or not 9 <= cluster_bits <= 21:
        raise ValueError("it is no qcow2 image")
    saved = _find(source, header[11], header[12], snapshot)
    cluster = 1 << cluster_bits
    per_table = cluster // 8
    # The first L1 entry behind the virtual disk (qcow2_vm_state_offset in block/qcow2.h).
    first = -(-disk_size // (cluster * per_table))
    tables = _numbers(source, saved.table, saved.entries)[first:]
    left = saved.size
    for table in tables:
        offset = table & _OFFSET_MASK
        if not offset:
            break
        for entry in _numbers(source, offset, per_table):
            if not left:
                return
            part = _cluster(source, entry, min(cluster, left))
            left -= len(part)
            yield part
    if left:
        raise ValueError(f"{left} bytes of the state are missing")


def _cluster(source: BinaryIO, entry: int, size: int) -> bytes:
    offset = entry & _OFFSET_MASK
    # QEMU writes every byte of a state, so that there are no holes in one.
    if not offset or entry & (_COMPRESSED | _ZERO):
        raise ValueError("a cluster of the state is missing")
    return _read_at(source, offset, size)


def _read_at(source: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, all of them."""
    data = b""
    if offset + size <= os.fstat(source.fileno()).st_size:
        source.seek(offset)
        data = source.read(size)
    if len(data) < size:
        raise ValueError("it ends too early")
    return data


def _numbers(source: BinaryIO, offset: int, count: int) -> tuple[int, ...]:
    """`count` big-endian 64-bit numbers."""
    if count * 8 > _LARGEST_TABLE:
        raise ValueError(f"a table of {count} entries is too long")
    return struct.unpack(f">{count}Q", _read_at(source, offset, 8 * count))


def _find(source: BinaryIO, count: int, offset: int, name: str) -> _SavedState:
    """Look through the snapshot table."""
    for _ in range(count):
        entry = _SNAPSHOT.unpack(_read_at(source, offset, _SNAPSHOT.size))
        table, entries, id_size, name_size, size, extra_size = (
            entry[0],
            entry[1],
            entry[2],
            entry[3],
            entry[7],
            entry[8],
        )
        if extra_size > _LARGEST_EXTRA:
            raise ValueError("a snapshot's description is too long")
        extra = source.read(extra_size)
        rest = source.read(id_size + name_size)
        if extra_size >= 8:
            size = struct.unpack_from(">Q", extra)[0] or size
        if rest[id_size:].decode("utf-8", "replace") == name:
            return _SavedState(table, entries, size)
        offset += -(-(_SNAPSHOT.size + extra_size + id_size + name_size) // 8) * 8
    raise ValueError(f"it has no snapshot {name!r}")

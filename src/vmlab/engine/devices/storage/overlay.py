"""Copy-on-write overlays in qcow2 (QEMU's docs/interop/qcow2.txt, versions 2 and 3).

An overlay holds the clusters that were written and leaves the rest to its base, which is only
read. The format is QEMU's so that qemu-img can check, compare and convert what is written here.
Not here: compressed clusters, internal snapshots, encryption, external data files.

Metadata is written in an order that a killed process cannot break: a cluster is counted, filled,
and only then entered. What is lost is at most a cluster that nothing points to.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmlab.engine.devices.storage.disk import (
    Disk,
    RawDisk,
    open_image,
    punch_hole,
    read_all,
    write_all,
)
from vmlab.machine.errors import VmlabError

_MAGIC: Final = 0x5146_49FB
_HEADER: Final = struct.Struct(">IIQIIQIIQQIIQ")
_HEADER_3: Final = struct.Struct(">QQQII")
_HEADER_BYTES: Final = 104
_SIZE_OFFSET: Final = 24
_L1_SIZE_OFFSET: Final = 36
_EXTENSION: Final = struct.Struct(">II")
_BACKING_FORMAT: Final = 0xE279_2ACA
_CLUSTER_BITS: Final = 16
_REFCOUNT_ORDER: Final = 4
_REFCOUNT_BYTES: Final = 2

_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_MAX_DEPTH: Final = 16
"""Overlays upon overlays at most."""


@dataclass(frozen=True)
class _Header:
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    backing: str
    backing_format: str


def create_overlay(path: Path, base: Path, base_format: str, size: int) -> None:
    """Make an empty overlay of `size` bytes on `base`, which is not opened.

    Args:
        path: The new file; it must not exist.
        base: The base as it will be found from the overlay's folder, or an absolute path.
        base_format: "raw" or "qcow2".
        size: Bytes of the disk; more than the base has read as zeros.

    Raises:
        VmlabError: the file exists, or cannot be written.
    """
    cluster = 1 << _CLUSTER_BITS
    per_table = cluster // 8 * cluster
    l1_size = max(1, (size + per_table - 1) // per_table)
    l1_clusters = (l1_size * 8 + cluster - 1) // cluster
    name = os.fsencode(str(base))
    if size <= 0 or size % 512 or len(name) > 1023:
        raise VmlabError(
            f"an overlay of {size} bytes on {str(base)!r} cannot be made",
            hint="a disk has a positive multiple of 512 bytes, a base a path of up to 1023 bytes",
        )
    extension = base_format.encode()
    padded = extension.ljust((len(extension) + 7) // 8 * 8, b"\0")
    tail = _EXTENSION.pack(_BACKING_FORMAT, len(extension)) + padded + bytes(8)
    # Clusters: header, refcount table, its first block, then the L1 table.
    header = _HEADER.pack(
        _MAGIC, 3, _HEADER_BYTES + len(tail), len(name), _CLUSTER_BITS, size, 0,
        l1_size, 3 * cluster, cluster, 1, 0, 0,
    )  # fmt: skip
    header += _HEADER_3.pack(0, 0, 0, _REFCOUNT_ORDER, _HEADER_BYTES) + tail + name
    used = 3 + l1_clusters
    if used > cluster // _REFCOUNT_BYTES:
        raise VmlabError(f"an overlay of {size} bytes is too large", hint="at most 1024P")
    try:
        with path.open("xb") as file:
            file.write(header.ljust(cluster, b"\0"))
            file.write(struct.pack(">Q", 2 * cluster).ljust(cluster, b"\0"))
            file.write((struct.pack(">H", 1) * used).ljust(cluster, b"\0"))
            file.truncate(used * cluster)
    except FileExistsError:
        raise VmlabError(
            f"there is a file {str(path)!r} already", hint="an overlay is a new file"
        ) from None
    except OSError as error:
        raise VmlabError(
            f"the overlay {str(path)!r} cannot be made: {error.strerror}",
            hint="check that its folder exists, is writable and has room",
        ) from None


def _read_header(fd: int, path: Path) -> _Header:
    def refuse(why: str, hint: str) -> VmlabError:
        return VmlabError(f"the disk image {str(path)!r} {why}", hint=hint)

    raw = read_all(fd, 0, _HEADER.size + _HEADER_3.size)
    (magic, version, backing_offset, backing_size, cluster_bits, size, crypt, l1_size, l1_offset,
     refcount_offset, refcount_clusters, snapshots, _) = _HEADER.unpack_from(raw)  # fmt: skip
    if magic != _MAGIC or version not in {2, 3}:
        raise refuse("is no qcow2 of version 2 or 3", "name its real format, such as raw")
    incompatible, header_bytes = 0, 72
    order = _REFCOUNT_ORDER
    if version == 3:
        incompatible, _, _, order, header_bytes = _HEADER_3.unpack_from(raw, _HEADER.size)
    if incompatible or crypt or snapshots or order != _REFCOUNT_ORDER:
        raise refuse(
            "uses features of qcow2 that the embedded engine has not (snapshots, encryption, "
            "compression types, external data, or it was not closed cleanly)",
            "repair it with `qemu-img check -r all`, or copy it with `qemu-img convert -O qcow2`",
        )
    cluster = 1 << cluster_bits
    length = os.lseek(fd, 0, os.SEEK_END)
    per_table = cluster // 8 * cluster
    sane = (
        9 <= cluster_bits <= 21
        and size % 512 == 0
        and 0 < l1_size <= 1 << 22
        and l1_size * per_table >= size
        and refcount_clusters > 0
        and l1_offset % cluster == 0
        and l1_offset + 8 * l1_size <= length
        and refcount_offset % cluster == 0
        and refcount_offset + refcount_clusters * cluster <= length
        and backing_size <= 1023
        and backing_offset + backing_size <= cluster
    )
    if not sane:
        raise refuse("is damaged: its header makes no sense", "look at it with `qemu-img check`")
    place, backing_format = header_bytes, "raw"
    while place + _EXTENSION.size <= min(cluster, backing_offset or cluster):
        kind, size_of = _EXTENSION.unpack(read_all(fd, place, _EXTENSION.size))
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            backing_format = read_all(fd, place + 8, min(size_of, 64)).decode("ascii", "replace")
        place += _EXTENSION.size + (size_of + 7) // 8 * 8
    backing = os.fsdecode(read_all(fd, backing_offset, backing_size)) if backing_offset else ""
    return _Header(
        cluster_bits, size, l1_size, l1_offset, refcount_offset, refcount_clusters, backing,
        backing_format,
    )  # fmt: skip


def _big_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "little":
        values.byteswap()
    return values


class Overlay:
    """A qcow2 image and the base under it.

    Raises:
        VmlabError: a file is missing, in use, damaged, or of a kind that is not known here.
    """

    def __init__(self, path: Path, *, read_only: bool = False, depth: int = 0) -> None:
        self.path = path
        self.read_only = read_only
        self._fd = open_image(path, read_only=read_only)
        self._base: Disk | None = None
        try:
            header = _read_header(self._fd, path)
            self._cluster = 1 << header.cluster_bits
            self.discard_alignment = self._cluster
            self._size = header.size
            self._header = header
            self._l1 = self._table(header.l1_offset, header.l1_size)
            self._refcount_table = self._table(
                header.refcount_offset, header.refcount_clusters * self._cluster // 8
            )
            self._l2: dict[int, array[int]] = {}
            self._lock = threading.Lock()
            self._free, self._end = self._unused()
            if header.backing:
                base = path.parent / header.backing
                if depth == _MAX_DEPTH:
                    raise VmlabError(
                        f"the disk image {str(path)!r} has more than {_MAX_DEPTH} bases",
                        hint="does one of them refer to itself? Flatten it with `qemu-img convert`",
                    )
                self._base = open_disk(base, header.backing_format, read_only=True, depth=depth + 1)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def close(self) -> None:
        """Release the file and its base."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._base is not None:
                self._base.close()

    # ------------------------------------------------------------------------------- metadata

    def _table(self, offset: int, entries: int) -> array[int]:
        return _big_endian(array("Q", read_all(self._fd, offset, 8 * entries)))

    def _set_entry(self, table_offset: int, index: int, value: int) -> None:
        write_all(self._fd, table_offset + 8 * index, struct.pack(">Q", value))

    def _unused(self) -> tuple[list[int], int]:
        """Clusters inside the file that nothing counts, and the first one behind it."""
        length = os.lseek(self._fd, 0, os.SEEK_END)
        clusters = (length + self._cluster - 1) // self._cluster
        per_block = self._cluster // _REFCOUNT_BYTES
        free: list[int] = []
        if self.read_only:
            return free, clusters
        for index, block in enumerate(self._refcount_table):
            first = index * per_block
            if first >= clusters or not block:
                continue
            counts = array("H", read_all(self._fd, block & _OFFSET, self._cluster))
            for cluster in range(first, min(first + per_block, clusters)):
                if not counts[cluster - first]:
                    free.append(cluster)
        free.reverse()
        return free, clusters

    def _count(self, cluster: int, count: int) -> None:
        """Set the reference count of a cluster, with a new block of counts if it needs one."""
        per_block = self._cluster // _REFCOUNT_BYTES
        index, place = divmod(cluster, per_block)
        if index >= len(self._refcount_table):
            raise OSError(errno.EFBIG, "the overlay is as large as its table of counts allows")
        block = self._refcount_table[index] & _OFFSET
        if not block:
            # The block lies in the range that it counts, so its own count is written first.
            at = self._end
            self._end += 1
            if at // per_block != index:
                raise OSError(errno.EFBIG, "the overlay has no room for a block of counts")
            block = at * self._cluster
            write_all(self._fd, block, bytes(self._cluster))
            write_all(self._fd, block + _REFCOUNT_BYTES * (at % per_block), b"\0\1")
            self._refcount_table[index] = block
            self._set_entry(self._header.refcount_offset, index, block)
        write_all(self._fd, block + _REFCOUNT_BYTES * place, struct.pack(">H", count))

    def _allocate(self) -> int:
        """The offset of a cluster that is ours now; its content is not defined."""
        if self._free:
            cluster = self._free.pop()
        else:
            cluster = self._end
            self._end += 1
        self._count(cluster, 1)
        return cluster * self._cluster

    def _release(self, offset: int) -> None:
        cluster = offset // self._cluster
        self._count(cluster, 0)
        punch_hole(self._fd, offset, self._cluster)
        self._free.append(cluster)

    def _l2_table(self, index: int, *, make: bool) -> array[int] | None:
        """The L2 table of an L1 index; None if there is none and none is to be made."""
        table = self._l2.get(index)
        if table is not None:
            return table
        entries = self._cluster // 8
        offset = self._l1[index] & _OFFSET
        if offset:
            table = self._table(offset, entries)
        elif make:
            table = array("Q", bytes(self._cluster))
            offset = self._allocate()
            write_all(self._fd, offset, bytes(self._cluster))
            self._l1[index] = offset | _COPIED
            self._set_entry(self._header.l1_offset, index, self._l1[index])
        else:
            return None
        self._l2[index] = table
        return table

    def _entry(self, cluster: int) -> int:
        index, place = divmod(cluster, self._cluster // 8)
        table = self._l2_table(index, make=False)
        entry = table[place] if table is not None else 0
        if entry & _COMPRESSED:
            raise OSError(errno.EIO, f"{self.path} holds compressed clusters")
        return entry

    def _enter(self, cluster: int, value: int) -> None:
        index, place = divmod(cluster, self._cluster // 8)
        table = self._l2_table(index, make=True)
        if table is None:
            raise OSError(errno.EIO, "no table")
        if not self._l1[index] & _COPIED:
            raise OSError(errno.EIO, f"{self.path} shares clusters with a snapshot")
        table[place] = value
        self._set_entry(self._l1[index] & _OFFSET, place, value)

    # ------------------------------------------------------------------------------------ data

    def _below(self, offset: int, size: int) -> bytes:
        """What the base has there; behind its end there are zeros."""
        base = self._base
        if base is None or offset >= base.size:
            return bytes(size)
        here = min(size, base.size - offset)
        return base.read(offset, here) + bytes(size - here)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        parts: list[bytes] = []
        while size:
            cluster, inside = divmod(offset, self._cluster)
            part = min(size, self._cluster - inside)
            with self._lock:
                entry = self._entry(cluster)
                if entry & _ZERO:
                    parts.append(bytes(part))
                elif entry & _OFFSET:
                    # Under the lock: a discard on another thread gives the cluster away.
                    parts.append(read_all(self._fd, (entry & _OFFSET) + inside, part))
            if not entry & (_ZERO | _OFFSET):
                parts.append(self._below(offset, part))
            offset += part
            size -= part
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` from `offset` on, into clusters of the overlay's own."""
        done = 0
        while done < len(data):
            cluster, inside = divmod(offset + done, self._cluster)
            part = data[done : done + self._cluster - inside]
            with self._lock:
                self._write_cluster(cluster, inside, part)
            done += len(part)

    def resize(self, size: int) -> None:
        """Make the disk larger; what is new reads as zeros.

        The L1 table grows as far as its last cluster reaches: to 4 TiB with clusters of 64 KiB.

        Raises:
            VmlabError: it would be smaller, or larger than the table can be.
        """
        per_entry = self._cluster // 8 * self._cluster
        needed = (size + per_entry - 1) // per_entry
        have = len(self._l1)
        room = (8 * have + self._cluster - 1) // self._cluster * self._cluster // 8
        if size < self._size or size % 512 or needed > room:
            raise VmlabError(
                f"the disk image {str(self.path)!r} of {self._size} bytes cannot have {size}",
                hint=f"it can grow to {room * per_entry} bytes, in steps of 512",
            )
        with self._lock:
            if needed > have:
                table = self._header.l1_offset
                write_all(self._fd, table + 8 * have, bytes(8 * (needed - have)))
                self._l1.extend([0] * (needed - have))
                write_all(self._fd, _L1_SIZE_OFFSET, struct.pack(">I", needed))
            write_all(self._fd, _SIZE_OFFSET, struct.pack(">Q", size))
            before, self._size = self._size, size
        if self._base is not None and self._base.size > before:
            self.write_zeroes(before, min(self._base.size, size) - before, unmap=True)

    def _write_cluster(self, cluster: int, inside: int, part: bytes) -> None:
        entry = self._entry(cluster)
        at = entry & _OFFSET
        if at and not entry & _ZERO:
            if not entry & _COPIED:
                raise OSError(errno.EIO, f"{self.path} shares clusters with a snapshot")
            write_all(self._fd, at + inside, part)
            return
        if len(part) < self._cluster:
            start = cluster * self._cluster
            whole = bytearray(
                bytes(self._cluster) if entry & _ZERO else self._below(start, self._cluster)
            )
            whole[inside : inside + len(part)] = part
            part = bytes(whole)
        if not at:
            at = self._allocate()
        write_all(self._fd, at, part)
        self._enter(cluster, at | _COPIED)

    def flush(self) -> None:
        """fdatasync."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """Whole clusters read as zeros from here on, and their space is free; parts stay."""
        first = (offset + self._cluster - 1) // self._cluster
        last = (offset + size) // self._cluster
        with self._lock:
            for cluster in range(first, last):
                self._zero_cluster(cluster)

    def _zero_cluster(self, cluster: int) -> None:
        entry = self._entry(cluster)
        if entry & _ZERO and not entry & _OFFSET:
            return
        if entry == 0 and self._base is None:
            return
        self._enter(cluster, _ZERO)
        if entry & _OFFSET:
            self._release(entry & _OFFSET)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Whole clusters as a mark in the table, the parts before and behind as bytes."""
        while size:
            cluster, inside = divmod(offset, self._cluster)
            part = min(size, self._cluster - inside)
            with self._lock:
                if part == self._cluster and unmap:
                    self._zero_cluster(cluster)
                else:
                    self._write_cluster(cluster, inside, bytes(part))
            offset += part
            size -= part


def open_disk(path: Path, image_format: str, *, read_only: bool = False, depth: int = 0) -> Disk:
    """The disk in a file of the named format; a format is never guessed from what a guest wrote.

    Raises:
        VmlabError: the format is not known, or the file cannot be used.
    """
    if image_format == "raw":
        return RawDisk(path, read_only=read_only)
    if image_format == "qcow2":
        return Overlay(path, read_only=read_only, depth=depth)
    raise VmlabError(
        f"disk image {str(path)!r}: format {image_format!r} is not known here",
        hint='use "raw" or "qcow2"; `qemu-img convert` makes one of the others',
    )

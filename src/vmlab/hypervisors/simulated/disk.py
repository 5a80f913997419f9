"""A simulated disk: contents, a volatile write cache, and counters.

A write is visible at once and survives a power cut only after a flush, as with a real disk whose
write cache is on (virtio 1.2, 5.2.6.1: VIRTIO_BLK_F_FLUSH).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

from vmlab.hypervisors.simulated.sparse import Base, InPlace, Sparse
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.spec import Disk

_QCOW2_MAGIC: Final = b"QFI\xfb"


_COUNTERS: Final = ("reads", "writes", "flushes", "errors", "read_bytes", "written_bytes")


class SimulatedDisk:
    """One disk of one machine."""

    __slots__ = (
        "bus",
        "cache",
        "errors",
        "flushes",
        "name",
        "read_bytes",
        "readonly",
        "reads",
        "stable",
        "writes",
        "written_bytes",
    )

    def __init__(
        self,
        name: str,
        stable: Sparse,
        *,
        bus: Literal["virtio", "scsi"] = "virtio",
        readonly: bool = False,
    ) -> None:
        self.name = name
        self.stable = stable
        self.bus = bus
        self.readonly = readonly
        # What was written since the last flush, on top of what is stable.
        self.cache = Sparse(stable.size, base=stable)
        self.reset_counters()

    @classmethod
    def of(cls, disk: Disk, field: str) -> SimulatedDisk:
        """The disk that a specification asks for; `field` is where it stands there.

        Raises:
            InvalidSpec: its source or file cannot be used, or is no raw image.
        """
        if disk.file is not None:
            contents = _in_place(disk, field)
            return cls(disk.name, contents, bus=disk.bus, readonly=disk.readonly)
        base = _base(disk, field) if disk.source is not None else None
        size = disk.size if disk.size is not None else base.size if base is not None else 0
        if base is not None and size < base.size:
            problem = SpecProblem(f"{field}.size", size, f"at least its source's {base.size} bytes")
            raise InvalidSpec([problem], hint="give a larger size, or leave it out")
        return cls(disk.name, Sparse(size, base=base), bus=disk.bus, readonly=disk.readonly)

    def reset_counters(self) -> None:
        """Begin to count traffic anew, as at power-on."""
        self.reads = self.writes = self.flushes = self.errors = 0
        self.read_bytes = self.written_bytes = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stable.size

    def read(self, offset: int, length: int) -> bytes:
        """What the guest reads (ValueError: outside)."""
        data = self.cache.read(offset, length)
        self.reads += 1
        self.read_bytes += length
        return data

    def write(self, offset: int, data: bytes, keep: int | None = None) -> None:
        """Write into the cache; of a torn write `keep` bytes arrive (ValueError: outside)."""
        self.cache.check(offset, len(data))
        self.cache.write(offset, data if keep is None else data[:keep])
        self.writes += 1
        self.written_bytes += len(data)

    def corrupt(self, offset: int, length: int) -> None:
        """Invert bytes behind the guest's back, where they are (ValueError: outside)."""
        inverted = bytes(byte ^ 0xFF for byte in self.cache.read(offset, length))
        for index, page in self.cache.changed(offset, inverted):
            if index in self.cache.pages:
                self.cache.pages[index] = page
            else:
                self.stable.put(index, page)

    def flush(self) -> None:
        """Make what was written stable, at the guest's request."""
        self.flush_quietly()
        self.flushes += 1

    def flush_quietly(self) -> None:
        """Make what was written stable."""
        for index, page in self.cache.pages.items():
            self.stable.put(index, page)
        self.cache.pages.clear()

    def lose_power(self) -> None:
        """Forget what was not flushed."""
        self.cache.pages.clear()

    def grow(self, size: int) -> None:
        """Give it `size` bytes; the new ones are zero."""
        self.stable.grow(size)
        self.cache.grow(size)

    def contents(self) -> Sparse:
        """A copy of what the guest sees now."""
        copied = self.stable.copy()
        for index, page in self.cache.pages.items():
            copied.put(index, page)
        return copied

    def copy(self) -> SimulatedDisk:
        """An independent disk with counters of its own; pages are shared until one side writes.

        One that is a file is that file: whoever copies it is to be its only user.
        """
        stable = self.stable if isinstance(self.stable, InPlace) else self.stable.copy()
        copied = SimulatedDisk(self.name, stable, bus=self.bus, readonly=self.readonly)
        copied.cache.pages.update(self.cache.pages)
        return copied

    def counters(self) -> dict[str, int]:
        """What was counted so far, by name."""
        return {counter: getattr(self, counter) for counter in _COUNTERS}

    def set_counters(self, counters: dict[str, int]) -> None:
        """Go on counting from there."""
        for counter in _COUNTERS:
            setattr(self, counter, counters.get(counter, 0))


def _base(disk: Disk, field: str) -> Base:
    path = Path(disk.source or "")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(len(_QCOW2_MAGIC))
    except OSError as error:
        problem = SpecProblem(f"{field}.source", str(path), f"a readable file ({error.strerror})")
        raise InvalidSpec([problem], hint="check the path") from error
    if disk.format == "qcow2" or (disk.format is None and magic == _QCOW2_MAGIC):
        problem = SpecProblem(f"{field}.source", str(path), "a raw image: no other format is read")
        raise InvalidSpec([problem], hint="`qemu-img convert -O raw` makes one of it")
    if size == 0:
        problem = SpecProblem(f"{field}.source", str(path), "an image that is not empty")
        raise InvalidSpec([problem], hint="check the path")
    # Disks are made of sectors; a file that ends inside one is filled up with zeros.
    return Base(path.resolve(), -(-size // 512) * 512)


def _in_place(disk: Disk, field: str) -> InPlace:
    path = Path(disk.file or "").absolute()
    try:
        with path.open("rb" if disk.readonly else "r+b") as file:
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        expected = f"an image that can be {'read' if disk.readonly else 'written to'}"
        problem = SpecProblem(f"{field}.file", str(path), f"{expected} ({error.strerror})")
        raise InvalidSpec([problem], hint="check the path") from error
    if disk.format != "raw":
        problem = SpecProblem(f"{field}.format", disk.format, '"raw": no other format is read')
        raise InvalidSpec([problem], hint="`qemu-img convert -O raw` makes one of it")
    if size == 0 or size % 512:
        expected = f"an image of a positive multiple of 512 bytes: it has {size}"
        raise InvalidSpec([SpecProblem(f"{field}.file", str(path), expected)], hint="check it")
    if disk.size not in {None, size}:
        expected = f"left out, or the {size} that its file has"
        raise InvalidSpec([SpecProblem(f"{field}.size", disk.size, expected)], hint="leave it out")
    return InPlace(path, size)

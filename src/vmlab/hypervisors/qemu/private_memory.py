"""The state of a process that maps a template privately, without QEMU reading all of its memory.

QEMU leaves shared memory out of a stream, but would write all of a private mapping into it, holes
included. What such a process has written is found here by its page map instead (Linux,
Documentation/admin-guide/mm/pagemap.rst), and read from the outside; its devices are saved by
themselves. What is neither, the small RAM blocks of firmware, is taken from the stream that the
process came from, as long as nothing can have changed it (QEMU 7.2, migration/ram.c, savevm.c).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.machine.architecture import Architecture

_PAGE: Final = 4096
_CHUNK: Final = 1 << 20

# Streams: migration/savevm.c and the comment on RAM_SAVE_FLAG_* in migration/ram.c.
_RAM_SECTION: Final = re.compile(rb"\x01(.{4})\x03ram\0\0\0\0\0\0\0\x04", re.DOTALL)
"""QEMU_VM_SECTION_START, the section's number, its name, its instance and version."""
_PART, _END, _FULL, _FOOTER = 0x02, 0x03, 0x04, 0x7E
_ZERO, _SIZES, _WHOLE_PAGE, _LAST, _SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
_DEVICES_BEGIN: Final = 8
"""Bytes of the magic number and the version of a stream."""
_NO_DESCRIPTION: Final = b"\x06\0\0\0\x02{}"
"""An empty QEMU_VM_VMDESCRIPTION, which a loading QEMU looks for at the end."""

_CONSTANT: Final = frozenset(
    {
        "pc.bios",
        "pc.rom",
        "riscv_virt_board.mrom",
        "/rom@etc/acpi/tables",
        "/rom@etc/acpi/rsdp",
        "/rom@etc/table-loader",
    }
)
"""Blocks that firmware alone writes to, so that they are what they were until there is a reset."""
_FLASH: Final = {
    Architecture.RISCV64: {
        "virt.flash0": (0x2000_0000, 32 << 20),
        "virt.flash1": (0x2200_0000, 32 << 20),
    },
    Architecture.AARCH64: {"virt.flash0": (0, 64 << 20), "virt.flash1": (0x400_0000, 64 << 20)},
}
"""Flash memories of the boards: guest-physical address and bytes (hw/riscv/virt.c, hw/arm/virt.c).
A guest can write to them."""
_HOST_ADDRESS: Final = re.compile(r"\((?P<block>[^)]+)\) is (?P<address>0x[0-9a-f]+)")


class Unusual(Exception):
    """A stream or a process that this does not know: QEMU itself has to save it."""


# ------------------------------------------------------------------- small blocks


@dataclass(frozen=True, slots=True)
class SmallBlocks:
    """The beginning of a stream, up to its devices, for every process that came from that stream.

    Attributes:
        head: Header, configuration and the list of the RAM blocks.
        pages: The contents of those that are not the guest's memory.
        number: Of the section that they are in, as it is written.
        flash: The flash memories among them, which are empty.
    """

    head: bytes
    pages: bytes
    number: bytes
    flash: frozenset[str]

    def stream(self, devices: bytes, memory: bytes = b"") -> bytes:
        """A stream with the state of those devices.

        Args:
            devices: What QEMU wrote of them, with the head of a stream of its own.
            memory: Pages of the guest's memory, as `carried` gives them.
        """
        part = b""
        if memory:
            end = struct.pack(">QB", _LAST, _FOOTER) + self.number
            part = bytes([_PART]) + self.number + memory + end
        return b"".join((self.head, part, self.pages, devices[_DEVICES_BEGIN:], _NO_DESCRIPTION))


def small_blocks(stream: bytes, architecture: Architecture) -> SmallBlocks | None:
    """The small blocks in a stream without the guest's memory; None if they cannot be kept."""
    try:
        ram = _ram_section(stream)
    except (Unusual, struct.error, IndexError, UnicodeDecodeError):
        return None
    flash = frozenset(_FLASH.get(architecture, ()))
    changeable = ram.written.keys() - _CONSTANT
    if not changeable <= flash or any(ram.written[name] for name in changeable):
        return None
    head, pages = stream[: ram.listed], stream[ram.listed : ram.end]
    return SmallBlocks(head, pages, ram.number, frozenset(changeable))


@dataclass(frozen=True, slots=True)
class _RamSection:
    """Where the list of blocks and all of the RAM end, and whether a block has more than zeros."""

    number: bytes
    listed: int
    end: int
    written: dict[str, bool]


def _ram_section(stream: bytes) -> _RamSection:
    head = _RAM_SECTION.search(stream)
    if head is None:
        raise Unusual("it has no memory")
    number, position = head[1], head.end()
    written: dict[str, bool] = {}
    block, listed = "", 0
    while True:
        (word,) = struct.unpack_from(">Q", stream, position)
        flags, position = word & (_PAGE - 1), position + 8
        if flags == _SIZES:
            position = _skip_sizes(stream, position, word - flags)
        elif flags == _LAST:
            if stream[position] != _FOOTER or stream[position + 1 : position + 5] != number:
                raise Unusual("a section does not end where it should")
            position += 5
            listed = listed or position
            if stream[position] == _FULL:
                return _RamSection(number, listed, position, written)
            if stream[position] not in {_PART, _END}:
                raise Unusual("memory is followed by something unknown")
            position += 5
        elif flags & ~_SAME_BLOCK in {_ZERO, _WHOLE_PAGE}:
            if not flags & _SAME_BLOCK:
                length = stream[position]
                block = stream[position + 1 : position + 1 + length].decode("ascii")
                position += 1 + length
            full = bool(flags & _WHOLE_PAGE)
            written[block] = written.get(block, False) or full or stream[position] != 0
            position += _PAGE if full else 1
        else:
            raise Unusual(f"a page has the flags {flags:#x}")


def _skip_sizes(stream: bytes, position: int, total: int) -> int:
    """Behind the list of blocks: name, bytes, and the address that x-ignore-shared adds."""
    while total > 0:
        length = stream[position]
        (size,) = struct.unpack_from(">Q", stream, position + 1 + length)
        total -= size
        position += 1 + length + 16
    return position


async def save_devices(emulator: Emulator, directory: Path, blocks: SmallBlocks) -> bytes:
    """What QEMU writes of the devices of a process that stands still.

    Raises:
        Unusual: its flash memory was written to.
        QmpError: this QEMU cannot do it.
        OSError: this process may not look into that one.
    """
    for name in blocks.flash:
        await _require_empty(emulator, name)
    file = directory / "devices"
    try:
        # Made for Xen, whose memory somebody else saves as well.
        # To its end: otherwise QEMU would write the file after it was removed.
        saved = {"filename": str(file), "live": False}
        await uninterrupted(emulator.execute("xen-save-devices-state", saved))
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


async def _require_empty(emulator: Emulator, name: str) -> None:
    for flashes in _FLASH.values():
        if name not in flashes:
            continue
        guest, size = flashes[name]
        answer = await emulator.execute(
            "human-monitor-command", {"command-line": f"gpa2hva {guest:#x}"}
        )
        found = _HOST_ADDRESS.search(str(answer))
        if found is None or found["block"] != name:
            continue
        begin = int(found["address"], 16)
        with _Outside(emulator.process.pid) as process:
            for start, end in process.written(begin, begin + size):
                if process.read(start, end - start).strip(b"\0"):
                    raise Unusual(f"{name} was written to")
        return
    raise Unusual(f"{name} is not where it should be")


# ------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class PrivateMemory:
    """One memory object of a process: a template, and what the process has written over it."""

    pid: int
    template: Path
    ranges: tuple[tuple[int, int, int], ...]
    """Address, end and offset in the template of each mapping."""

    def overlay(self, target: int, check: Callable[[], None]) -> None:
        """Write what the process has written to the descriptor `target`, at its offsets."""
        with _Outside(self.pid) as process:
            for begin, end, offset in self.ranges:
                for start, stop in process.written(begin, end):
                    for address in range(start, stop, _CHUNK):
                        check()
                        data = process.read(address, min(_CHUNK, stop - address))
                        os.pwrite(target, data, offset + address - begin)

    def parts(self, limit: int) -> list[tuple[int, bytes]] | None:
        """What the process has written: offset and bytes; None if it is more than `limit`."""
        found, size = [], 0
        with _Outside(self.pid) as process:
            for begin, end, offset in self.ranges:
                for start, stop in process.written(begin, end):
                    size += stop - start
                    if size > limit:
                        return None
                    found.append((offset + start - begin, process.read(start, stop - start)))
        return found


def carried(memory: Sequence[PrivateMemory], limit: int) -> bytes | None:
    """What a process has written, as pages of a stream; None if one object's is over `limit` bytes.

    Raises:
        OSError: this process may not look into that one.
    """
    records: list[bytes] = []
    for number, private in enumerate(memory):
        parts = private.parts(limit)
        if parts is None:
            return None
        name = f"ram{number}".encode()
        named = struct.pack("B", len(name)) + name
        flags = _WHOLE_PAGE
        for offset, data in parts:
            for start in range(0, len(data), _PAGE):
                records.append(struct.pack(">Q", offset + start | flags))
                records.append(named + data[start : start + _PAGE])
                named, flags = b"", _WHOLE_PAGE | _SAME_BLOCK
    return b"".join(records)


def private_memory(pid: int, name: str) -> list[PrivateMemory]:
    """The memory objects that a process maps privately from memfds of that name, in their order.

    Raises:
        OSError: this process may not look into that one.
    """
    link = f"/memfd:{name}"
    files = sorted(memfds(pid, link), key=lambda path: int(path.name))
    mapped: dict[int, list[tuple[int, int, int]]] = {}
    for line in Path(f"/proc/{pid}/maps").read_text("ascii", "replace").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith(link) and fields[1].endswith("p"):
            begin, _, end = fields[0].partition("-")
            part = (int(begin, 16), int(end, 16), int(fields[2], 16))
            mapped.setdefault(int(fields[4]), []).append(part)
    found: dict[int, PrivateMemory] = {}
    for path in files:
        inode = path.stat().st_ino
        if inode in mapped and inode not in found:
            found[inode] = PrivateMemory(pid, path, tuple(mapped[inode]))
    return list(found.values())


def memfds(pid: int, *links: str) -> Iterator[Path]:
    """The open memfds of a process whose links begin so."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            # It may be closed meanwhile.
            if str(path.readlink()).startswith(links):
                yield path


class _Outside:
    """Another process's memory, from the outside."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> _Outside:
        self._memory = os.open(f"/proc/{self._pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._memory)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._memory)
        os.close(self._map)

    def read(self, address: int, size: int) -> bytes:
        """The bytes there."""
        data = os.pread(self._memory, size, address)
        if len(data) != size:
            raise OSError(f"{size} bytes at {address:#x} cannot be read")
        return data

    def written(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a private mapping that are the process's own: address and end."""
        for first in range(begin, end, _CHUNK * _PAGE // 8):
            last = min(end, first + _CHUNK * _PAGE // 8)
            words = (last - first) // _PAGE * 8
            entries = os.pread(self._map, words, first // _PAGE * 8)
            if len(entries) != words:
                raise OSError(f"the page map ends before {last:#x}")
            own = entries[7::8].translate(_OWN)
            for run in _RUN.finditer(own):
                yield first + run.start() * _PAGE, first + run.end() * _PAGE


_RUN: Final = re.compile(b"\1+")
_PRESENT, _SWAPPED, _FILE = 0x80, 0x40, 0x20
"""Bits 63, 62 and 61 of an entry of the page map, in its last byte."""
_OWN: Final = bytes(
    int(bool(byte & _SWAPPED or byte & (_PRESENT | _FILE) == _PRESENT)) for byte in range(256)
)
"""Whether a page is the process's own, by the last byte of its entry."""

"""Loads relocatable objects: ELF for 64 bits (System V ABI, "Object Files"; psABI of the host).

It does what generated code needs and refuses the rest: a relocation that is not on the list, a
symbol that the object does not define. So nothing outside an object can come into it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vmlab.engine.code.arena import Arena

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELOCATION: Final = struct.Struct("<QQq")

_MAGIC: Final = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
_RELOCATABLE: Final = 1
_X86_64, _AARCH64 = 62, 183
_PROGBITS, _SYMTAB, _RELA, _NOBITS = 1, 2, 4, 8
_ALLOCATED: Final = 2
_UNDEFINED, _FIRST_RESERVED = 0, 0xFF00
_PAGE: Final = 4096  # the arena's alignment is no larger
_NAMED_TYPES: Final = (0, 1, 2)  # no type, object, function

# Distances from the place, as signed words of so many bytes: R_X86_64_PC32, PLT32, PC64;
# R_AARCH64_PREL32, PREL64.
_DISTANCES: Final = {_X86_64: {2: 4, 4: 4, 24: 8}, _AARCH64: {261: 4, 260: 8}}
# R_AARCH64_JUMP26 and CALL26: a distance in words in an instruction's lowest 26 bits.
_BRANCHES: Final = {_X86_64: frozenset[int](), _AARCH64: frozenset({282, 283})}
# R_AARCH64_ADR_PREL_PG_HI21; ADD_ABS_LO12_NC and LDST8 to LDST64_ABS_LO12_NC with their scales.
_AARCH64_PAGE: Final = 275
_AARCH64_LOW: Final = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3}


class LoadError(Exception):
    """The object is not one that the engine loads."""


@dataclass(frozen=True)
class _Section:
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int


def load(data: bytes, arena: Arena) -> dict[str, int]:
    """Put an object into an arena.

    Args:
        data: a relocatable object.
        arena: where its code and constants go.

    Returns: the addresses of its symbols.

    Raises:
        LoadError: it is no such object, or wants what is not given.
    """
    try:
        return _load(data, arena)
    except (struct.error, IndexError, KeyError, OverflowError, ValueError) as error:
        raise LoadError(f"the object is damaged: {error!r}") from error


def _load(data: bytes, arena: Arena) -> dict[str, int]:
    header = _HEADER.unpack_from(data)
    machine, table, count = header[2], header[6], header[12]
    if not data.startswith(_MAGIC) or header[1] != _RELOCATABLE:
        raise LoadError("not a relocatable ELF object of 64 bits")
    if machine not in _DISTANCES:
        raise LoadError(f"machine {machine} is none that the engine runs on")
    sections = []
    for index in range(count):
        fields = _SECTION.unpack_from(data, table + index * _SECTION.size)
        _, kind, flags, _, offset, size, link, info, alignment, _ = fields
        if kind != _NOBITS and offset + size > len(data):
            raise LoadError(f"section {index} ends after the object")
        sections.append(_Section(kind, flags, offset, size, link, info, alignment))

    places: dict[int, int] = {}
    images: dict[int, bytearray] = {}
    for index, section in enumerate(sections):
        if section.flags & _ALLOCATED:
            if section.kind not in (_PROGBITS, _NOBITS):
                raise LoadError(f"section {index} is of type {section.kind}")
            if section.alignment & (section.alignment - 1) or section.alignment > _PAGE:
                raise LoadError(f"section {index} wants an alignment of {section.alignment}")
            places[index] = arena.reserve(section.size, max(section.alignment, 16))
            content = data[section.offset : section.offset + section.size]
            images[index] = bytearray(content if section.kind == _PROGBITS else bytes(section.size))

    symbols, addresses = _symbols(data, sections, places, arena)
    for section in sections:
        if section.kind != _RELA or section.info not in images:
            continue
        for position in range(section.offset, section.offset + section.size, _RELOCATION.size):
            where, what, addend = _RELOCATION.unpack_from(data, position)
            address = addresses[what >> 32]
            if address is None:
                raise LoadError(f"symbol {what >> 32} is not defined in the object")
            place = arena.address + places[section.info] + where
            image = images[section.info]
            if where + 4 > len(image):
                raise LoadError("a relocation lies after its section")
            _relocate(machine, what & 0xFFFF_FFFF, image, where, place, address + addend)
    for index, image in images.items():
        arena.write(places[index], image)
    return symbols


def _symbols(
    data: bytes, sections: list[_Section], places: dict[int, int], arena: Arena
) -> tuple[dict[str, int], list[int | None]]:
    """The symbols by name, and the addresses of all by number."""
    named: dict[str, int] = {}
    addresses: list[int | None] = []
    for table in sections:
        if table.kind != _SYMTAB:
            continue
        strings = sections[table.link]
        for position in range(table.offset, table.offset + table.size, _SYMBOL.size):
            name, info, _, section, value, _ = _SYMBOL.unpack_from(data, position)
            if section == _UNDEFINED or section >= _FIRST_RESERVED or section not in places:
                addresses.append(None)
                continue
            address = arena.address + places[section] + value
            addresses.append(address)
            if name and info & 15 in _NAMED_TYPES:
                start = strings.offset + name
                named[data[start : data.index(b"\0", start)].decode()] = address
    return named, addresses


def _relocate(  # noqa: PLR0917 (each has its own kind, and there is one caller)
    machine: int, kind: int, image: bytearray, where: int, place: int, target: int
) -> None:
    size = _DISTANCES[machine].get(kind)
    if size is not None:
        image[where : where + size] = (target - place).to_bytes(size, "little", signed=True)
        return
    word = int.from_bytes(image[where : where + 4], "little")
    if kind in _BRANCHES[machine]:
        distance = target - place
        if distance % 4 or not -(1 << 27) <= distance < 1 << 27:
            raise LoadError("a branch does not reach its target")
        word |= (distance >> 2) & 0x3FF_FFFF
    elif machine == _AARCH64 and kind == _AARCH64_PAGE:
        pages = (target >> 12) - (place >> 12)
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif machine == _AARCH64 and kind in _AARCH64_LOW:
        word |= (target & 0xFFF) >> _AARCH64_LOW[kind] << 10
    else:
        raise LoadError(f"relocation type {kind} of machine {machine} is not on the list")
    image[where : where + 4] = word.to_bytes(4, "little")

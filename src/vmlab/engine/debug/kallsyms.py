"""The symbols of a guest's kernel, out of the kernel itself: Linux's kallsyms (kernel/kallsyms.c).

Distributions ship kernels without symbol files, but with this table inside: names, of which common
pieces are replaced by tokens, and addresses relative to a base. Its parts are found by what they
look like; nothing is asked of the guest. Known orders of the parts are that of Linux 6.4 and later
(scripts/kallsyms.c: addresses behind the tokens) and that of 4.20 to 6.3 (in front of the names).
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from vmlab.engine.memory.ram import Ram

_DIGITS: Final = b"".join(b"%d\0" % digit for digit in range(10))
_TOKENS: Final = 256
_PER_MARKER: Final = 256  # names
_LONGEST: Final = 128  # bytes of a name as it is stored, amply
_ALIGNMENT: Final = 8
_KERNEL_OFFSET: Final = 0x20_0000
"""From the start of RAM: where firmware puts kernels (Documentation/arch/riscv/boot.rst)."""
_LARGEST: Final = 128 << 20
"""Bytes of RAM that are looked through."""


@dataclass(frozen=True, order=True)
class Symbol:
    """A name for an address; `kind` is a letter as nm(1) has it."""

    address: int
    name: str
    kind: str


class SymbolTable:
    """Symbols by name and by address.

    Args:
        symbols: In any order.
    """

    def __init__(self, symbols: Iterable[Symbol]) -> None:
        self.symbols = sorted(symbols)
        self._addresses = [each.address for each in self.symbols]
        self._by_name = {each.name: each for each in self.symbols}

    def __len__(self) -> int:
        return len(self.symbols)

    def find(self, name: str) -> Symbol | None:
        """The symbol of a name."""
        return self._by_name.get(name)

    def around(self, address: int) -> tuple[Symbol, int] | None:
        """The last symbol up to an address, and the distance from it."""
        place = bisect_right(self._addresses, address) - 1
        if place < 0 or (place == len(self.symbols) - 1 and address != self._addresses[-1]):
            return None
        found = self.symbols[place]
        return found, address - found.address

    def shown(self, address: int) -> str:
        """An address as `name+0x10`, or nothing."""
        found = self.around(address)
        if found is None:
            return ""
        symbol, distance = found
        return symbol.name + (f"+{distance:#x}" if distance else "")


def kernel_symbols(image: bytes) -> SymbolTable:
    """The symbols that are in a kernel, as it lies in memory or in its Image; perhaps none.

    Args:
        image: From the start of the kernel on, aligned as in memory. Addresses are those that the
            kernel has given itself; an Image that has not run may have none yet.
    """
    place = image.find(_DIGITS)
    while place >= 0:
        # Memory is the guest's: what begins like a table may be anything, and end anywhere.
        with suppress(IndexError, ValueError, struct.error):
            if found := _at_tokens(image, place):
                return SymbolTable(found)
        place = image.find(_DIGITS, place + 1)
    return SymbolTable([])


def symbols_in(ram: Ram) -> SymbolTable:
    """The symbols of the kernel in a guest's memory, where firmware has put it."""
    start = ram.base + _KERNEL_OFFSET
    size = min(ram.end - start, _LARGEST)
    return kernel_symbols(ram.read(start, size) if size > 0 else b"")


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT


def _words(image: bytes, place: int, count: int) -> array[int]:
    words: array[int] = array("I")
    words.frombytes(image[place : place + 4 * count])
    return words


def _at_tokens(image: bytes, digits: int) -> list[Symbol]:
    """The symbols whose table of tokens has its digits at a place."""
    start = digits
    for _ in range(ord("0")):
        start = image.rfind(b"\0", 0, max(start - 1, 0)) + 1
    tokens, offsets, place = [], [], start
    for _ in range(_TOKENS):
        end = image.find(b"\0", place)
        if end < 0 or end - place > _LONGEST:
            return []
        offsets.append(place - start)
        tokens.append(image[place:end])
        place = end + 1
    index = _aligned(place)
    behind = index + 2 * _TOKENS
    if start % _ALIGNMENT or image[index:behind] != struct.pack(f"<{_TOKENS}H", *offsets):
        return []
    markers_at, markers = _markers(image, start)
    return _named(image, tokens, markers_at, markers, behind) if markers else []


def _markers(image: bytes, end: int) -> tuple[int, list[int]]:
    """Where the positions of every 256th name are, which end at a place; and they."""
    place = end - 4
    if image[place:end] == bytes(4):
        place -= 4  # filled up to eight bytes
    found: list[int] = []
    while place >= 0:
        (value,) = struct.unpack_from("<I", image, place)
        if found and value >= found[-1]:
            return 0, []
        found.append(value)
        if value == 0:
            return place, found[::-1]
        place -= 4
    return 0, []


def _named(
    image: bytes, tokens: list[bytes], markers_at: int, markers: list[int], behind: int
) -> list[Symbol]:
    """The symbols, once the place of their names is found: behind their number."""
    latest = (markers_at - markers[-1] - _ALIGNMENT) & -_ALIGNMENT
    earliest = max(latest - _PER_MARKER * _LONGEST, 0)
    for place in range(latest, earliest - 1, -_ALIGNMENT):
        (count,) = struct.unpack_from("<I", image, place)
        if -(-count // _PER_MARKER) != len(markers):
            continue
        names = _names(image, place + _ALIGNMENT, count, tokens, markers)
        if names is None or _aligned(names[1]) != markers_at:
            continue
        addresses = _addresses(image, place, count, behind)
        return [
            Symbol(address, text[1:], text[:1])
            for address, text in zip(addresses, names[0], strict=False)
        ]
    return []


def _names(
    image: bytes, place: int, count: int, tokens: list[bytes], markers: list[int]
) -> tuple[list[str], int] | None:
    """So many names from a place on, each with the letter of its kind, and where they end."""
    start, found = place, []
    for number in range(count):
        if number % _PER_MARKER == 0 and markers[number // _PER_MARKER] != place - start:
            return None
        size = image[place]
        place += 1
        if size & 0x80:
            size = size & 0x7F | image[place] << 7
            place += 1
        found.append(
            b"".join([tokens[each] for each in image[place : place + size]]).decode("latin-1")
        )
        place += size
    return found, place


def _addresses(image: bytes, number_at: int, count: int, behind: int) -> list[int]:
    """The addresses of all symbols; none where they are not found."""
    size = _aligned(4 * count)
    for offsets_at in (behind, number_at - _ALIGNMENT - size):
        offsets = _words(image, offsets_at, count) if offsets_at >= 0 else array("I")
        if len(offsets) < count or offsets[0] > offsets[-1] or not offsets[-1]:
            continue
        if any(first > second for first, second in pairwise(offsets)):
            continue
        (base,) = struct.unpack_from("<Q", image, offsets_at + size)
        return [base + offset for offset in offsets]
    return []


# ------------------------------------------------------------------------------ for a debugger

_MACHINE_RISCV: Final = 243
_CODE: Final = frozenset("tTwW")
_HEADER, _SECTION, _SYMBOL = 64, 64, 24  # bytes of ELF's structures
_GLOBAL: Final = 1 << 4
_OBJECT, _FUNCTION = 1, 2


def symbol_file(table: SymbolTable) -> bytes:
    """An ELF file (RISC-V, 64 bits) that holds symbols and nothing else; nothing if there are none.

    A symbol reaches to the next one.
    """
    symbols = table.symbols
    if not symbols:
        return b""
    names, rows = bytearray(b"\0"), [bytes(_SYMBOL)]
    for place, each in enumerate(symbols):
        later = symbols[place + 1].address if place + 1 < len(symbols) else each.address
        code = each.kind in _CODE
        kind = _FUNCTION if code else _OBJECT
        rows.append(
            struct.pack(
                "<IBBHQQ", len(names), _GLOBAL | kind, 0, 1 if code else 2, each.address,
                later - each.address,
            )
        )  # fmt: skip
        names += each.name.encode("latin-1", "replace") + b"\0"
    first, last = symbols[0].address, symbols[-1].address
    code_ends = max((each.address for each in symbols if each.kind in _CODE), default=first) + 4
    titles = b"\0.text\0.data\0.symtab\0.strtab\0.shstrtab\0"
    table_bytes = b"".join(rows)
    body = table_bytes + bytes(names) + titles

    def section(title: bytes, kind: int, flags: int, **more: int) -> bytes:
        return struct.pack(
            "<IIQQQQIIQQ", titles.index(b"\0" + title + b"\0") + 1, kind, flags,
            more.get("address", 0), more.get("offset", 0), more.get("size", 0),
            more.get("link", 0), more.get("info", 0), 8, more.get("entry", 0),
        )  # fmt: skip

    at_names = _HEADER + len(table_bytes)
    at_titles = at_names + len(names)
    sections = [
        bytes(_SECTION),
        section(b".text", 8, 6, address=first, size=code_ends - first),
        section(b".data", 8, 3, address=code_ends, size=max(last - code_ends, 0)),
        section(
            b".symtab", 2, 0, offset=_HEADER, size=len(table_bytes), link=4, info=1, entry=_SYMBOL
        ),
        section(b".strtab", 3, 0, offset=at_names, size=len(names)),
        section(b".shstrtab", 3, 0, offset=at_titles, size=len(titles)),
    ]
    at_sections = _aligned(_HEADER + len(body))
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, _MACHINE_RISCV, 1, 0, 0, at_sections, 4,
        _HEADER, 0, 0, _SECTION, len(sections), len(sections) - 1,
    )  # fmt: skip
    return (header + body).ljust(at_sections, b"\0") + b"".join(sections)

"""A guest's memory by its own translation, which leaves no trace in the guest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.debug.view import physical_address, read_memory, write_memory
from vmlab.engine.memory.ram import RAM_BASE, Ram

TABLE, LOWER, LOWEST = (RAM_BASE + 0x1000 * number for number in (1, 2, 3))
VIRTUAL = 0x12_3456_7000
PAGES = (RAM_BASE + 0x8000, RAM_BASE + 0x6000)  # of two adjacent virtual pages
V, R, W, X, U, A, D = (1 << bit for bit in (0, 1, 2, 3, 4, 6, 7))


@pytest.fixture
def hart() -> Iterator[Hart]:
    """A hart in U mode, with Sv39 tables for two pages that nobody has accessed yet."""
    ram = Ram(1 << 20)

    def entry(table: int, level: int, place: int, flags: int) -> None:
        index = VIRTUAL >> (12 + 9 * level) & 511
        ram.write(table + 8 * index, (place >> 12 << 10 | flags).to_bytes(8, "little"))

    entry(TABLE, 2, LOWER, V)
    entry(LOWER, 1, LOWEST, V)
    index = VIRTUAL >> 12 & 511
    for number, (page, flags) in enumerate(zip(PAGES, (V | X, V | R | W | U), strict=True)):
        ram.write(LOWEST + 8 * (index + number), (page >> 12 << 10 | flags).to_bytes(8, "little"))
    made = Hart(ram)
    made[layout.PRIVILEGE] = 0
    made[layout.SATP] = 8 << 60 | TABLE >> 12
    yield made
    ram.close()


def test_both_pages_of_a_piece_are_found_whoever_may_access_them(hart: Hart) -> None:
    hart.ram.write(PAGES[0] + 4094, b"ab")
    hart.ram.write(PAGES[1], b"cd")
    assert read_memory(hart, VIRTUAL + 4094, 4) == b"abcd"
    assert write_memory(hart, VIRTUAL + 4095, b"xy")
    assert hart.ram.read(PAGES[0] + 4095, 1) + hart.ram.read(PAGES[1], 1) == b"xy"


def test_nothing_is_disturbed(hart: Hart) -> None:
    before = hart.architectural(), hart[layout.WALKS], hart.ram.read(TABLE, 3 * 4096)
    read_memory(hart, VIRTUAL, 8192)
    write_memory(hart, VIRTUAL, b"x")
    assert (hart.architectural(), hart[layout.WALKS], hart.ram.read(TABLE, 3 * 4096)) == before


def test_what_is_not_mapped_ends_it(hart: Hart) -> None:
    assert len(read_memory(hart, VIRTUAL + 8190, 100)) == 2
    assert read_memory(hart, VIRTUAL - 1, 1) == b""
    assert physical_address(hart, VIRTUAL + 8192) is None
    assert not write_memory(hart, VIRTUAL + 8190, b"abcd")
    assert hart.ram.read(PAGES[1] + 4094, 2) == bytes(2)


def test_physical_addresses_and_those_of_m_mode_are_taken_as_they_are(hart: Hart) -> None:
    hart.ram.write(PAGES[0], b"here")
    assert read_memory(hart, PAGES[0], 4, physical=True) == b"here"
    assert read_memory(hart, PAGES[0], 4) == b""
    hart[layout.PRIVILEGE] = 3
    assert read_memory(hart, PAGES[0], 4) == b"here"

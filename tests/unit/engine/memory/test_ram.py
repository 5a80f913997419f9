"""Guest memory: bounds, flags, the dirty log, private copies."""

from __future__ import annotations

import ctypes
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.engine.memory.ram import (
    CODE,
    LOGGED,
    PAGE_SIZE,
    RAM_BASE,
    ROM,
    WATCHED,
    BadAddress,
    Ram,
    full_barrier,
)

PAGES = 8
SIZE = PAGES * PAGE_SIZE


@pytest.fixture
def ram() -> Ram:
    return Ram(SIZE)


def test_what_is_written_is_read(ram: Ram) -> None:
    ram.write(RAM_BASE + 100, b"hello")
    assert ram.read(RAM_BASE + 99, 7) == b"\0hello\0"
    assert os.pread(ram.fd, 5, 100) == b"hello", "it lies in the memory file"
    assert ctypes.string_at(ram.host_address + 100, 5) == b"hello"


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (0, 1), (RAM_BASE - 1, 1), (RAM_BASE - 1, 2), (RAM_BASE + SIZE, 1),
        (RAM_BASE + SIZE - 1, 2), ((1 << 64) - 1, 2), (RAM_BASE, SIZE + 1), (-1, 1),
    ],
)  # fmt: skip
def test_what_is_not_in_ram_as_a_whole_is_refused(ram: Ram, address: int, size: int) -> None:
    assert not ram.contains(address, size)
    with pytest.raises(BadAddress):
        ram.read(address, size)
    with pytest.raises(BadAddress) as caught:
        ram.write(address, bytes(size))
    assert (caught.value.address, caught.value.size) == (address, size)
    with pytest.raises(BadAddress):
        ram.zero(address, size)
    with pytest.raises(BadAddress):
        ram.load_image(address, bytes(size))
    with pytest.raises(BadAddress):
        ram.written(address, size)
    with pytest.raises(BadAddress):
        ram.discard(address, size)
    assert ram.read(RAM_BASE, SIZE) == bytes(SIZE)


def test_a_negative_size_is_refused(ram: Ram) -> None:
    assert not ram.contains(RAM_BASE + 100, -1)
    with pytest.raises(BadAddress):
        ram.read(RAM_BASE + 100, -1)


def test_single_loads_and_stores_are_aligned(ram: Ram) -> None:
    ram.write(RAM_BASE + 8, bytes(range(1, 9)))
    assert ram.load16(RAM_BASE + 10) == 0x0403
    assert ram.load32(RAM_BASE + 12) == 0x0807_0605
    assert ram.load64(RAM_BASE + 8) == 0x0807_0605_0403_0201
    ram.store16(RAM_BASE + 14, 0xBEEF)
    assert ram.read(RAM_BASE + 12, 4) == b"\x05\x06\xef\xbe"
    for load, address in (
        (ram.load16, RAM_BASE + 1), (ram.load32, RAM_BASE + 2), (ram.load64, RAM_BASE + 4),
        (ram.load16, RAM_BASE + SIZE), (ram.load64, RAM_BASE - 8),
    ):  # fmt: skip
        with pytest.raises(BadAddress):
            load(address)
    with pytest.raises(BadAddress):
        ram.store16(RAM_BASE + 1, 0)
    full_barrier()


@given(
    st.lists(st.tuples(st.integers(0, SIZE - 600), st.integers(0, 600)), max_size=6),
    st.binary(max_size=2000),
)
def test_scatter_and_gather_are_each_others_inverse(
    places: list[tuple[int, int]], data: bytes
) -> None:
    ram = Ram(SIZE)
    segments, at = [], 0
    for gap, size in places:
        segments.append((RAM_BASE + at + gap % 600, size))
        at += 1200
    done = ram.scatter(segments, data)
    assert done == min(len(data), sum(size for _, size in segments))
    assert ram.gather(segments)[:done] == data[:done]
    ram.close()


def test_code_pages_tell_of_every_write(ram: Ram) -> None:
    told: list[tuple[int, int, bytes]] = []
    ram.tell_of_code(
        lambda page, count: told.append((page, count, ram.read(RAM_BASE + PAGE_SIZE, 2))),
        lambda page, count: None,
    )
    ram.protect(1, 2, CODE)
    ram.write(RAM_BASE, b"x" * PAGE_SIZE)
    assert told == []
    ram.write(RAM_BASE + PAGE_SIZE - 1, b"abc")
    assert told == [(1, 1, b"bc")], "told after the bytes are there"
    told.clear()
    ram.write(RAM_BASE + PAGE_SIZE, bytes(3 * PAGE_SIZE))
    assert [page for page, _, _ in told] == [1, 2]
    told.clear()
    ram.store16(RAM_BASE + 2 * PAGE_SIZE + 6, 7)
    ram.zero(RAM_BASE + 2 * PAGE_SIZE, 8)
    ram.written(RAM_BASE + PAGE_SIZE, 1)
    ram.discard(RAM_BASE + PAGE_SIZE, PAGE_SIZE)
    ram.load_image(RAM_BASE + PAGE_SIZE, b"x")
    assert [page for page, _, _ in told] == [2, 2, 1, 1, 1]
    ram.unprotect(1, 2, CODE)
    ram.write(RAM_BASE + PAGE_SIZE, b"abc")
    assert len(told) == 5


def test_a_rom_page_is_not_written(ram: Ram) -> None:
    ram.load_image(RAM_BASE + PAGE_SIZE, b"R" * PAGE_SIZE)
    ram.protect(1, 1, ROM)
    ram.write(RAM_BASE, b"w" * 3 * PAGE_SIZE)
    ram.store16(RAM_BASE + PAGE_SIZE, 0)
    ram.zero(RAM_BASE + PAGE_SIZE, 16)
    ram.discard(RAM_BASE + PAGE_SIZE, PAGE_SIZE)
    expected = b"w" * PAGE_SIZE + b"R" * PAGE_SIZE + b"w" * PAGE_SIZE
    assert ram.read(RAM_BASE, 3 * PAGE_SIZE) == expected


def test_a_watched_page_tells_what_was_written(ram: Ram) -> None:
    told: list[tuple[int, int]] = []
    ram.on_watched_write = lambda address, size: told.append((address, size))
    ram.protect(3, 1, WATCHED)
    ram.write(RAM_BASE + 3 * PAGE_SIZE + 5, b"abc")
    ram.write(RAM_BASE + 2 * PAGE_SIZE, b"abc")
    assert told == [(RAM_BASE + 3 * PAGE_SIZE + 5, 3)]


def test_the_dirty_log_holds_what_was_written_since_it_was_collected(ram: Ram) -> None:
    protected: list[tuple[int, int]] = []
    ram.tell_of_code(
        lambda first, count: None, lambda first, count: protected.append((first, count))
    )
    ram.write(RAM_BASE, b"before")
    ram.start_dirty_log()
    assert protected == [(0, PAGES)]
    assert ram.collect_dirty() == []
    ram.write(RAM_BASE + PAGE_SIZE - 1, b"ab")
    ram.write(RAM_BASE + 5 * PAGE_SIZE, b"x")
    ram.store16(RAM_BASE + 6 * PAGE_SIZE, 1)
    assert ram.flags(0) == 0, "further stores are fast"
    protected.clear()
    assert ram.collect_dirty() == [0, 1, 5, 6]
    assert protected == [(0, 2), (5, 2)], "and slow again once collected"
    assert ram.flags(0) == LOGGED
    ram.write(RAM_BASE, b"again")
    assert ram.collect_dirty() == [0]
    ram.stop_dirty_log()
    assert all(ram.flags(page) == 0 for page in range(PAGES))
    with pytest.raises(RuntimeError, match="not been started"):
        ram.collect_dirty()


def test_flags_of_one_kind_leave_the_others(ram: Ram) -> None:
    ram.protect(2, 1, CODE)
    ram.start_dirty_log()
    assert ram.flags(2) == CODE | LOGGED
    ram.write(RAM_BASE + 2 * PAGE_SIZE, b"x")
    assert ram.flags(2) == CODE
    ram.stop_dirty_log()
    assert ram.flags(2) == CODE
    flag_byte = ctypes.string_at(ram.flags_address + 2, 1)
    assert flag_byte == bytes((CODE,)), "native code sees the same byte"
    with pytest.raises(BadAddress):
        ram.protect(PAGES - 1, 2, CODE)


def test_a_private_copy_keeps_its_writes_to_itself(ram: Ram) -> None:
    ram.write(RAM_BASE, b"template")
    fork = Ram(SIZE, fd=ram.fd, private=True)
    assert fork.read(RAM_BASE, 8) == b"template"
    fork.write(RAM_BASE, b"child")
    assert ram.read(RAM_BASE, 8) == b"template"
    fork.close()
    assert ram.read(RAM_BASE, 8) == b"template", "closing the copy leaves the original"


def test_discarded_pages_cost_nothing(ram: Ram) -> None:
    ram.write(RAM_BASE, b"x" * SIZE)
    used = os.fstat(ram.fd).st_blocks
    ram.discard(RAM_BASE + PAGE_SIZE, 4 * PAGE_SIZE)
    assert os.fstat(ram.fd).st_blocks < used
    assert ram.read(RAM_BASE + PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert ram.read(RAM_BASE, PAGE_SIZE) == b"x" * PAGE_SIZE
    with pytest.raises(ValueError, match="whole pages"):
        ram.discard(RAM_BASE + 1, PAGE_SIZE)
    ram.discard(RAM_BASE, 0)


def test_ram_can_be_elsewhere_and_is_whole_pages() -> None:
    ram = Ram(PAGE_SIZE, base=0x1000)
    ram.write(0x1FFF, b"x")
    assert ram.read(0x1FFF, 1) == b"x"
    ram.close()
    ram.close()
    for size, base in ((0, 0), (100, 0), (PAGE_SIZE, 8), (-PAGE_SIZE, 0)):
        with pytest.raises(ValueError, match="whole pages"):
            Ram(size, base)

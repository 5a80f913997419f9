"""The loader puts an object together, and takes none that wants more than it holds."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.engine.code.arena import Arena, ArenaFull
from vmlab.engine.code.loader import LoadError, load
from vmlab.engine.compile.client import CompileWorker

MODULE = """
@table = internal constant [4 x i32] [i32 10, i32 20, i32 30, i32 40]
define internal i64 @helper(i64 %n) noinline nounwind {
  %masked = and i64 %n, 3
  %place = getelementptr [4 x i32], ptr @table, i64 0, i64 %masked
  %value = load i32, ptr %place
  %wide = zext i32 %value to i64
  ret i64 %wide
}
define hidden i64 @answer(i64 %n) nounwind {
  %one = call i64 @helper(i64 %n)
  %two = add i64 %one, 2
  ret i64 %two
}
"""
OUTSIDE = """
declare i64 @elsewhere(i64)
define hidden i64 @answer(i64 %n) nounwind {
  %one = call i64 @elsewhere(i64 %n)
  ret i64 %one
}
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[CompileWorker]:
    with CompileWorker() as process:
        yield process


@pytest.fixture(scope="module")
def whole(worker: CompileWorker) -> bytes:
    return worker.module(MODULE, optimize=0)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(1 << 20)
    yield made
    made.close()


def test_code_and_constants_find_each_other(whole: bytes, arena: Arena) -> None:
    load(whole, arena)  # so that the second one lies elsewhere
    symbols = load(whole, arena)
    answer = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(symbols["answer"])
    assert [answer(number) for number in range(4)] == [12, 22, 32, 42]


def test_a_symbol_that_is_not_defined_is_refused(worker: CompileWorker, arena: Arena) -> None:
    with pytest.raises(LoadError, match="is not defined in the object"):
        load(worker.module(OUTSIDE, optimize=0), arena)


def relocations(data: bytes) -> list[int]:
    """Where the object's relocations are."""
    table, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    places = []
    for index in range(count):
        kind = struct.unpack_from("<I", data, table + 64 * index + 4)[0]
        offset, size = struct.unpack_from("<QQ", data, table + 64 * index + 24)
        if kind == 4:
            places += range(offset, offset + size, 24)
    return places


def test_a_relocation_that_is_not_on_the_list_is_refused(whole: bytes, arena: Arena) -> None:
    data = bytearray(whole)
    place = relocations(whole)[0]
    kind = struct.unpack_from("<Q", data, place + 8)[0]
    struct.pack_into("<Q", data, place + 8, kind & ~0xFFFF_FFFF | 9)  # R_X86_64_GOTPCREL
    with pytest.raises(LoadError, match=r"relocation type 9 .* is not on the list"):
        load(bytes(data), arena)


@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (0, b"\x7fELG", "not a relocatable"),
        (4, b"\x01", "not a relocatable"),
        (16, b"\x02\x00", "not a relocatable"),
        (18, b"\x03\x00", "machine 3"),
    ],
)
def test_other_files_are_refused(whole: bytes, arena: Arena, offset, value, problem) -> None:
    data = bytearray(whole)
    data[offset : offset + len(value)] = value
    with pytest.raises(LoadError, match=problem):
        load(bytes(data), arena)


@settings(max_examples=300)
@given(place=st.floats(0, 1), value=st.integers(0, 255), cut=st.floats(0, 1))
def test_a_damaged_object_is_refused_or_loaded_but_nothing_else(whole, place, value, cut) -> None:
    data = bytearray(whole)
    data[int(place * (len(data) - 1))] = value
    data = data[: max(64, int(cut * 2 * len(data)))]
    arena = Arena(1 << 20)
    try:
        load(bytes(data), arena)
    except (LoadError, ArenaFull):
        pass
    finally:
        arena.close()

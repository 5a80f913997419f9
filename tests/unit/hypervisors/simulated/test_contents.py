"""Sparse contents and disks keep every byte, and lose what a real disk loses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.sparse import PAGE, Base, Sparse
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.spec import Disk

SIZE = 4 * PAGE
writes = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=0, max_size=2 * PAGE)), max_size=12
)


@given(writes, st.integers(0, SIZE), st.integers(0, SIZE))
def test_contents_are_what_plain_bytes_would_be(script, offset, length):
    sparse, plain = Sparse(SIZE), bytearray(SIZE)
    for where, data in script:
        data = data[: SIZE - where]
        sparse.write(where, data)
        plain[where : where + len(data)] = data
    length = min(length, SIZE - offset)
    assert sparse.read(offset, length) == bytes(plain[offset : offset + length])
    assert all(any(page) for page in sparse.pages.values()), "a page of zeros is not held"


@given(writes, writes)
def test_a_copy_and_its_origin_do_not_see_each_other(first, second):
    origin = Sparse(SIZE)
    for where, data in first:
        origin.write(where, data[: SIZE - where])
    copy = origin.copy()
    before = copy.read(0, SIZE)
    for where, data in second:
        origin.write(where, data[: SIZE - where])
    assert copy.read(0, SIZE) == before


@given(writes)
def test_equal_contents_have_equal_digests_and_one_byte_more_has_not(script):
    one, two = Sparse(SIZE), Sparse(SIZE)
    for where, data in script:
        one.write(where, data[: SIZE - where])
    two.write(0, one.read(0, SIZE))
    assert one.digest() == two.digest()
    two.write(17, bytes([two.read(17, 1)[0] ^ 1]))
    assert one.digest() != two.digest()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (SIZE, 1), (SIZE - 1, 2)])
def test_what_is_outside_is_refused(offset, length):
    with pytest.raises(ValueError, match="outside"):
        Sparse(SIZE).read(offset, length)


def test_resizing_cuts_off_what_lies_beyond():
    sparse = Sparse(SIZE)
    sparse.write(0, b"a")
    sparse.write(3 * PAGE, b"b")
    assert sparse.resized(PAGE).resized(SIZE).read(3 * PAGE, 1) == b"\0"
    assert sparse.resized(2 * SIZE).read(3 * PAGE, 1) == b"b"


def test_a_base_shows_through_and_is_not_written(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"base" * 2000)
    sparse = Sparse(SIZE, base=Base(image, 8000))
    assert sparse.read(0, 4) == b"base"
    assert sparse.read(8000, 4) == bytes(4)
    sparse.write(1, b"X")
    assert sparse.read(0, 4) == b"bXse"
    assert image.read_bytes() == b"base" * 2000
    sparse.write(1, b"a")
    assert sparse.pages == {}, "a page that is the base's again is not held"
    assert sparse.read(2 * PAGE, 4) == bytes(4)


@given(writes, writes)
def test_only_flushed_writes_survive_a_power_cut(flushed, lost):
    disk = SimulatedDisk("d", Sparse(SIZE))
    for where, data in flushed:
        disk.write(where, data[: SIZE - where])
    disk.flush()
    before = disk.read(0, SIZE)
    for where, data in lost:
        disk.write(where, data[: SIZE - where])
    seen = disk.read(0, SIZE)
    assert disk.contents().read(0, SIZE) == seen
    assert disk.copy().read(0, SIZE) == seen
    disk.lose_power()
    assert disk.read(0, SIZE) == before


def test_a_torn_write_leaves_its_beginning_and_reports_all_of_it():
    disk = SimulatedDisk("d", Sparse(SIZE))
    disk.write(0, b"abcdef", keep=2)
    assert disk.read(0, 6) == b"ab" + bytes(4)
    assert disk.written_bytes == 6


def test_corruption_is_silent_and_counts_as_no_traffic():
    disk = SimulatedDisk("d", Sparse(SIZE))
    disk.write(0, b"\x0f")
    disk.corrupt(0, 2)
    assert disk.read(0, 2) == b"\xf0\xff"
    assert disk.writes == 1
    disk.lose_power()
    assert disk.read(0, 2) == bytes(2), "what was not flushed is still not"
    disk.corrupt(0, 1)
    disk.lose_power()
    assert disk.read(0, 2) == b"\xff\0"


def test_a_grown_disk_has_zeros_at_its_end():
    disk = SimulatedDisk("d", Sparse(PAGE))
    disk.write(0, b"a")
    disk.grow(SIZE)
    assert disk.size == SIZE
    assert disk.read(SIZE - 1, 1) == b"\0"
    assert disk.read(0, 1) == b"a"


def test_counters_travel():
    disk, other = SimulatedDisk("d", Sparse(PAGE)), SimulatedDisk("d", Sparse(PAGE))
    disk.write(0, b"abc")
    disk.flush()
    other.set_counters(disk.counters())
    assert (other.writes, other.written_bytes, other.flushes) == (1, 3, 1)


def test_a_disk_takes_the_size_of_its_source_in_whole_sectors(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"x" * 1000)
    disk = SimulatedDisk.of(Disk(name="d", source=image), "disks.0")
    assert disk.size == 1024
    assert disk.read(0, 1024) == b"x" * 1000 + bytes(24)


@pytest.mark.parametrize(
    ("content", "fields", "field", "expected"),
    [
        (None, {}, "disks.0.source", "readable"),
        (b"", {}, "disks.0.source", "not empty"),
        (b"QFI\xfb" + bytes(100), {}, "disks.0.source", "raw image"),
        (b"x" * 600, {"format": "qcow2"}, "disks.0.source", "raw image"),
        (b"x" * 2048, {"size": 1024}, "disks.0.size", "at least"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(tmp_path, content, fields, field, expected):
    image = tmp_path / "image"
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(InvalidSpec) as caught:
        SimulatedDisk.of(Disk(name="d", source=image, **fields), "disks.0")
    (problem,) = caught.value.problems
    assert problem.field == field
    assert expected in problem.expected
    assert caught.value.hint

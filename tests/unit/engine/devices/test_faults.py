"""Disks and wires that are broken on purpose."""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.engine.devices.clock import ManualClock
from vmlab.engine.devices.occasions import Occasions, Trigger
from vmlab.engine.devices.storage import unflushed
from vmlab.engine.devices.storage.disk import RawDisk
from vmlab.engine.devices.storage.faulty import DiskFault, DiskMishap, DiskOperation, FaultyDisk
from vmlab.engine.devices.storage.overlay import create_overlay, open_disk
from vmlab.engine.devices.virtio.wire_faults import WireFault, WireFaults

SIZE = 1 << 20


class BytesDisk:
    """A disk in memory, which can be told to fail its flushes."""

    read_only = False
    discard_alignment = 512

    def __init__(self, size: int = SIZE) -> None:
        self.content = bytearray(size)
        self.flushes = 0
        self.fails = False
        self.discarded: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.content[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushes += 1
        if self.fails:
            raise OSError(errno.EIO, "it fails")

    def discard(self, offset: int, size: int) -> None:
        self.discarded.append((offset, size))
        self.content[offset : offset + size] = b"\xdd" * size

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        self.write(offset, bytes(size))

    def resize(self, size: int) -> None:
        self.content.extend(bytes(size - len(self.content)))

    def close(self) -> None:
        self.content.clear()


def disks(size: int = SIZE) -> tuple[BytesDisk, FaultyDisk]:
    below = BytesDisk(size)
    return below, FaultyDisk(below, lambda: 0)


def strikes(trigger: Trigger, count: int, clock: ManualClock | None = None) -> list[bool]:
    occasions = Occasions(trigger, (clock or ManualClock()).nanoseconds)
    return [occasions.strikes() for _ in range(count)]


def test_occasions_are_counted_or_drawn() -> None:
    assert strikes(Trigger(), 3) == [True] * 3
    assert strikes(Trigger(nth=2), 4) == [False, True, False, False]
    assert strikes(Trigger(nth=2, every=True), 5) == [False, True, False, True, False]
    assert strikes(Trigger(probability=0.0), 50) == [False] * 50
    once = strikes(Trigger(probability=0.5, seed=1), 64)
    assert once == strikes(Trigger(probability=0.5, seed=1), 64)
    assert once != strikes(Trigger(probability=0.5, seed=2), 64)
    assert 10 < sum(once) < 54


def test_one_that_lasts_strikes_all_until_its_time_is_over() -> None:
    clock = ManualClock()
    once = Occasions(Trigger(nth=2, duration=1.0), clock.nanoseconds)
    again = Occasions(Trigger(nth=2, every=True, duration=1.0), clock.nanoseconds)
    both = [(once.strikes(), again.strikes()) for _ in range(4)]
    assert both == [(False, False), (True, True), (True, True), (True, True)]
    clock.advance(10**9)
    both = [(once.strikes(), again.strikes()) for _ in range(3)]
    assert both == [(False, False), (False, True), (False, True)]


def test_what_was_not_flushed_is_lost_and_what_was_stays() -> None:
    below, disk = disks()
    disk.write(0, b"a" * 5000)
    disk.flush()
    disk.write(4000, b"b" * 200)
    disk.write_zeroes(0, 512, unmap=True)
    disk.write(SIZE - 512, b"c" * 512)
    assert disk.read(4000, 200) == b"b" * 200
    assert disk.unflushed() == 3
    disk.lose_power()
    assert below.content[:5000] == b"a" * 5000
    assert not any(below.content[5000:])
    for request in (
        lambda: disk.read(0, 512),
        lambda: disk.write(0, b"x"),
        disk.flush,
        lambda: disk.discard(0, 512),
        lambda: disk.write_zeroes(0, 512, unmap=False),
    ):
        with pytest.raises(OSError, match="no power"):
            request()
    disk.lose_power()


def test_a_flush_that_fails_has_made_nothing_stable() -> None:
    below, disk = disks()
    disk.write(0, b"a" * 512)
    below.fails = True
    with pytest.raises(OSError, match="it fails"):
        disk.flush()
    disk.write(0, b"b" * 512)
    below.fails = False
    disk.lose_power()
    assert not any(below.content)


def test_what_is_written_while_a_flush_is_under_way_is_not_covered_by_it() -> None:
    below, disk = disks()
    disk.write(0, b"a" * 512)

    def flush() -> None:
        disk.write(4096, b"late" * 128)
        disk.write(0, b"again" + bytes(507))

    below.flush = flush  # type: ignore[method-assign]  # what happens meanwhile
    disk.flush()
    below.flush = lambda: None  # type: ignore[method-assign]  # as before
    disk.lose_power()
    assert below.content[:512] == b"a" * 512
    assert not any(below.content[512:])


def test_power_that_is_lost_under_a_flush_takes_what_it_was_to_cover() -> None:
    below, disk = disks()
    disk.write(0, b"a" * 512)

    def flush() -> None:
        below.flush = lambda: None  # type: ignore[method-assign]  # that of the power cut
        disk.lose_power()

    below.flush = flush  # type: ignore[method-assign]  # what happens meanwhile
    with pytest.raises(OSError, match="no power"):
        disk.flush()
    assert not any(below.content)


def test_a_discard_waits_for_the_flush_and_is_dropped_when_its_place_is_written() -> None:
    below, disk = disks()
    disk.write(0, b"a" * 4096)
    disk.discard(0, 2048)
    disk.discard(8192, 4096)
    disk.write(512, b"b" * 512)
    assert below.discarded == []
    disk.flush()
    assert below.discarded == [(8192, 4096)]
    disk.discard(0, 2048)
    disk.lose_power()
    assert below.content[:512] == b"a" * 512


def test_what_is_too_much_for_memory_goes_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unflushed, "KEPT", 8192)
    below, disk = disks()
    before = bytes(number // 4096 % 251 + 1 for number in range(SIZE))
    disk.write(0, before)
    disk.flush()
    disk.write(0, b"\xff" * SIZE)
    below.fails = True
    with suppress(OSError):
        disk.flush()
    below.fails = False
    disk.lose_power()
    assert bytes(below.content) == before


_places = st.integers(0, 63).map(lambda block: block * 512)
_sizes = st.integers(1, 40).map(lambda blocks: blocks * 512)
_steps = st.one_of(
    st.tuples(st.just("write"), _places, _sizes, st.integers(1, 255)),
    st.tuples(st.just("zeroes"), _places, _sizes, st.just(0)),
    st.tuples(st.just("flush"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("failed flush"), st.just(0), st.just(0), st.just(0)),
)


@settings(deadline=None)
@given(st.lists(_steps, max_size=30))
def test_after_a_power_cut_a_disk_holds_what_its_last_flush_left(
    steps: list[tuple[str, int, int, int]],
) -> None:
    below, disk = disks(64 * 512 + 40 * 512)
    seen, stable = bytearray(below.size), bytes(below.size)
    for what, offset, size, byte in steps:
        if what == "write":
            disk.write(offset, bytes([byte]) * size)
            seen[offset : offset + size] = bytes([byte]) * size
        elif what == "zeroes":
            disk.write_zeroes(offset, size, unmap=True)
            seen[offset : offset + size] = bytes(size)
        else:
            below.fails = what == "failed flush"
            with suppress(OSError):
                disk.flush()
                stable = bytes(seen)
            below.fails = False
        assert disk.read(0, below.size) == seen
    disk.lose_power()
    assert bytes(below.content) == stable


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_an_image_loses_power(tmp_path: Path, form: str) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    base.write_bytes(b"base" * 1024)
    if form == "raw":
        path.write_bytes(base.read_bytes())
    else:
        create_overlay(path, base, "raw", 1 << 20)
    opened = RawDisk(path) if form == "raw" else open_disk(path, form)
    disk = FaultyDisk(opened, lambda: 0)
    disk.write(512, b"kept" * 128)
    disk.flush()
    disk.write(0, b"lost" * 1024)
    disk.lose_power()
    disk.close()
    again = open_disk(path, form)
    assert again.read(0, 4096) == b"base" * 128 + b"kept" * 128 + b"base" * 768
    again.close()


def test_a_disk_without_its_writes_only_stops(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    disk = FaultyDisk(RawDisk(path, read_only=True), lambda: 0)
    disk.lose_power()
    with pytest.raises(OSError, match="no power"):
        disk.read(0, 512)
    disk.close()


def test_requests_fail_with_the_errno_of_the_fault_and_others_do_not() -> None:
    _, disk = disks()
    writes = [DiskOperation.WRITE]
    disk.add("full", DiskFault(DiskMishap.ERROR, writes, errno=errno.ENOSPC))
    for request in (
        lambda: disk.write(0, b"x"),
        lambda: disk.discard(0, 512),
        lambda: disk.write_zeroes(0, 512, unmap=False),
    ):
        with pytest.raises(OSError) as caught:
            request()
        assert caught.value.errno == errno.ENOSPC
    disk.read(0, 512)
    disk.flush()
    assert disk.remove("full")
    assert not disk.remove("full")
    disk.write(0, b"x")


def test_of_a_torn_write_the_beginning_arrives() -> None:
    below, disk = disks()
    disk.write(0, b"o" * 4096)
    torn = DiskFault(DiskMishap.TORN, [DiskOperation.WRITE], keep=1000, when=Trigger(nth=1))
    disk.add("torn", torn)
    disk.write(0, b"n" * 4096)
    disk.write(2048, b"w" * 512)
    assert below.content[:4096] == b"n" * 1000 + b"o" * 1048 + b"w" * 512 + b"o" * 1536
    disk.add("torn", DiskFault(DiskMishap.TORN, [DiskOperation.WRITE], keep=0))
    disk.write(0, b"x" * 512)
    disk.write_zeroes(0, 512, unmap=False)
    assert below.content[:1000] == b"n" * 1000


def test_corrupt_bytes_are_inverted_and_end_with_the_disk() -> None:
    below, disk = disks()
    disk.corrupt(SIZE - 2, 100)
    disk.corrupt(SIZE, 1)
    assert below.content[-4:] == b"\0\0\xff\xff"
    disk.lose_power()
    assert below.content[-4:] == b"\0\0\xff\xff"


def test_a_request_to_a_slow_disk_waits_until_the_fault_ends() -> None:
    _, disk = disks()
    disk.add("slow", DiskFault(DiskMishap.SLOW, [DiskOperation.READ], delay=3600))
    disk.write(0, b"x")
    done = threading.Event()

    def read() -> None:
        disk.read(0, 512)
        done.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert not done.is_set()
    disk.remove("slow")
    assert done.wait(250)
    reader.join()


def test_frames_are_lost_by_their_share() -> None:
    wire = WireFaults(ManualClock())
    assert not wire.take(lambda: None)
    wire.add("all", WireFault(ratio=1.0))
    assert all(wire.take(lambda: None) for _ in range(5))
    assert wire.remove("all")
    assert not wire.remove("all")

    def lost(seed: int) -> list[bool]:
        wire = WireFaults(ManualClock())
        wire.add("some", WireFault(ratio=0.5, when=Trigger(seed=seed)))
        return [wire.take(lambda: None) for _ in range(64)]

    assert lost(1) == lost(1) != lost(2)
    assert 10 < sum(lost(1)) < 54


def test_frames_come_later_by_delay_and_jitter() -> None:
    clock, arrived = ManualClock(), list[int]()
    wire = WireFaults(clock)
    wire.add("late", WireFault(delay=1.0, jitter=0.5, when=Trigger(seed=3)))
    for _ in range(20):
        assert wire.take(lambda: arrived.append(clock.nanoseconds()))
    clock.advance(10**9 - 1)
    assert arrived == []
    clock.advance(5 * 10**8 + 1)
    assert len(arrived) == 20
    assert len(set(arrived)) > 10
    wire.add("late", WireFault(delay=1.0, when=Trigger(nth=2)))
    assert [wire.take(lambda: None) for _ in range(3)] == [False, True, False]

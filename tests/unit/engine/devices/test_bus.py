"""The bus: windows that do not overlap, accesses that a device takes, and wrappers for faults."""

from __future__ import annotations

import pytest

from vmlab.engine.devices.bus import Bus, BusFault, Device, Window
from vmlab.machine.errors import VmlabError


class Notebook:
    """Answers with its number and remembers what was written."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.number << 8 | offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


def bus_of(*windows: Window) -> tuple[Bus, list[Notebook]]:
    bus = Bus([("RAM", 0x8000, 0x9000)])
    devices = [Notebook(number) for number in range(len(windows))]
    for window, device in zip(windows, devices, strict=True):
        bus.attach(window, device)
    return bus, devices


def test_the_right_device_is_asked_with_its_own_offset() -> None:
    bus, devices = bus_of(Window("b", 0x2000, 0x100), Window("a", 0x1000, 0x1000))
    assert bus.read(0x2010, 4) == 0x010
    assert bus.read(0x1FF8, 8) == 0x1FF8 - 0x1000 | 1 << 8
    bus.write(0x2004, 2, 0x12345)
    assert devices[0].written == [(4, 2, 0x2345)], "no more than the access is wide"
    assert bus.read(0x1010, 1) == 0x10, "a device that answers too much is cut"


@pytest.mark.parametrize("base", [0x0F80, 0x1000, 0x1080, 0x10FF])
def test_windows_that_overlap_are_refused(base: int) -> None:
    bus, _ = bus_of(Window("one", 0x1000, 0x100))
    with pytest.raises(VmlabError, match="overlaps 'one'"):
        bus.attach(Window("two", base, 0x100), Notebook(1))
    bus.attach(Window("before", 0xF00, 0x100), Notebook(1))
    bus.attach(Window("behind", 0x1100, 0x100), Notebook(1))


@pytest.mark.parametrize(
    ("window", "complaint"),
    [
        (Window("ram", 0x8FFF, 2), "overlaps 'RAM'"),
        (Window("one", 0x3000, 16), "two devices are named"),
        (Window("none", 0x3000, 0), "0 bytes"),
        (Window("far", 1 << 56, 16), "is not one"),
    ],
)
def test_windows_that_cannot_be_are_refused(window: Window, complaint: str) -> None:
    bus, _ = bus_of(Window("one", 0x1000, 0x100))
    with pytest.raises(VmlabError, match=complaint) as caught:
        bus.attach(window, Notebook(1))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("address", "size", "reason"),
    [
        (0x0FFF, 1, "no device"),
        (0x1100, 1, "no device"),
        (0x10FE, 4, "runs over the end"),
        (0x1002, 4, "aligned"),
        (0x1000, 8, "no access of this size"),
        (0x1000, 1, "no access of this size"),
    ],
)
def test_an_access_that_no_device_takes_is_a_fault(address: int, size: int, reason: str) -> None:
    bus, devices = bus_of(Window("one", 0x1000, 0x100, frozenset({2, 4})))
    with pytest.raises(BusFault, match=reason):
        bus.read(address, size)
    with pytest.raises(BusFault, match=reason) as caught:
        bus.write(address, size, 0)
    assert (caught.value.address, caught.value.size) == (address, size)
    assert devices[0].written == []


class Doubled:
    def __init__(self, inner: Device) -> None:
        self.inner = inner

    def read(self, offset: int, size: int) -> int:
        return 2 * self.inner.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.inner.write(offset, size, 2 * value)


def test_a_wrapper_stands_before_its_device_until_it_is_taken_out() -> None:
    bus, devices = bus_of(Window("one", 0x1000, 0x100), Window("two", 0x2000, 0x100))
    first = bus.interpose("one", Doubled)
    second = bus.interpose("one", Doubled)
    assert bus.read(0x1001, 1) == 4
    assert bus.read(0x2002, 2) == 0x102
    bus.write(0x1000, 4, 3)
    assert devices[0].written == [(0, 4, 12)]
    with pytest.raises(RuntimeError, match="another wrapper"):
        first()
    second()
    first()
    assert bus.read(0x1001, 1) == 1
    assert bus.device("one") is devices[0]
    with pytest.raises(KeyError):
        bus.interpose("three", Doubled)

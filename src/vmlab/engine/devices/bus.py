"""The physical address map: which device answers at which address.

RAM is not on this bus: harts reach it directly. An access that no device can take is a `BusFault`,
which the hart turns into an access-fault exception. The bus takes no lock: several harts may be
in it at once, and each device has a lock of its own where it needs one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from vmlab.machine.errors import VmlabError

ALL_SIZES: Final = frozenset({1, 2, 4, 8})
LEVEL_LINE = Callable[[bool], None]
"""An interrupt line as its device sees it: called with the level that it drives."""


class Device(Protocol):
    """Something with registers."""

    def read(self, offset: int, size: int) -> int:
        """The unsigned value of `size` bytes at `offset` in the device's window."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store the low `size` bytes of `value` at `offset` in the device's window."""


class BusFault(Exception):
    """Nothing on the bus takes this access."""

    def __init__(self, address: int, size: int, reason: str) -> None:
        super().__init__(f"{size} bytes at {address:#x}: {reason}")
        self.address = address
        self.size = size
        self.reason = reason


@dataclass(frozen=True)
class Window:
    """A device's place: addresses `base` to `base + size`, and what accesses it takes."""

    name: str
    base: int
    size: int
    sizes: frozenset[int] = ALL_SIZES
    aligned: bool = True

    @property
    def end(self) -> int:
        """The first address behind the window."""
        return self.base + self.size


class Bus:
    """Windows that do not overlap, and the devices behind them.

    Args:
        reserved: (name, first address, address behind the last) of what the bus must stay clear
            of, such as RAM.
    """

    def __init__(self, reserved: Iterable[tuple[str, int, int]] = ()) -> None:
        self._reserved = tuple(reserved)
        self._bases: list[int] = []
        self._windows: list[Window] = []
        self._devices: list[Device] = []
        self._told: dict[str, Callable[[Device], None]] = {}

    def attach(self, window: Window, device: Device) -> None:
        """Put `device` at `window`.

        Raises:
            VmlabError: the window overlaps another one, or its name is taken.
        """
        if window.size <= 0 or window.base < 0 or window.end > 1 << 56:
            raise VmlabError(
                f"the window of {window.name!r} is not one: {window.size} bytes at "
                f"{window.base:#x}",
                hint="physical addresses have 56 bits and a window has at least one byte",
            )
        others = [(other.name, other.base, other.end) for other in self._windows]
        for name, start, end in (*others, *self._reserved):
            if window.base < end and start < window.end:
                raise VmlabError(
                    f"{window.name!r} at {window.base:#x}-{window.end - 1:#x} overlaps {name!r} "
                    f"at {start:#x}-{end - 1:#x}",
                    hint="give one of them another address",
                )
            if name == window.name:
                raise VmlabError(
                    f"two devices are named {name!r}", hint="names on one bus are different"
                )
        place = bisect_right(self._bases, window.base)
        self._bases.insert(place, window.base)
        self._windows.insert(place, window)
        self._devices.insert(place, device)

    def tell(self, name: str, answers: Callable[[Device], None]) -> None:
        """Call `answers` with the device that answers in a window, now and when it is another.

        For harts that do a device's work themselves: only while nothing stands before it.

        Raises:
            KeyError: there is no such window.
        """
        self._told[name] = answers
        answers(self.device(name))

    def _put(self, place: int, device: Device) -> None:
        self._devices[place] = device
        if (answers := self._told.get(self._windows[place].name)) is not None:
            answers(device)

    def windows(self) -> tuple[Window, ...]:
        """The windows in the order of their addresses."""
        return tuple(self._windows)

    def device(self, name: str) -> Device:
        """What answers in the window of this name, with whatever is interposed.

        Raises:
            KeyError: there is no such window.
        """
        return self._devices[self._place(name)]

    def _place(self, name: str) -> int:
        for place, window in enumerate(self._windows):
            if window.name == name:
                return place
        raise KeyError(name)

    def replace(self, name: str, device: Device) -> None:
        """Let `device` answer in the window of this name, whatever answered there before.

        Raises:
            KeyError: there is no such window.
        """
        self._put(self._place(name), device)

    def interpose(self, name: str, wrap: Callable[[Device], Device]) -> Callable[[], None]:
        """Let `wrap(device)` answer for the device called `name`: where faults come in.

        Returns:
            A function that takes the wrapper out again; the last one in goes out first.

        Raises:
            KeyError: there is no such window.
        """
        before = self._devices[self._place(name)]
        wrapped = wrap(before)
        self._put(self._place(name), wrapped)

        def restore() -> None:
            place = self._place(name)
            if self._devices[place] is not wrapped:
                raise RuntimeError(f"another wrapper of {name!r} is still in place")
            self._put(place, before)

        return restore

    def _find(self, address: int, size: int) -> int:
        place = bisect_right(self._bases, address) - 1
        if place < 0:
            raise BusFault(address, size, "there is no device")
        window = self._windows[place]
        if address >= window.end:
            raise BusFault(address, size, "there is no device")
        if address + size > window.end:
            raise BusFault(address, size, f"it runs over the end of {window.name}")
        if size not in window.sizes:
            raise BusFault(address, size, f"{window.name} takes no access of this size")
        if window.aligned and (address - window.base) % size:
            raise BusFault(address, size, f"{window.name} takes aligned accesses only")
        return place

    def read(self, address: int, size: int) -> int:
        """The unsigned value of `size` bytes at the physical `address`.

        Raises:
            BusFault: no device takes the access.
        """
        place = self._find(address, size)
        value = self._devices[place].read(address - self._windows[place].base, size)
        return value & ((1 << (8 * size)) - 1)

    def write(self, address: int, size: int, value: int) -> None:
        """Store the low `size` bytes of `value` at the physical `address`.

        Raises:
            BusFault: no device takes the access.
        """
        place = self._find(address, size)
        mask = (1 << (8 * size)) - 1
        self._devices[place].write(address - self._windows[place].base, size, value & mask)

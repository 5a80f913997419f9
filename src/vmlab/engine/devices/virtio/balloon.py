"""The memory balloon (virtio 1.2, 5.5): the guest gives pages back, and says how it is.

Statistics are asked for with `request_statistics` and read from `statistics`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from vmlab.engine.devices.virtio.device import Request, VirtioDevice
from vmlab.engine.devices.workers import Workers
from vmlab.engine.memory.ram import PAGE_SHIFT, PAGE_SIZE, Ram

F_MUST_TELL_HOST: Final = 0
F_STATS_VQ: Final = 1
F_PAGE_REPORTING: Final = 5

_INFLATE: Final = 0
_DEFLATE: Final = 1
_STATISTICS: Final = 2
_CONFIG: Final = struct.Struct("<IIII")
_ACTUAL: Final = slice(4, 8)
_STATISTIC: Final = struct.Struct("<HQ")
_MAX_NUMBERS: Final = 1 << 20
"""Page numbers taken from one request."""

STATISTICS: Final = {
    0: "swap-in",
    1: "swap-out",
    2: "major-faults",
    3: "minor-faults",
    4: "free-memory",
    5: "total-memory",
    6: "available-memory",
    7: "disk-caches",
    8: "hugetlb-allocations",
    9: "hugetlb-failures",
}
"""Tags of 5.5.6.3 and what QEMU calls them; memory is in bytes."""


@dataclass
class BalloonState:
    """Everything that a snapshot must hold.

    Attributes:
        target: Pages of 4096 bytes that the guest is asked to give up.
        actual: Pages that it has given up.
        statistics: What it said last, by the names of `STATISTICS`.
    """

    target: int = 0
    actual: int = 0
    statistics: dict[str, int] = field(default_factory=dict)


class VirtioBalloon(VirtioDevice):
    """The device.

    Attributes:
        on_statistics: Called when it said something.
        on_actual: Called with `actual` when it changes.
    """

    device_id: ClassVar[int] = 5

    def __init__(self, name: str, ram: Ram, workers: Workers) -> None:
        self.own = BalloonState()
        self.on_statistics: Callable[[], None] = lambda: None
        self.on_actual: Callable[[int], None] = lambda pages: None
        self._asked: Request | None = None
        # Not DEFLATE_ON_OOM, with which Linux goes on counting what it gave as its own.
        features = 1 << F_MUST_TELL_HOST | 1 << F_STATS_VQ
        features |= 1 << F_PAGE_REPORTING
        super().__init__(name, ram, workers, [128, 128, 16, 64], features)

    def config(self) -> bytes:
        """struct virtio_balloon_config (5.5.4)."""
        return _CONFIG.pack(self.own.target, self.own.actual, 0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes `actual`."""
        config = bytearray(self.config())
        config[offset : offset + len(data)] = data
        actual = int.from_bytes(config[_ACTUAL], "little")
        if actual != self.own.actual:
            self.own.actual = actual
            self.on_actual(actual)

    def set_target(self, pages: int) -> None:
        """Ask the guest to give up this many pages of 4096 bytes in all."""
        self.own.target = pages
        self.config_changed()

    def on_reset(self) -> None:
        """The guest has all of its memory again."""
        self.own.actual = 0
        self._asked = None
        self.own.statistics = {}

    def request_statistics(self) -> bool:
        """Ask the guest how it is; False if it is not ready to be asked."""
        with self.lock:
            request, self._asked = self._asked, None
        if request is None:
            return False
        request.done(0)
        return True

    def process(self, index: int) -> None:
        """Serve one queue; without a statistics queue, reporting takes its place (5.5.2)."""
        while (request := self.take(index)) is not None:
            if index in {_INFLATE, _DEFLATE}:
                self._pages(request, give=index == _INFLATE)
            elif index == _STATISTICS and self.has(F_STATS_VQ):
                self._listen(request)
            else:
                self._reported(request)

    def _pages(self, request: Request, *, give: bool) -> None:
        numbers = request.read(4 * _MAX_NUMBERS)
        if give:
            for (number,) in struct.iter_unpack("<I", numbers[: len(numbers) & ~3]):
                address = number << PAGE_SHIFT
                if self.ram.contains(address, PAGE_SIZE):
                    self.ram.discard(address, PAGE_SIZE)
        request.done(0)

    def _listen(self, request: Request) -> None:
        text = request.read(_STATISTIC.size * 64)
        text = text[: len(text) // _STATISTIC.size * _STATISTIC.size]
        said = {
            STATISTICS[tag]: value
            for tag, value in _STATISTIC.iter_unpack(text)
            if tag in STATISTICS and value != (1 << 64) - 1
        }
        with self.lock:
            kept, self._asked = self._asked, request
            if said:
                self.own.statistics = said
        if kept is not None:
            kept.done(0)
        if said:
            self.on_statistics()

    def _reported(self, request: Request) -> None:
        """Free pages (5.5.6.7): the buffers themselves are what is not needed."""
        for address, size in request.chain.writable:
            first = (address + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
            end = (address + size) & ~(PAGE_SIZE - 1)
            if first < end:
                self.ram.discard(first, end - first)
        request.done(0)

"""The core-local interruptor (RISC-V ACLINT specification 1.0-rc4): MSWI, MTIMER and SSWI.

MSWI and MTIMER side by side are what older device trees call a CLINT; QEMU's "virt" board has
them at 0x2000000. `mtime` itself is the machine's clock and is kept elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, field
from typing import Final

from vmlab.engine.devices.clock import NANOSECONDS_PER_TICK, Clock, Timer

CLINT_SIZE: Final = 0x1_0000
SSWI_SIZE: Final = 0x4000
_MTIMECMP: Final = 0x4000
_MTIME: Final = 0xBFF8

SSIP: Final = 1
MSIP: Final = 3
MTIP: Final = 7
"""Bits of `mip` (privileged specification 3.1.9)."""

NEVER: Final = (1 << 64) - 1

SetPending = Callable[[int, int, bool], None]


@dataclass
class AclintState:
    """Everything that a snapshot must hold."""

    harts: int
    msip: MutableSequence[int] | memoryview
    mtimecmp: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mtimecmp = self.mtimecmp or [NEVER] * self.harts


class Aclint:
    """MSWI at 0x0, MTIMER's comparators at 0x4000 and `mtime` at 0xbff8.

    Args:
        harts: Number of harts.
        clock: The machine's time; `mtime` is its `ticks()` and cannot be written.
        set_pending: Called with (hart, bit of mip, level).
        set_compare: Called with (hart, ticks) when a comparator is set, if the harts compare it
            with the time themselves; None: MTIP is driven from here.
        software: The words that are MSWI's registers, where harts see and set them themselves.
        software_changed: Called instead of `set_pending` for MSIP then.
    """

    def __init__(
        self,
        harts: int,
        clock: Clock,
        set_pending: SetPending,
        set_compare: Callable[[int, int], None] | None = None,
        *,
        software: memoryview | None = None,
        software_changed: SetPending | None = None,
    ) -> None:
        self.state = AclintState(harts, [0] * harts if software is None else software)
        self._set_compare = set_compare
        self._software_changed = software_changed or set_pending
        self._clock = clock
        self._set_pending = set_pending
        self._timers: list[Timer | None] = [None] * harts
        self._lock = threading.RLock()

    def reset(self) -> None:
        """As at power-on."""
        with self._lock:
            self.state = AclintState(self.state.harts, self.state.msip)
            for hart in range(self.state.harts):
                self.state.msip[hart] = 0
            self.refresh()

    def refresh(self) -> None:
        """Drive every line and arrange for every timer anew, after the state was replaced."""
        for hart in range(self.state.harts):
            self._software_changed(hart, MSIP, bool(self.state.msip[hart]))
            self.set_timer(hart, self.state.mtimecmp[hart])

    def set_timer(self, hart: int, ticks: int) -> None:
        """Set `mtimecmp` of a hart: MTIP is pending while `mtime` is at or past it."""
        with self._lock:
            timer, self._timers[hart] = self._timers[hart], None
            if timer is not None:
                timer.cancel()
            self.state.mtimecmp[hart] = ticks
            if self._set_compare is not None:
                self._set_compare(hart, ticks)
                return
            due = self._clock.ticks() >= ticks
            self._set_pending(hart, MTIP, due)
            if not due and ticks < NEVER // NANOSECONDS_PER_TICK:
                self._timers[hart] = self._clock.call_at(
                    ticks * NANOSECONDS_PER_TICK, lambda: self._ring(hart)
                )

    def _ring(self, hart: int) -> None:
        with self._lock:
            if self._clock.ticks() >= self.state.mtimecmp[hart]:
                self._set_pending(hart, MTIP, True)

    def read(self, offset: int, size: int) -> int:
        """4 or 8 bytes; what is not there reads as zero."""
        state = self.state
        if offset < 4 * state.harts:
            return state.msip[offset >> 2]
        if _MTIMECMP <= offset < _MTIMECMP + 8 * state.harts:
            return _part(state.mtimecmp[(offset - _MTIMECMP) >> 3], offset, size)
        if _MTIME <= offset < _MTIME + 8:
            return _part(self._clock.ticks(), offset, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """4 or 8 bytes; what is not there, and `mtime`, is not written."""
        state = self.state
        if offset < 4 * state.harts:
            with self._lock:
                state.msip[offset >> 2] = value & 1
                self._software_changed(offset >> 2, MSIP, bool(value & 1))
        elif _MTIMECMP <= offset < _MTIMECMP + 8 * state.harts:
            hart = (offset - _MTIMECMP) >> 3
            with self._lock:
                old = state.mtimecmp[hart]
                if size == 4:
                    value = (
                        (old & 0xFFFF_FFFF) | value << 32
                        if offset & 4
                        else (old & ~0xFFFF_FFFF) | value
                    )
                self.set_timer(hart, value)


class Sswi:
    """SETSSIP registers: a write of 1 makes SSIP pending on a hart; it reads as 0."""

    def __init__(self, harts: int, set_pending: SetPending) -> None:
        self._harts = harts
        self._set_pending = set_pending

    def read(self, offset: int, size: int) -> int:
        """Always zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Bit 0 set: a supervisor software interrupt for the hart."""
        if offset < 4 * self._harts and value & 1:
            self._set_pending(offset >> 2, SSIP, True)


def _part(value: int, offset: int, size: int) -> int:
    return value if size == 8 else (value >> (8 * (offset & 4))) & 0xFFFF_FFFF

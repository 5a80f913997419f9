"""What devices need to know of time: the machine's clock, and being called at a moment of it.

Who keeps the time (the host's clock, or a count of retired instructions) is the machine's choice;
this is the interface, and `ManualClock`, a clock that somebody winds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, Protocol

TIMEBASE_HZ: Final = 10_000_000
"""Ticks of `mtime` in a second on the "virt" board."""
NANOSECONDS_PER_TICK: Final = 1_000_000_000 // TIMEBASE_HZ


class Timer(Protocol):
    """A call that has been arranged for."""

    def cancel(self) -> None:
        """Do not call; nothing happens if the call was made already."""


class Clock(Protocol):
    """The machine's time. It stands still while the machine is paused."""

    def nanoseconds(self) -> int:
        """Nanoseconds since the machine was made."""

    def ticks(self) -> int:
        """The value of `mtime`: ticks of 100 ns."""

    def wall_nanoseconds(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""

    def call_at(self, nanoseconds: int, callback: Callable[[], None]) -> Timer:
        """Call `callback` once `nanoseconds()` has reached this value; at once if it has."""


class ManualTimer:
    """One entry of a `ManualClock`."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call."""
        self.callback = None


class ManualClock:
    """A clock that moves only when `advance` is called."""

    def __init__(self, wall_nanoseconds: int = 0) -> None:
        self._now = 0
        self._wall = wall_nanoseconds
        self._order = 0
        self._timers: list[tuple[int, int, ManualTimer]] = []

    def nanoseconds(self) -> int:
        """Nanoseconds since the machine was made."""
        return self._now

    def ticks(self) -> int:
        """The value of `mtime`."""
        return self._now // NANOSECONDS_PER_TICK

    def wall_nanoseconds(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        return self._wall + self._now

    def call_at(self, nanoseconds: int, callback: Callable[[], None]) -> ManualTimer:
        """Call `callback` when the clock is wound to this value or past it."""
        timer = ManualTimer(callback)
        self._order += 1
        heapq.heappush(self._timers, (nanoseconds, self._order, timer))
        return timer

    def advance(self, nanoseconds: int) -> None:
        """Let time pass and make the calls that fall due, in order."""
        until = self._now + nanoseconds
        while self._timers and self._timers[0][0] <= until:
            moment, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, moment)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        self._now = until

    def next_event(self) -> int | None:
        """The moment of the earliest call that is still wanted, in nanoseconds."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

"""Time that is a count of retired instructions: it passes when the harts work, and otherwise when
whoever runs them says so.

The same instructions take the same time on every run and every host. Calls are made by the thread
that runs the harts, between two instructions.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

from vmlab.engine.devices.clock import NANOSECONDS_PER_TICK


class _Entry:
    """A call that has been arranged for."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call."""
        self.callback = None


class InstructionClock:
    """A clock of the instructions of all harts together.

    Args:
        per_tick: Instructions in a tick of 100 ns, at least 1.
        epoch: The time of day at the first instruction, in seconds since 1970-01-01 UTC.

    Attributes:
        instructions: How far it is.
        arranged: Called after `call_at` on whatever thread called that.
    """

    def __init__(self, per_tick: int, epoch: int = 0) -> None:
        self.per_tick = per_tick
        self.instructions = 0
        self.arranged: Callable[[], None] = lambda: None
        self._epoch = epoch * 1_000_000_000
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._calls: list[tuple[int, int, _Entry]] = []

    def ticks(self) -> int:
        """The value of `mtime`."""
        return self.instructions // self.per_tick

    def nanoseconds(self) -> int:
        """Nanoseconds since the machine was made."""
        return self.instructions * NANOSECONDS_PER_TICK // self.per_tick

    def wall_nanoseconds(self) -> int:
        """Nanoseconds since 1970-01-01 UTC, as if the machine had been made at the epoch."""
        return self._epoch + self.nanoseconds()

    def run(self) -> None:
        """Time passes by itself in no case."""

    def halt(self) -> None:
        """Time passes by itself in no case."""

    def at_tick(self, tick: int) -> int:
        """The count of instructions with which a tick begins."""
        return tick * self.per_tick

    def call_at(self, nanoseconds: int, callback: Callable[[], None]) -> _Entry:
        """Call `callback` once `nanoseconds()` has reached this value; soon if it has."""
        entry = _Entry(callback)
        moment = -(-nanoseconds * self.per_tick // NANOSECONDS_PER_TICK)
        with self._lock:
            heapq.heappush(self._calls, (moment, next(self._numbers), entry))
        self.arranged()
        return entry

    def next_event(self) -> int | None:
        """The count of instructions at which the earliest call is due, or None."""
        with self._lock:
            while self._calls and self._calls[0][2].callback is None:
                heapq.heappop(self._calls)
            return self._calls[0][0] if self._calls else None

    def make_calls(self) -> None:
        """Make the calls that are due, in the order of their moments and then of arrangement."""
        while True:
            with self._lock:
                if not self._calls or self._calls[0][0] > self.instructions:
                    return
                entry = heapq.heappop(self._calls)[2]
                callback, entry.callback = entry.callback, None
            if callback is not None:
                callback()

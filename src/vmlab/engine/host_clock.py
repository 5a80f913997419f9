"""The machine's time, kept by the host's monotonic clock; it stands still while the machine does.

Native code computes the same time from the same clock and an offset (`tick_offset`), without
calling here.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from vmlab.engine.devices.clock import NANOSECONDS_PER_TICK


def _host_ticks() -> int:
    return time.monotonic_ns() // NANOSECONDS_PER_TICK


class _Entry:
    """A call that has been arranged for."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call."""
        self.callback = None


class HostClock:
    """A clock that runs between `run` and `halt`, from 0 on.

    Calls that fall due are made from a thread of the clock's own, which exists only while it runs
    and something has been arranged.
    """

    def __init__(self) -> None:
        self._gate = threading.Condition()
        self._offset = 0
        self._stood: int | None = 0  # the ticks at which it stands, or None while it runs
        self._numbers = itertools.count()
        self._calls: list[tuple[int, int, _Entry]] = []
        self._thread: threading.Thread | None = None

    @property
    def tick_offset(self) -> int:
        """Ticks to add to the host's monotonic clock, in ticks, while this one runs."""
        return self._offset

    def ticks(self) -> int:
        """The value of `mtime`."""
        stood = self._stood
        return stood if stood is not None else _host_ticks() + self._offset

    def nanoseconds(self) -> int:
        """Nanoseconds since the machine was made."""
        return self.ticks() * NANOSECONDS_PER_TICK

    def wall_nanoseconds(self) -> int:
        """The host's time of day: a guest's clock is right again after a pause."""
        return time.time_ns()

    def run(self) -> None:
        """Let time pass; nothing happens if it does."""
        with self._gate:
            if self._stood is not None:
                self._offset = self._stood - _host_ticks()
                self._stood = None
                self._serve_from_thread()

    def halt(self) -> None:
        """Let time stand still, with no call under way; nothing happens if it does."""
        with self._gate:
            if self._stood is None:
                self._stood = _host_ticks() + self._offset
            thread, self._thread = self._thread, None
            self._gate.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def call_at(self, nanoseconds: int, callback: Callable[[], None]) -> _Entry:
        """Call `callback` once `nanoseconds()` has reached this value; at once if it has."""
        entry = _Entry(callback)
        with self._gate:
            heapq.heappush(self._calls, (nanoseconds, next(self._numbers), entry))
            self._gate.notify_all()
            if self._stood is None:
                self._serve_from_thread()
        return entry

    def _serve_from_thread(self) -> None:
        if self._thread is None and self._calls:
            self._thread = threading.Thread(target=self._serve, name="vmlab-clock", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while (due := self._next_due()) is not None:
            for entry in due:
                callback, entry.callback = entry.callback, None
                if callback is not None:
                    callback()

    def _next_due(self) -> list[_Entry] | None:
        """Wait for calls that are due; None when this thread is no longer wanted."""
        with self._gate:
            while self._thread is threading.current_thread():
                while self._calls and self._calls[0][2].callback is None:
                    heapq.heappop(self._calls)
                if not self._calls:
                    self._gate.wait()
                    continue
                remaining = self._calls[0][0] - self.nanoseconds()
                if remaining > 0:
                    self._gate.wait(remaining / 1e9)
                    continue
                now, due = self.nanoseconds(), []
                while self._calls and self._calls[0][0] <= now:
                    due.append(heapq.heappop(self._calls)[2])
                return due
        return None

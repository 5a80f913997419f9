"""A circuit breaker: what fails again and again is left alone for a while, and tried once then.

Closed, everything is let through; open, nothing is; half-open, one try is, which decides. Whoever
tries says how it went. Nothing is known here of hypervisors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal

__all__ = ["Breaker", "BreakerState"]

BreakerState = Literal["closed", "open", "half-open"]

FAILURES: Final = 3
"""Failures one after the other that open it."""
FIRST_PAUSE_S: Final = 5.0
LONGEST_PAUSE_S: Final = 300.0


class Breaker:
    """One breaker.

    Args:
        failures: How many, one after the other, open it.
        pause: Seconds that it is open the first time; twice as long after each try that failed.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        *,
        failures: int = FAILURES,
        pause: float = FIRST_PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = failures
        self._first_pause = pause
        self._pause = pause
        self._clock = clock
        self._opened: float | None = None
        self._trying = False
        self.failures = 0
        self.reason = ""

    @property
    def state(self) -> BreakerState:
        """What it does now."""
        if self._opened is None:
            return "closed"
        if self._trying or self.seconds_left <= 0:
            return "half-open"
        return "open"

    @property
    def seconds_left(self) -> float:
        """Seconds until it may be tried again; 0 if it may be now."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._pause - self._clock())

    def admit(self) -> bool:
        """Whether to try: as often as one likes if it is closed, once if it is half-open."""
        if self.state == "open" or self._trying:
            return False
        self._trying = self._opened is not None
        return True

    def succeeded(self) -> None:
        """It works."""
        self._opened = None
        self._trying = False
        self._pause = self._first_pause
        self.failures = 0
        self.reason = ""

    def failed(self, reason: str) -> None:
        """It does not, for that reason."""
        self.failures += 1
        self.reason = reason
        if self._opened is not None and self._trying:
            self._pause = min(LONGEST_PAUSE_S, 2 * self._pause)
            self._opened = self._clock()
        elif self._opened is None and self.failures >= self._most:
            self._opened = self._clock()
        self._trying = False

    def withdrawn(self) -> None:
        """The try ended without saying anything about what is tried."""
        self._trying = False

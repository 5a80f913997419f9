"""When a fault of a device strikes: always, at the nth occasion, or by chance, and for how long.

An occasion is a request to a disk, or a frame of a NIC. They are counted where they happen, and
chances come from the fault's own seed: with the same occasions the same ones are struck.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Trigger:
    """Which occasions are struck; without anything, all are.

    Attributes:
        nth: That one, counted from 1; 0 does not count.
        every: Every nth, not only the first.
        probability: Each of them with this probability, unless they are counted.
        duration: Seconds, of the machine's time, for which all are struck after one was; 0 strikes
            that one alone.
        seed: Source of the chances.
    """

    nth: int = 0
    every: bool = False
    probability: float = 1.0
    duration: float = 0.0
    seed: int = 0


ALWAYS: Final = Trigger()


class Occasions:
    """Counts the occasions of one fault; from any thread.

    Args:
        trigger: Which are struck.
        nanoseconds: The machine's time.
    """

    def __init__(self, trigger: Trigger, nanoseconds: Callable[[], int]) -> None:
        self._trigger = trigger
        self._now = nanoseconds
        self._lock = threading.Lock()
        self._random = random.Random(trigger.seed)
        self._count = 0
        self._until: int | None = None
        self._over = False

    def strikes(self) -> bool:
        """Whether this occasion is struck."""
        trigger = self._trigger
        with self._lock:
            if self._until is not None and not self._lapsed():
                return True
            if self._over:
                return False
            self._count += 1
            if trigger.nth:
                count = self._count
                struck = count % trigger.nth == 0 if trigger.every else count == trigger.nth
            else:
                struck = trigger.probability >= 1 or self._random.random() < trigger.probability
            if struck and trigger.duration:
                self._until = self._now() + int(trigger.duration * 1e9)
            return struck

    def _lapsed(self) -> bool:
        """Whether its time is over; one that repeats waits for its next occasion then."""
        assert self._until is not None, "asked of one that lasts"
        if self._now() < self._until:
            return False
        self._until = None
        self._over = not (self._trigger.every or not self._trigger.nth)
        return True

    def draw(self) -> float:
        """A random number of [0, 1) of this fault's own."""
        with self._lock:
            return self._random.random()

"""How often a manager's process looks for objects that only refer to each other.

A look at all of them stops the whole process: half a second with the machines of 5,000 simulated
guests in it. Python looks again when a quarter as many have outlived two lesser looks, and with its
usual thresholds (gc.set_threshold in the standard library's documentation) a sweep of the observer
is what outlives them, again and again, though all that it made goes with its end.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["collected_rarely", "settled"]

_THRESHOLDS: Final = (10_000, 500, 10)
"""Objects more than were freed, looks at those, and looks at what outlived them, before the next
kind of look: more than many sweeps of 10,000 machines make, so that hardly one is met by one."""


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Within it, the thresholds are those of a process that has many objects for a long time.

    What was `settled` within it is looked at again afterwards.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def settled() -> None:
    """What there is now stays, and is looked at no more: machines that were there at the start."""
    gc.collect()
    gc.freeze()

"""Waiting that cannot be used up while the host lets this process stand still.

A wait is made of pieces. However long this process stood still, that is one piece at the most, and
what came meanwhile is looked at before the next one is over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from typing import Any, Final

PIECES: Final = 10


async def wait_for_any(
    futures: Iterable[asyncio.Future[Any]], seconds: float
) -> set[asyncio.Future[Any]]:
    """Those of some futures that are done, as soon as one is or after so many seconds."""
    awaited = set(futures)
    done: set[asyncio.Future[Any]] = set()
    for _ in range(PIECES):
        done, _ = await asyncio.wait(
            awaited, timeout=seconds / PIECES, return_when=asyncio.FIRST_COMPLETED
        )
        if done:
            break
    return done


def wait_for_event(event: threading.Event, seconds: float) -> bool:
    """Whether another thread sets an event within so many seconds."""
    return any(event.wait(seconds / PIECES) for _ in range(PIECES))

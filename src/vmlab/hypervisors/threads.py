"""Blocking work in threads that does not outlive the operation it belongs to.

A thread cannot be cancelled. A cancelled call waits until its thread has ended, so that what is
undone afterwards is not done once more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from vmlab.hypervisors.operation import uninterrupted

T = TypeVar("T")


class Stopped(Exception):
    """The thread was told to stop."""


async def in_thread(work: Callable[[Callable[[], None]], T]) -> T:
    """Run blocking `work` in a thread; a cancelled call stops it and waits until it has.

    `work` is handed a function that it has to call often, and that raises once it has to stop.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    task = asyncio.ensure_future(asyncio.to_thread(work, check))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await uninterrupted(_ended(task))
        raise


async def _ended(task: asyncio.Future[Any]) -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        # Taken, so that nobody complains of an exception that nobody saw.
        task.exception()


async def done_in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run quick blocking `work` in a thread; a cancelled call waits until it is done."""
    return await in_thread(lambda check: work(*arguments))

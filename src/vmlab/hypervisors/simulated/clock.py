"""The virtual clock: an event loop whose time jumps to the next timer when nothing is ready.

`asyncio.sleep`, `asyncio.timeout` and all that is built on them work as ever, so hours of simulated
latency pass in milliseconds and always in the same order. Real file descriptors are polled first;
with no timer at all the loop blocks for them. It is not for talking to real processes with
deadlines: their answers take real time, which this clock does not wait for.

When nothing is scheduled, nothing is watched and no thread works, the loop's tasks wait for each
other, and would for ever: `Stalled` says which they are.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

VIRTUAL_EPOCH: Final = 1_767_225_600.0
"""Unix time at which virtual clocks begin: 2026-01-01T00:00:00Z."""


PATIENCE: Final = 60.0
"""Real seconds in which something from outside may still wake a loop that has nothing to do."""


class Stalled(RuntimeError):
    """Every task of the loop waits for another one of it."""


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that, instead of waiting, notes how long it would have waited."""

    def __init__(self, patience: float) -> None:
        super().__init__()
        self.passed = 0.0
        self.threads = 0
        self.patience = patience

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; where nothing is, `timeout` seconds have passed at once."""
        if timeout is None:
            # The loop itself watches one descriptor, by which signals and threads wake it.
            alone = len(self.get_map()) == 1 and not self.threads
            ready = super().select(self.patience if alone else None)
            if not ready and alone:
                raise Stalled(_stall())
            return ready
        if timeout <= 0:
            return super().select(0)
        if self.threads:
            # A thread's answer takes real time: while one works, time passes as on the wall.
            began = time.monotonic()
            ready = super().select(timeout)
            self.passed += min(timeout, time.monotonic() - began) if ready else timeout
            return ready
        ready = super().select(0)
        if not ready:
            self.passed += timeout
        return ready


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, which begins at 0 and stands still while anything is ready.

    Args:
        patience: Real seconds after which a loop that nothing can wake raises `Stalled`.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._jumping = _JumpingSelector(patience)
        super().__init__(self._jumping)
        # The base class takes a timer as due within the resolution of the real clock. Adding up
        # waits rounds more coarsely than that after some days of virtual time.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.passed

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[*Ts], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """As usual; while the thread works, virtual time passes no faster than the wall clock."""
        future = super().run_in_executor(executor, func, *args)
        self._jumping.threads += 1
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _future: asyncio.Future[Any]) -> None:
        self._jumping.threads -= 1


def _stall() -> str:
    """What the tasks of the running loop wait for."""
    lines = ["nothing is scheduled on the virtual clock, and these tasks wait:"]
    for task in asyncio.all_tasks():
        lines.append(f"  {task.get_name()}")
        waits: Any = task.get_coro()
        while frame := getattr(waits, "cr_frame", None):
            lines.append(f"    {waits.__qualname__}, {frame.f_code.co_filename}:{frame.f_lineno}")
            waits = waits.cr_await
        lines.append(f"    {waits!r}")
    return "\n".join(lines)

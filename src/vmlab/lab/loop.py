"""An event loop in a thread of its own, for people who call without `await`.

The contract is asynchronous and a test is not: `run` hands a coroutine over and waits for it. On
real time the loop runs all the time, so that consoles are read and processes are watched while
the test does something else. On a virtual clock it runs only while somebody waits for something,
since otherwise its time would run away.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, Final, TypeVar

from vmlab.hypervisors.simulated.clock import VirtualClockLoop
from vmlab.machine.errors import DeadlineExceeded, OperationFailed

__all__ = ["LoopThread"]

T = TypeVar("T")

_PATIENCE: Final = 7 * 86400.0
"""Real seconds that a virtual clock's loop waits for an answer from outside: no limit of its own
beside those of the calls."""

_LOOK_UP: Final = 0.5
"""Seconds after which somebody who waits looks whether a signal has come."""


class LoopThread:
    """An event loop in a daemon thread.

    Args:
        factory: What makes the loop (`Hypervisor.loop_factory`).
        name: Of the thread.
    """

    def __init__(
        self,
        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
        name: str = "vmlab-lab",
    ) -> None:
        loop = factory()
        self._on_demand = isinstance(loop, VirtualClockLoop)
        if self._on_demand:
            loop.close()
            loop = VirtualClockLoop(_PATIENCE)
        self._loop = loop
        self._wanted = threading.Event()
        self._closing = False
        self.failure: BaseException | None = None
        """What ended the loop, where it was not `close`."""
        self._pending: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @classmethod
    def shared(cls) -> LoopThread:
        """The one of this process, on real time; it ends with the process."""
        global _shared
        with _shared_lock:
            if _shared is None or _shared.closed:
                _shared = cls()
                atexit.register(_shared.close)
            return _shared

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""
        return self._closing

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the loop, and wait for it.

        What ends the wait in this thread (Ctrl-C, a test's time limit) cancels the coroutine; it
        is raised when that has cleared up after itself, or at once when it comes again.

        Args:
            coroutine: What to run.
            timeout: Seconds on the loop's clock that it has; None is no limit.

        Raises:
            DeadlineExceeded: it took longer than `timeout`.
            OperationFailed: the loop was closed, or this is its own thread.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise OperationFailed(
                "a coroutine of the lab called back into the lab and would wait for itself",
                hint="await what the machine and the guest have instead",
            )
        future: Future[T] = Future()
        job = _Job(coroutine, timeout, future, self)
        begun = False
        try:
            with self._lock:
                if self._closing:
                    raise OperationFailed(
                        "the lab's event loop was closed",
                        hint="a lab that is closed does nothing more",
                    )
                # From here on it is taken back by the loop, wherever an interruption comes.
                begun = True
                self._pending.add(future)
                self._loop.call_soon_threadsafe(job.begin)
            self._wanted.set()
            return _awaited(future)
        except CancelledError:
            raise asyncio.CancelledError from None
        except BaseException:
            if not begun:
                coroutine.close()
            elif not future.done():
                self._wanted.set()
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(job.cancel)
                # Whatever it ended with, what ended the wait is what is told.
                with contextlib.suppress(Exception, CancelledError):
                    _awaited(future)
            raise

    def forget(self, future: Future[Any]) -> None:
        """A job is over; a loop on demand stops when it was the last one."""
        with self._lock:
            self._pending.discard(future)
            idle = not self._pending
        if idle and self._on_demand:
            self._loop.stop()

    def close(self) -> None:
        """End the loop: what still runs on it is cancelled. Closing it again does nothing."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._wanted.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # In the thread.

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        failure: BaseException | None = None
        try:
            while not self._closing and failure is None:
                if self._on_demand:
                    self._wanted.wait()
                    self._wanted.clear()
                    self._loop.call_soon(self._stop_if_idle)
                try:
                    self._loop.run_forever()
                except BaseException as error:
                    # Nobody above this thread can take it: those who wait do.
                    failure = error
        finally:
            self._end(failure)

    def _stop_if_idle(self) -> None:
        with self._lock:
            idle = not self._pending
        if idle or self._closing:
            self._loop.stop()

    def _end(self, failure: BaseException | None) -> None:
        with self._lock:
            self._closing = True
            left = list(self._pending)
        self.failure = failure
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        for future in left:
            if not future.done():
                future.set_exception(failure or CancelledError())
        asyncio.set_event_loop(None)
        self._loop.close()


def _awaited(future: Future[T]) -> T:
    """The result of a future.

    A signal that another thread of the process received does not wake the main thread from a
    lock, and Python handles signals there alone: so it looks up every now and then.
    """
    while not future.done():
        wait([future], _LOOK_UP)
    return future.result()


class _Job:
    """A coroutine on its way through the loop."""

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        timeout: float | None,
        future: Future[Any],
        owner: LoopThread,
    ) -> None:
        self._coroutine = coroutine
        self._timeout = timeout
        self._future = future
        self._owner = owner
        self._task: asyncio.Task[Any] | None = None

    def begin(self) -> None:
        if self._future.done():
            return
        self._task = asyncio.ensure_future(self._limited())
        self._task.add_done_callback(self._done)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif not self._future.done():
            # It was interrupted before it was told to begin.
            self._coroutine.close()
            self._owner.forget(self._future)
            self._future.set_exception(CancelledError())

    async def _limited(self) -> Any:
        limit = asyncio.timeout(self._timeout)
        try:
            async with limit:
                return await self._coroutine
        except TimeoutError:
            if not limit.expired():
                raise
            assert self._timeout is not None
            raise DeadlineExceeded("the call", seconds=self._timeout) from None

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._owner.forget(self._future)
        if task.cancelled():
            # A coroutine that was never begun would be complained of.
            self._coroutine.close()
            self._future.set_exception(self._owner.failure or CancelledError())
        elif (error := task.exception()) is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())


_shared: LoopThread | None = None
_shared_lock = threading.Lock()


def _forget_after_fork() -> None:
    """A forked process has not its parent's thread."""
    global _shared, _shared_lock
    _shared = None
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)

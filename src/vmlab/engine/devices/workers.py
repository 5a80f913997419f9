"""Where devices do what may take long: on threads, at a virtual moment, or at once.

A doorbell only asks for work; the hart that rang it goes on. A `Work` is run again when it was
asked for while it ran, and never twice at the same time, so a queue needs no further order.
Before a snapshot or a fork the workers are drained: nothing new starts and what runs is waited
for, up to a deadline.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from vmlab.engine.devices.clock import Clock

Run = Callable[[], None]
_PIECE: Final = 0.25
"""Seconds that are waited for at once."""

_IDLE: Final = 0
_QUEUED: Final = 1
_RUNNING: Final = 2
_AGAIN: Final = 3


class Work(Protocol):
    """Something to be done whenever it is asked for."""

    def kick(self) -> None:
        """Ask; several calls before it begins are one."""


class Workers(Protocol):
    """Who does the work."""

    def work(self, name: str, run: Run) -> Work:
        """A work of this name; `run` must not raise."""

    def drain(self, seconds: float) -> list[str]:
        """Start nothing any more and wait for what runs; the names of what still runs after it."""

    def resume(self) -> None:
        """Start again; what was asked for meanwhile is done."""

    def close(self) -> None:
        """Drop what has not begun, and wait for what runs."""


class _InlineWork:
    def __init__(self, workers: InlineWorkers, run: Run) -> None:
        self._workers = workers
        self._run = run
        self._state = _IDLE

    def kick(self) -> None:
        if self._workers.drained:
            if self not in self._workers.waiting:
                self._workers.waiting.append(self)
            return
        if self._state != _IDLE:
            self._state = _AGAIN
            return
        while True:
            self._state = _RUNNING
            try:
                self._run()
            finally:
                again = self._state == _AGAIN
                self._state = _IDLE
            if not again:
                return


class InlineWorkers:
    """Work is done by whoever asks for it, at once."""

    def __init__(self) -> None:
        self.drained = False
        self.waiting: list[_InlineWork] = []

    def work(self, name: str, run: Run) -> Work:
        """A work that runs inside `kick`."""
        return _InlineWork(self, run)

    def drain(self, seconds: float) -> list[str]:
        """Nothing runs once this is called."""
        self.drained = True
        return []

    def resume(self) -> None:
        """Do what was asked for meanwhile."""
        self.drained = False
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work.kick()

    def close(self) -> None:
        """Drop what waits."""
        self.drained = True
        self.waiting.clear()


class _TimedWork:
    def __init__(self, workers: TimedWorkers, run: Run) -> None:
        self._workers = workers
        self._run = run
        self._waiting = False

    def kick(self) -> None:
        if self._waiting:
            return
        self._waiting = True
        clock = self._workers.clock
        clock.call_at(clock.nanoseconds() + self._workers.latency, self._due)

    def _due(self) -> None:
        if self._workers.drained:
            self._workers.held.append(self._due)
            return
        self._waiting = False
        self._run()


class TimedWorkers:
    """Work is done a fixed virtual time after it was asked for: the same on every run.

    Args:
        clock: The machine's clock.
        latency: Nanoseconds between asking and doing.
    """

    def __init__(self, clock: Clock, latency: int) -> None:
        self.clock = clock
        self.latency = latency
        self.drained = False
        self.held: list[Run] = []

    def work(self, name: str, run: Run) -> Work:
        """A work that runs when its moment comes, on the thread that drives the clock."""
        return _TimedWork(self, run)

    def drain(self, seconds: float) -> list[str]:
        """Nothing runs once this is called."""
        self.drained = True
        return []

    def resume(self) -> None:
        """Do what fell due meanwhile."""
        self.drained = False
        held, self.held = self.held, []
        for due in held:
            due()

    def close(self) -> None:
        """Drop what waits."""
        self.drained = True
        self.held.clear()


class _ThreadWork:
    def __init__(self, workers: WorkerThreads, name: str, run: Run) -> None:
        self._workers = workers
        self.name = name
        self.run = run
        self.state = _IDLE

    def kick(self) -> None:
        self._workers.ask(self)


class WorkerThreads:
    """Work is done by a few threads.

    Args:
        threads: How many; as many works as that can be stuck in a slow disk at the same time.
        failed: Called with (name of the work, exception) when a work raises: a mistake of
            vmlab's own, which must not vanish with the thread.
    """

    def __init__(self, threads: int, failed: Callable[[str, BaseException], None]) -> None:
        self._count = threads
        self._failed = failed
        self._changed = threading.Condition()
        self._queue: deque[_ThreadWork] = deque()
        self._running: list[_ThreadWork] = []
        self._stopping = False
        self._drained = False
        self._threads: list[threading.Thread] = []

    def work(self, name: str, run: Run) -> Work:
        """A work that runs on one of the threads."""
        return _ThreadWork(self, name, run)

    def ask(self, work: _ThreadWork) -> None:
        """`work.kick()`."""
        with self._changed:
            if work.state == _IDLE:
                work.state = _QUEUED
                self._queue.append(work)
                if len(self._threads) < self._count and not (self._drained or self._stopping):
                    self._start_thread()
                self._changed.notify()
            elif work.state == _RUNNING:
                work.state = _AGAIN

    def _start_thread(self) -> None:
        thread = threading.Thread(
            target=self._serve, name=f"vmlab-worker-{len(self._threads)}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and (self._drained or not self._queue):
                    self._changed.wait()
                if self._stopping:
                    return
                work = self._queue.popleft()
                work.state = _RUNNING
                self._running.append(work)
            try:
                work.run()
            except BaseException as error:
                self._failed(work.name, error)
            with self._changed:
                self._running.remove(work)
                if work.state == _AGAIN:
                    work.state = _QUEUED
                    self._queue.append(work)
                else:
                    work.state = _IDLE
                self._changed.notify_all()

    def drain(self, seconds: float) -> list[str]:
        """Start nothing any more and wait for what runs; the names of what still runs after it.

        When nothing is left running, the threads are gone as well, so that the process may fork.
        """
        left = seconds
        with self._changed:
            self._drained = True
            while self._running:
                if left <= 0:
                    return sorted(work.name for work in self._running)
                # Piece by piece: while the host stood still, what runs had no time either.
                piece = min(left, _PIECE)
                begun = time.monotonic()
                self._changed.wait(piece)
                left -= min(time.monotonic() - begun, piece)
            self._stopping = True
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()
        with self._changed:
            self._stopping = False
        return []

    def resume(self) -> None:
        """Start again; what was asked for meanwhile is done."""
        with self._changed:
            self._drained = False
            while len(self._threads) < min(self._count, len(self._queue)):
                self._start_thread()
            self._changed.notify_all()

    def close(self) -> None:
        """Drop what has not begun, and wait for what runs."""
        with self._changed:
            self._queue.clear()
            self._stopping = True
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

"""The outside of devices: one thread that waits for sockets, and calls whoever waits for them.

It knows nothing of guests. It can be stopped and started again, so that the process may fork with
a single thread; after a fork, the child makes its own (an inherited epoll would be the parent's).
"""

from __future__ import annotations

import os
import selectors
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol


class HasFileno(Protocol):
    """A socket, or anything else that has a file descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


class Watch:
    """One descriptor that is watched; `reading` and `writing` may be changed at any time."""

    def __init__(
        self,
        reactor: Reactor,
        file: HasFileno,
        readable: Callable[[], None],
        writable: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self.fd = file.fileno()
        self.readable = readable
        self.writable = writable
        self.reading = True
        self.writing = False

    def want(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """Change what is waited for; None leaves it as it is."""
        self._reactor.change(self, reading, writing)

    def close(self) -> None:
        """Watch no longer; call it before the descriptor is closed."""
        self._reactor.forget(self)


class Reactor:
    """A selector, and after `start` a thread that serves it; without, `poll` serves it.

    Args:
        failed: Called with an exception that a callback raised: a mistake of vmlab's own.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._lock = threading.RLock()
        self._watches: dict[int, Watch] = {}
        self._selector: selectors.BaseSelector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None
        self._stopping = False

    def watch(
        self,
        file: HasFileno,
        readable: Callable[[], None],
        writable: Callable[[], None] = lambda: None,
    ) -> Watch:
        """Call `readable` whenever `file` can be read, and `writable` when that is wanted."""
        watch = Watch(self, file, readable, writable)
        with self._lock:
            self._watches[watch.fd] = watch
            self._apply(watch)
        return watch

    def change(self, watch: Watch, reading: bool | None, writing: bool | None) -> None:
        """`watch.want(...)`."""
        with self._lock:
            if self._watches.get(watch.fd) is not watch:
                return
            watch.reading = watch.reading if reading is None else reading
            watch.writing = watch.writing if writing is None else writing
            self._apply(watch)

    def forget(self, watch: Watch) -> None:
        """`watch.close()`."""
        with self._lock:
            if self._watches.get(watch.fd) is watch:
                watch.reading = watch.writing = False
                self._apply(watch)
                del self._watches[watch.fd]

    def _apply(self, watch: Watch) -> None:
        events = selectors.EVENT_READ * watch.reading | selectors.EVENT_WRITE * watch.writing
        known = watch.fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(watch.fd)
        elif known:
            self._selector.modify(watch.fd, events)
        else:
            self._selector.register(watch.fd, events)
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_write, b"x")

    def poll(self, seconds: float | None = 0) -> bool:
        """Wait up to `seconds` (None: without end) and make the calls that are due; if any were."""
        called = False
        for key, events in self._selector.select(seconds):
            if key.fd == self._wake_read:
                with suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                continue
            with self._lock:
                watch = self._watches.get(key.fd)
            if watch is None:
                continue
            called = True
            if events & selectors.EVENT_READ and watch.reading:
                watch.readable()
            if events & selectors.EVENT_WRITE and watch.writing:
                watch.writable()
        return called

    def start(self) -> None:
        """Serve from a thread."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._serve, name="vmlab-reactor", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while not self._stopping:
            try:
                self.poll(None)
            except BaseException as error:
                self._failed(error)

    def stop(self) -> None:
        """End the thread; what becomes ready meanwhile is served after `start`."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = True
            self._wake()
            thread.join()

    def close(self) -> None:
        """Stop, and forget everything; the descriptors stay their owners'."""
        self.stop()
        with self._lock:
            self._watches.clear()
            self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

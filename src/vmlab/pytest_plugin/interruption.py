"""Ends what a test is doing, from another thread: an exception raised inside whatever blocks it.

The main thread gets a signal whose handler raises, which ends sleeps, waits for locks and reads
alike (PEP 475; signal(7)). SIGURG, since nobody else uses it and its default is to be ignored, so
that one that comes late harms nothing. Not for tests in other threads: those end at their end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

SIGNAL: Final = signal.SIGURG
_AGAIN: Final = 15.0
"""Seconds after which somebody who is still blocked, clearing up for example, is told again."""


class Interruption:
    """Raises exceptions in the main thread, while it is in an `open` block and not otherwise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = False
        self._error: BaseException | None = None
        self._again: threading.Timer | None = None
        self._before: Any = None
        self._installed = False

    def install(self) -> None:
        """Take the signal, if nobody else has it and this is the main thread."""
        here = threading.current_thread() is threading.main_thread()
        if here and signal.getsignal(SIGNAL) is signal.SIG_DFL:
            self._before = signal.signal(SIGNAL, self._arrived)
            self._installed = True

    def uninstall(self) -> None:
        """Give the signal back."""
        if self._installed:
            signal.signal(SIGNAL, self._before)
            self._installed = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """A block that may be ended by `interrupt`."""
        self._error = None
        self._open = True
        try:
            yield
        finally:
            self._open = False
            with self._lock:
                if self._again is not None:
                    self._again.cancel()
                    self._again = None

    def interrupt(self, error: BaseException) -> bool:
        """Raise `error` in the main thread, from any thread; whether there is a block to end."""
        if not self._open or not self._installed:
            return False
        with self._lock:
            self._error = error
            self._tell()
        return True

    def _tell(self) -> None:
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, SIGNAL)
        self._again = threading.Timer(_AGAIN, self._remind)
        self._again.daemon = True
        self._again.start()

    def _remind(self) -> None:
        with self._lock:
            if self._open and self._error is not None:
                self._tell()

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._open and self._error is not None:
            raise self._error

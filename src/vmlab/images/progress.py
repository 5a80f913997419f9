"""How long work tells of itself: plain events that a caller may draw, log or ignore.

Not a progress bar: drawing is the command line's business.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class ProgressEvent:
    """Where one step of the work stands.

    Args:
        step: What is being done, in words for a person; the same text for all events of a step.
        done: How much is done so far: bytes, or what `unit` says.
        total: How much the whole step is, or None while that is not known.
        finished: True in the step's last event.
        unit: What is counted, in the plural; "bytes" or such as "packages".
    """

    step: str
    done: int = 0
    total: int | None = None
    finished: bool = False
    unit: str = "bytes"


Progress = Callable[[ProgressEvent], None]
"""Called many times a second, from the thread that works and from others; it must not block."""

Measure = Callable[[], tuple[int, int | None]]
"""How far something is: done, and total where it is known."""


def silent(event: ProgressEvent) -> None:
    """The progress of a caller that does not want to see any."""


@contextmanager
def watched(
    step: str, progress: Progress, measure: Measure = lambda: (0, None), *, unit: str = "bytes"
) -> Iterator[None]:
    """Tell of a step while the block does it, by looking again and again how far it is.

    Args:
        step: As in the events.
        progress: Told at the beginning, several times a second, and at the end.
        measure: Called from another thread as well; when it fails, the last answer counts.
        unit: As in the events.
    """
    if progress is silent:
        yield
        return
    latest: tuple[int, int | None] = (0, None)

    def look() -> None:
        nonlocal latest
        with suppress(OSError, ValueError):  # a file that is not there yet, or no longer open
            latest = measure()
        progress(ProgressEvent(step, *latest, unit=unit))

    look()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    done, total = latest
    progress(ProgressEvent(step, total or done, total, finished=True, unit=unit))


def reading(file: BinaryIO) -> Measure:
    """How far a file that is open has been read."""
    descriptor = file.fileno()
    total = os.fstat(descriptor).st_size

    def measure() -> tuple[int, int | None]:
        if file.closed:
            raise ValueError("the file is closed")
        return os.lseek(descriptor, 0, os.SEEK_CUR), total

    return measure

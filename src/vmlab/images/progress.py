"""How long work tells of itself: plain events that a caller may draw, log or ignore.

Not a progress bar: drawing is the command line's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """Where one step of the work stands.

    Args:
        step: What is being done, in words for a person; the same text for all events of a step.
        done: Bytes done so far.
        total: Bytes of the whole step, or None while that is not known.
        finished: True in the step's last event.
    """

    step: str
    done: int = 0
    total: int | None = None
    finished: bool = False


Progress = Callable[[ProgressEvent], None]
"""Called from the thread that works, many times a second; it must not block."""


def silent(event: ProgressEvent) -> None:
    """The progress of a caller that does not want to see any."""

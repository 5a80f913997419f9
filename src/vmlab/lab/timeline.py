"""Where the time went between a request and its answer: named steps, in order, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name and how many seconds it took."""

    name: str
    seconds: float


@dataclass
class Timeline:
    """The steps so far; `told` is called with each when it is over."""

    steps: list[Step] = field(default_factory=list)
    told: Callable[[Step], None] | None = None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block; it counts whether it ends well or not."""
        begun = time.monotonic()
        try:
            yield
        finally:
            step = Step(name, time.monotonic() - begun)
            self.steps.append(step)
            if self.told is not None:
                self.told(step)

    def split(self, name: str, parts: dict[str, float]) -> None:
        """Replace a step by its parts; what they do not account for goes to the last of them."""
        for position, step in enumerate(self.steps):
            if step.name == name:
                known = [Step(part, max(0.0, seconds)) for part, seconds in parts.items()]
                rest = step.seconds - sum(part.seconds for part in known)
                last = known.pop()
                known.append(Step(last.name, max(0.0, last.seconds + rest)))
                self.steps[position : position + 1] = known
                return

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(step.seconds for step in self.steps)

"""What a simulated hypervisor did: operations, drawn latencies, faults, events, as JSON lines.

On the virtual clock the same seed and the same calls give the same lines, byte for byte.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any, Final

KEEP: Final = 200_000
"""Lines that are kept; older ones are dropped, which the first line then says."""


class Trace:
    """The newest lines of what happened, rendered when they are asked for."""

    __slots__ = ("_count", "_lines", "_seed")

    def __init__(self, seed: int, keep: int = KEEP) -> None:
        self._seed = seed
        self._count = 0
        self._lines: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=keep)

    def add(self, time: float, what: str, facts: dict[str, Any]) -> None:
        """Note that `what` happened at `time` (seconds on the hypervisor's clock)."""
        self._count += 1
        self._lines.append((time, what, facts))

    def render(self) -> str:
        """All lines; the first has the seed and how many lines were dropped."""
        head = {"seed": self._seed, "dropped": self._count - len(self._lines)}
        lines = [json.dumps(head)]
        lines.extend(
            json.dumps({"time": round(time, 6), "what": what, **facts}, default=str)
            for time, what, facts in self._lines
        )
        return "\n".join(lines) + "\n"

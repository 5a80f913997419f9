"""Stopping where a debugger wants to: breakpoints and watchpoints, for every executor alike.

A breakpoint stops before its instruction, a watchpoint after the access. Both are virtual addresses
in whatever address space, as with the triggers of a real hart. A step passes over breakpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.machine.errors import VmlabError


@dataclass(frozen=True)
class Watchpoint:
    """Bytes, by virtual address, and which accesses are wanted (WATCH_READS, WATCH_WRITES)."""

    address: int
    size: int
    kinds: int


@dataclass(frozen=True)
class Points:
    """Where to stop.

    Raises:
        VmlabError: there are more watchpoints than a hart has.
    """

    breakpoints: frozenset[int] = frozenset()
    watchpoints: frozenset[Watchpoint] = frozenset()

    def __post_init__(self) -> None:
        if len(self.watchpoints) > layout.WATCHPOINTS:
            raise VmlabError(
                f"a hart has {layout.WATCHPOINTS} watchpoints, not {len(self.watchpoints)}",
                hint="delete one first",
            )


NO_POINTS: Final = Points()


class StoppingExecutor(ABC):
    """The part of an executor that has to do with points.

    Args:
        hart: who is executed.
    """

    def __init__(self, hart: Hart) -> None:
        self.hart = hart
        self.points = NO_POINTS
        self.served: dict[Reason, int] = {}  # how often it left for something that it does itself
        self._hit: Exit | None = None  # a watchpoint's, to be told when the access is complete

    def run(self, budget: int) -> Exit:
        """Execute until there is something for the host to do.

        Args:
            budget: instructions after which to return, at the next poll point.
        """
        return self._told() or self._with_hit(self._run(budget))

    def step(self, *, masked: bool = False) -> Exit:
        """Execute one instruction, or take one trap, whatever breakpoint is there.

        Args:
            masked: take no interrupt meanwhile.
        """
        how = layout.STEP | (layout.STEP_MASKED if masked else 0)
        return self._told() or self._with_hit(self._step(how))

    def stop_at(self, points: Points) -> None:
        """Stop at these points, and no others, from now on."""
        self.points = points

    @abstractmethod
    def _run(self, budget: int) -> Exit:
        """`run`; an access that is watched leaves with Reason.WATCHPOINT before it is made."""

    @abstractmethod
    def _step(self, how: int) -> Exit:
        """`step`, with bits of STEPPING."""

    def _told(self) -> Exit | None:
        hit, self._hit = self._hit, None
        # A hart that was reset in between has nothing to do with it.
        return hit if self.hart.executor is self else None

    def _with_hit(self, left: Exit) -> Exit:
        if left.reason is not Reason.WATCHPOINT:
            return left
        retired = self.hart.retired
        after = self._step(layout.STEP | layout.STEP_MASKED | layout.STEP_UNWATCHED)
        if self.hart.retired == retired:
            return after  # it has trapped, and nothing was accessed
        if after.reason is Reason.BUDGET:
            return left
        self._hit = left
        return after

    def _arm(self) -> None:
        """Let the hart know of the watchpoints."""
        hart, points = self.hart, self.points
        hart[layout.WATCHING] = bool(points.watchpoints)
        words = [0] * len(layout.WATCHED)
        for place, one in enumerate(points.watchpoints):
            words[3 * place : 3 * place + 3] = one.address, one.size, one.kinds
        for field, word in zip(layout.WATCHED, words, strict=True):
            hart[field] = word

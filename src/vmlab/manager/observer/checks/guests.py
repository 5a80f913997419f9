"""Guests that should answer and do not, and guests whose clock is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.known import Known
from vmlab.manager.observer.seen import Seen

__all__ = ["agent_unreachable", "clock_drift"]


def agent_unreachable(known: Known, seen: Seen) -> Iterator[Difference]:
    """Guests that were asked for a sign of life and gave none."""
    for guest in seen.guests:
        machine = known.machine.get(guest.machine)
        if guest.answered or machine is None:
            continue
        yield Difference(
            code="guest-agent-unreachable",
            severity="warning",
            subject=machine.id,
            name=machine.name,
            message=f"the guest of machine {machine.name!r} does not answer: {guest.problem}",
            hint="look at its console; reconcile restarts the machine",
            source=f"guest:{machine.id}",
            evidence={"problem": guest.problem, "host": machine.host},
            touches=frozenset({machine.id}),
            actions=("reconcile",),
        )


def clock_drift(known: Known, seen: Seen, *, tolerance: float) -> Iterator[Difference]:
    """Guests whose clock is off by more than `tolerance` seconds and what asking took."""
    for guest in seen.guests:
        machine = known.machine.get(guest.machine)
        if guest.drift is None or machine is None:
            continue
        if abs(guest.drift) <= tolerance + guest.uncertainty:
            continue
        way = "ahead" if guest.drift > 0 else "behind"
        yield Difference(
            code="clock-drift",
            severity="warning",
            subject=machine.id,
            name=machine.name,
            message=f"the clock of machine {machine.name!r} is {abs(guest.drift):.1f} s {way}",
            hint="reconcile sets it",
            source=f"guest:{machine.id}",
            evidence={
                "drift": round(guest.drift, 3),
                "uncertainty": round(guest.uncertainty, 3),
                "tolerance": tolerance,
            },
            touches=frozenset({machine.id}),
            actions=("reconcile",),
        )

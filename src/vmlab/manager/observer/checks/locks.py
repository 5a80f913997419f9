"""Locks and reservations of somebody who is gone, or who is not the one that should have them."""

from __future__ import annotations

from collections.abc import Iterator

from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.known import Known
from vmlab.manager.observer.seen import Seen

__all__ = ["stale_lock"]


def stale_lock(known: Known, seen: Seen) -> Iterator[Difference]:
    """Locks that a stranger holds or a dead process left, reservations of operations that ended."""
    yield from _files(known, seen)
    for reservation in known.reservations:
        if not reservation.ended:
            continue
        yield Difference(
            code="stale-lock",
            severity="warning",
            subject=f"reservation {reservation.id}",
            name=reservation.what,
            message=f"{reservation.what} are set aside for operation {reservation.operation}, "
            "which has ended",
            hint="reconcile lets them go",
            source="store",
            evidence={"reservation": reservation.id, "operation": reservation.operation},
            touches=frozenset({reservation.operation}),
            actions=("reconcile",),
        )


def _files(known: Known, seen: Seen) -> Iterator[Difference]:
    if "locks" not in seen.looked:
        return
    places = {machine.id: machine for machine in seen.machines}
    for lock in seen.locks:
        found = places.get(lock.machine) if lock.machine is not None else None
        stored = known.placed.get((found.host, found.at)) if found is not None else None
        touches = frozenset({stored.id}) if stored is not None else frozenset[str]()
        title = repr(stored.name) if stored is not None else lock.path.name
        if lock.holder is not None and lock.ours:
            continue
        if lock.holder is not None:
            who, hint = f"process {lock.holder}, which is not the manager's", "end that process"
            message = f"the lock of {title} is held by {who}: operations on it wait for that"
        elif lock.named is not None and not lock.alive:
            hint = "reconcile removes the file"
            message = f"the lock of {title} names process {lock.named}, which is gone"
        else:
            continue
        yield Difference(
            code="stale-lock",
            severity="error" if lock.holder is not None else "info",
            subject=str(lock.path),
            name=title,
            message=message,
            hint=hint,
            source="locks",
            evidence={
                "path": str(lock.path),
                "holder": lock.holder,
                "named": lock.named,
                "machine": lock.machine,
            },
            touches=touches,
            actions=("reconcile",) if lock.holder is None else (),
        )

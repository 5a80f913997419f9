"""What a manager finds when it starts: operations that were under way, machines that live on.

Operations are taken up at the first step that is not done (`journal.py`). Machines are found again
by their hypervisors; the store is not changed by that: what differs is the observer's to tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.manager.store.tables import MachineRow, OperationRow

__all__ = ["Unfinished", "hosts_with_machines", "unfinished"]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An operation that was not ended when its manager was."""

    id: str
    kind: str
    number: int
    keys: frozenset[str]


def unfinished(session: Session) -> list[Unfinished]:
    """The operations that are to be taken up, first those that were under way, by their places."""
    rows = session.scalars(
        select(OperationRow)
        .where(OperationRow.state.in_(("running", "queued")))
        .order_by(OperationRow.state.desc(), OperationRow.number)
    )
    # One that was under way has what it changes to itself already: it goes before all others.
    return [
        Unfinished(
            row.id,
            row.kind,
            row.number if row.state == "queued" else row.number - _AHEAD,
            frozenset(row.lock_keys),
        )
        for row in rows
    ]


_AHEAD = 1 << 60


def hosts_with_machines(session: Session) -> list[str]:
    """The names of the hosts that have machines, which have to be opened to find them again."""
    return list(session.scalars(select(MachineRow.host).distinct().order_by(MachineRow.host)))

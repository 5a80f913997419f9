"""What a store forgets: the oldest events, operations that have ended, findings that are resolved.

As many of each are kept as the settings say. Nothing goes that something else in the store refers
to, and nothing that is still under way.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, delete, exists, select
from sqlalchemy.orm import Session, aliased

from vmlab.manager.store.changes import counted
from vmlab.manager.store.tables import EventRow, FindingRow, MachineRow, OperationRow

__all__ = ["prune_events", "prune_findings", "prune_operations"]


def prune_events(s: Session, *, last: int, kept: int) -> int:
    """Forget events, so that `kept` are left; returns the oldest one that is."""
    oldest = max(1, last - kept + 1)
    s.execute(delete(EventRow).where(EventRow.id < oldest))
    return oldest


def prune_operations(s: Session, *, kept: int) -> None:
    """Forget operations that have ended, with their journals, all but the newest `kept`."""
    undoing = aliased(OperationRow)
    s.execute(
        delete(OperationRow)
        .where(
            OperationRow.number <= counted(s, "operations") - kept,
            OperationRow.ended.is_not(None),
            ~exists().where(MachineRow.operation_id == OperationRow.id),
            ~exists().where(FindingRow.operation_id == OperationRow.id),
            ~exists().where(undoing.undo_of == OperationRow.id),
        )
        .execution_options(synchronize_session=False)
    )


def prune_findings(s: Session, *, kept: int) -> None:
    """Forget findings that are resolved, all but the newest `kept`."""
    newest: Select[Any] = (
        select(FindingRow.resolved)
        .where(FindingRow.resolved.is_not(None))
        .order_by(FindingRow.resolved.desc())
        .offset(kept)
        .limit(1)
    )
    s.execute(
        delete(FindingRow)
        .where(FindingRow.resolved <= newest.scalar_subquery())
        .execution_options(synchronize_session=False)
    )

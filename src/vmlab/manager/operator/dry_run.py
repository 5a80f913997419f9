"""Saying what would be done, step by step, and touching nothing.

The request is checked as any other, with all that it would claim, and that is rolled back. What is
kept is the operation with its plan, so that it can be read and waited for like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from vmlab.manager.operator.handler import Handler, Target
from vmlab.manager.requests import Request
from vmlab.manager.store.changes import EVENTS
from vmlab.manager.store.tables import OperationRow, StepRow, now

__all__ = ["pretend"]


def pretend(
    session: Session,
    handler: Handler[Any],
    request: Request,
    row: OperationRow,
    compare: Callable[[Target], None],
) -> None:
    """Check the request, and write down what would be done instead of doing it.

    Args:
        session: The transaction that takes the operation down.
        handler: Of the request's kind.
        request: As it was prepared.
        row: The operation.
        compare: Refuses a target of the wrong version.

    Raises:
        VmlabError: it would be refused.
    """
    events = list(session.info.get(EVENTS, []))
    claims = session.begin_nested()
    target = handler.check(session, request)
    compare(target)
    session.flush()
    steps = list(handler.plan(session, request))
    claims.rollback()
    session.info[EVENTS] = events
    row.target, row.target_name = target.id, target.name
    row.state = "succeeded"
    row.progress = 1.0
    row.started = row.ended = now()
    row.result = {"dry_run": True}
    for position, step in enumerate(steps):
        session.add(StepRow(operation_id=row.id, name=step.name, position=position, text=step.text))
    session.flush()
    session.refresh(row)

"""The findings that are kept: raised, seen again, resolved; each change with its event.

One finding is open for a code and a subject; when its difference is gone it is resolved, and a
later one is a new finding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from vmlab.manager.documents import FindingDocument
from vmlab.manager.observer.collect.store import stirred_since
from vmlab.manager.observer.difference import CODES, Difference
from vmlab.manager.requests import Policy
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.queries import finding_document
from vmlab.manager.store.tables import FindingRow, new_id, now

__all__ = ["Open", "Raised", "documents", "note", "open_findings", "resolve"]

_NEVER_THE_SAME: Final = frozenset({"clock-drift", "storage-low"})
"""Codes whose message has a number that changes all the time: only what else changes is told."""

_MOST_REPAIRS: Final = 5
_WITHIN: Final = timedelta(hours=1)
"""What was repaired so often in that time is not mended by that: it is only reported."""


@dataclass(frozen=True, slots=True)
class Open:
    """A finding that is open, as far as the observer needs it."""

    id: str
    code: str
    subject: str
    source: str
    touches: frozenset[str]

    @property
    def key(self) -> tuple[str, str]:
        """Which difference it is of."""
        return self.code, self.subject


@dataclass(frozen=True, slots=True)
class Raised:
    """A difference that was confirmed, with the policy for it."""

    difference: Difference
    policy: Policy


def open_findings(session: Session, about: Collection[str] | None = None) -> list[Open]:
    """The findings that are open: all of them, or those of the subjects in `about`."""
    of_open = select(
        FindingRow.id,
        FindingRow.code,
        FindingRow.subject,
        FindingRow.source,
        FindingRow.touches,
    ).where(FindingRow.resolved.is_(None))
    if about is not None:
        of_open = of_open.where(FindingRow.code.in_(CODES), FindingRow.subject.in_(about))
    rows = session.execute(of_open)
    return [
        Open(id_, code, about, source, frozenset(ids)) for id_, code, about, source, ids in rows
    ]


def documents(session: Session) -> list[FindingDocument]:
    """All findings that are open, the oldest first, as they are told."""
    rows = session.scalars(
        select(FindingRow)
        .where(FindingRow.resolved.is_(None))
        .order_by(FindingRow.first_seen, FindingRow.id)
    )
    return [finding_document(session, row) for row in rows]


def note(
    session: Session,
    found: Sequence[Raised],
    gone: Collection[str],
    *,
    event: int,
) -> list[str]:
    """Write down what a look has shown.

    Args:
        session: A transaction that writes.
        found: Differences that are there.
        gone: Ids of findings whose difference is not there any more.
        event: Number of the store's newest event when the look began.

    Returns:
        Ids of the findings that are open for `found`. A difference on what has changed since the
        look began is none: it is left out, and looked at again.
    """
    stirred = stirred_since(session, event)
    present = now()
    keys = [raised.difference.key for raised in found]
    of_open = select(FindingRow).where(FindingRow.resolved.is_(None))
    before = {
        (row.code, row.subject): row
        for row in session.scalars(
            of_open.where(
                FindingRow.code.in_({code for code, _ in keys}),
                FindingRow.subject.in_({subject for _, subject in keys}),
            )
        )
    }
    ids, again = [], []
    for raised in found:
        difference = raised.difference
        if difference.touches & stirred:
            continue
        row = before.get(difference.key)
        if row is None:
            ids.append(_raise(session, raised, present).id)
            continue
        ids.append(row.id)
        again.append(row.id)
        _see_again(session, row, raised)
    # One statement: many findings that stay as they are would be as many updates.
    session.execute(update(FindingRow).where(FindingRow.id.in_(again)).values(last_seen=present))
    for row in session.scalars(of_open.where(FindingRow.id.in_(gone))):
        if stirred.isdisjoint(row.touches):
            resolve(session, row)
    return ids


def _raise(session: Session, raised: Raised, present: datetime) -> FindingRow:
    difference = raised.difference
    policy, hint = raised.policy, difference.hint
    if policy != "report":
        repaired = _recently_repaired(session, difference.code, difference.subject)
        if repaired >= _MOST_REPAIRS:
            policy = "report"
            hint = f"it was repaired {repaired} times within an hour, and is left as it is; {hint}"
    row = FindingRow(
        id=new_id(),
        code=difference.code,
        severity=difference.severity,
        subject=difference.subject,
        name=difference.name,
        message=difference.message,
        hint=hint,
        evidence=dict(difference.evidence),
        source=difference.source,
        touches=sorted(difference.touches),
        policy=policy,
        actions=list(difference.actions),
        first_seen=present,
        last_seen=present,
    )
    session.add(row)
    _tell(session, row, "finding.raised")
    return row


def _see_again(session: Session, row: FindingRow, raised: Raised) -> None:
    """Take over what is different about a finding that is still there."""
    difference = raised.difference
    given_up = row.policy == "report" and row.hint != difference.hint
    policy = row.policy if given_up else raised.policy
    changed = (row.severity, row.policy, list(row.actions)) != (
        difference.severity,
        policy,
        list(difference.actions),
    ) or (row.message != difference.message and difference.code not in _NEVER_THE_SAME)
    row.evidence = dict(difference.evidence)
    row.source, row.touches = difference.source, sorted(difference.touches)
    row.actions = list(difference.actions)
    row.policy = policy
    row.message, row.severity = difference.message, difference.severity
    if not given_up:
        row.hint = difference.hint
    if changed:
        _tell(session, row, "finding.seen")


def resolve(session: Session, row: FindingRow, *, operation: str | None = None) -> None:
    """Its difference is gone: by itself, or by that operation."""
    row.resolved = now()
    if operation is not None:
        row.operation_id = operation
    _tell(session, row, "finding.repaired" if operation else "finding.resolved", operation)


def _tell(session: Session, row: FindingRow, kind: str, operation: str | None = None) -> None:
    data: Mapping[str, Any] = {
        "finding": row.id,
        "code": row.code,
        "severity": row.severity,
        "message": row.message,
        "policy": row.policy,
    }
    add_event(session, kind, subject=row.subject, name=row.name, operation=operation, data=data)


def _recently_repaired(session: Session, code: str, subject: str) -> int:
    """How many findings of that kind were repaired within the last hour."""
    found = session.scalar(
        select(func.count())
        .select_from(FindingRow)
        .where(
            FindingRow.code == code,
            FindingRow.subject == subject,
            FindingRow.operation_id.is_not(None),
            FindingRow.first_seen >= now() - _WITHIN,
        )
    )
    return int(found or 0)

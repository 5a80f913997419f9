"""What policies do by themselves: a repair is asked for, as anybody could ask for it.

A repair that fails is asked for again, each time after a longer while, and then no more: a person
has to look at it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.machine.errors import VmlabError
from vmlab.manager.documents import ENDED
from vmlab.manager.observer.policies import repair_for
from vmlab.manager.requests import Policy, RepairFinding
from vmlab.manager.store.tables import FindingRow, OperationRow, now

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["ACTOR", "Automatic"]

_LOG: Final = logging.getLogger(__name__)

ACTOR: Final = "observer"
"""Who asks for the repairs that policies want."""

_AT_ONCE: Final = 500
"""Ids in one statement: databases do not take any number of them."""
_ATTEMPTS: Final = 5
_FIRST_PAUSE: Final = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class _Wanted:
    finding: str
    action: Policy
    attempt: int


class Automatic:
    """Asks for the repairs that policies want."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def repair(self, findings: Collection[str]) -> None:
        """Have those findings repaired whose policy says so, unless that is under way."""
        if self._manager.settings.dry_run:
            return
        for wanted in await self._manager.database.read(_wanted, list(findings)):
            try:
                await self._manager.operator.submit(
                    RepairFinding(finding=wanted.finding, action=wanted.action),
                    actor=ACTOR,
                    idempotency_key=f"{wanted.finding}/{wanted.attempt}",
                )
            except VmlabError as error:
                # It has changed since; the next look sees how it is now.
                _LOG.info("finding %s is not repaired now: %s", wanted.finding, error)


def _wanted(session: Session, findings: list[str]) -> list[_Wanted]:
    """The repairs that are due for those findings."""
    wanted = []
    for row in _not_only_reported(session, findings):
        id_ = row.id
        action = repair_for(row.code, row.policy, row.actions)
        if action is None:
            continue
        before = session.execute(
            select(OperationRow.state, OperationRow.ended)
            .where(
                OperationRow.kind == "finding.repair",
                OperationRow.target == id_,
                OperationRow.dry_run.is_(False),
            )
            .order_by(OperationRow.number)
        ).all()
        if len(before) >= _ATTEMPTS or any(state not in ENDED for state, _ in before):
            continue
        if before and before[-1].ended is not None:
            pause = _FIRST_PAUSE * 3 ** (len(before) - 1)
            if before[-1].ended + pause > now():
                continue
        wanted.append(_Wanted(id_, action, len(before)))
    return wanted


def _not_only_reported(session: Session, findings: list[str]) -> Iterator[FindingRow]:
    """Those of the findings that are open, and that a policy wants more of than to be told."""
    for first in range(0, len(findings), _AT_ONCE):
        yield from session.scalars(
            select(FindingRow)
            .where(
                FindingRow.id.in_(findings[first : first + _AT_ONCE]),
                FindingRow.resolved.is_(None),
                FindingRow.policy != "report",
            )
            .order_by(FindingRow.first_seen, FindingRow.id)
        )

"""What a repair is: one way of mending findings of one code, as steps of an operation.

A repair does what its action's line in `CODES` says and nothing else. What it remembers of how the
thing was before is what its undo is made of.
"""

from __future__ import annotations

import asyncio
import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from sqlalchemy.orm import Session

from vmlab.machine.errors import OperationFailed, VmlabError
from vmlab.manager.operator.handler import Handler, PlannedStep, handlers_for
from vmlab.manager.operator.journal import RollingBack, Work
from vmlab.manager.requests import FindingCode, Policy, Request
from vmlab.manager.store.tables import FindingRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["REPAIRS", "Delegated", "Facts", "Repair", "repair"]


@dataclass(frozen=True, slots=True)
class Facts:
    """A finding, as far as its repair needs it; `name` is what a person calls its subject."""

    id: str
    code: str
    subject: str
    name: str | None
    message: str
    evidence: Mapping[str, Any]

    @classmethod
    def of(cls, row: FindingRow) -> Facts:
        """Of a finding of the store's."""
        return cls(row.id, row.code, row.subject, row.name, row.message, dict(row.evidence))


class Repair(ABC):
    """One way of mending findings of one code. No object of it has a state."""

    code: ClassVar[FindingCode]
    action: ClassVar[Policy]
    text: ClassVar[str]
    """What it does, for a person."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager

    async def prepare(self, facts: Facts) -> None:
        """Have known what `check` needs; changes nothing."""
        return

    @abstractmethod
    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        """Refuse what is not so any more; the locks that it needs (`operator.handler.key`).

        Raises:
            VmlabError: it cannot be done, and why.
        """

    def withdrawn(self, session: Session, facts: Facts) -> None:
        """Give back what `check` claimed: the operation was cancelled before it ran."""
        return

    def plan(self, session: Session, facts: Facts) -> Sequence[PlannedStep]:
        """What would be done."""
        return [PlannedStep(self.action, self.text)]

    @abstractmethod
    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        """Do it; what `undo` needs, or None where it cannot be undone."""

    def check_undo(self, session: Session, facts: Facts, before: Mapping[str, Any]) -> None:
        """Refuse to undo what cannot be undone any more.

        Raises:
            VmlabError: saying why.
        """
        return

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        """Put back what `run` did, whose result `before` is."""
        raise OperationFailed(
            f"{self.text}: that cannot be undone", operation="finding.repair"
        )  # pragma: no cover - `run` gives nothing to undo it by


REPAIRS: Final[dict[tuple[str, str], type[Repair]]] = {}
"""All repairs, by the finding's code and the action."""

C = TypeVar("C", bound="type[Repair]")


def repair(cls: C) -> C:
    """Have findings of that code repaired so; a decorator of the class."""
    known = REPAIRS.setdefault((cls.code, cls.action), cls)
    assert known is cls, f"{cls.code} has two repairs for {cls.action}"
    return cls


class Delegated:
    """A repair's use of another kind of operation: its checks, steps and undo, in this operation.

    Args:
        manager: Whose operation it is.
        request: What is to be done.
        target: Id of what that changes.
    """

    def __init__(self, manager: Manager, request: Request, target: str) -> None:
        self.request = request
        self.target = target
        self.handler: Handler[Any] = handlers_for(manager)[request.kind]

    async def prepare(self) -> None:
        """As if it had been asked for."""
        await self.handler.prepare(self.request)

    def check(self, session: Session) -> frozenset[str]:
        """The locks that it needs, with what it needs claimed."""
        return self.handler.check(session, self.request).keys

    def withdrawn(self, session: Session) -> None:
        """Give back what `check` claimed."""
        self.handler.withdrawn(session, self.request, self.target)

    def plan(self, session: Session) -> Sequence[PlannedStep]:
        """What would be done."""
        return self.handler.plan(session, self.request)

    async def run(self, work: Work[Any]) -> dict[str, Any] | None:
        """Do it. Its steps and their undo are those of `work`, which has one journal."""
        inner = copy.copy(work)
        inner.request, inner.target = self.request, self.target
        try:
            return await self.handler.run(inner)
        except RollingBack:
            raise
        except VmlabError as error:
            inner.failure = inner.failure or error
            raise
        except asyncio.CancelledError:
            inner.cancelled = work.cancelled
            raise

"""The operation `finding.repair`: does what an action says about a finding, or puts that back.

What removes data needs its name, typed by a person: no policy has one, so none gets here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError
from vmlab.manager.documents import ENDED
from vmlab.manager.observer.difference import CODES
from vmlab.manager.observer.findings import resolve
from vmlab.manager.observer.repairs import REPAIRS, Facts, Repair
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.journal import Work
from vmlab.manager.requests import RepairFinding
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.queries import find_finding
from vmlab.manager.store.tables import FindingRow, OperationRow

__all__ = ["RepairHandler"]


@register
class RepairHandler(Handler[RepairFinding]):
    """Repairs a finding, or undoes its repair."""

    kind = "finding.repair"

    def _repair(self, facts: Facts, request: RepairFinding) -> Repair:
        return REPAIRS[facts.code, request.action](self.manager)

    async def prepare(self, request: RepairFinding) -> RepairFinding:
        facts = await self.manager.database.read(_facts, request)
        if not request.undo:
            await self._repair(facts, request).prepare(facts)
        return request

    def check(self, session: Session, request: RepairFinding) -> Target:
        row = find_finding(session, request.finding)
        facts = _facts(session, request)
        repair = self._repair(facts, request)
        lock = key("finding", row.id)
        if request.undo:
            before = _undoable(session, row, request.action)
            repair.check_undo(session, facts, before)
            repaired = session.get_one(OperationRow, row.operation_id)
            return Target(row.id, row.name, frozenset({*repaired.lock_keys, lock}))
        keys = repair.check(session, facts)
        row.operation_id = operation_of(session)
        return Target(row.id, row.name, keys | {lock})

    def withdrawn(self, session: Session, request: RepairFinding, target: str | None) -> None:
        facts = _facts(session, request)
        if not request.undo:
            self._repair(facts, request).withdrawn(session, facts)

    def plan(self, session: Session, request: RepairFinding) -> Sequence[PlannedStep]:
        facts = _facts(session, request)
        repair = self._repair(facts, request)
        if request.undo:
            return [PlannedStep("undo", f"put back what this has done: {repair.text}")]
        return repair.plan(session, facts)

    async def run(self, work: Work[RepairFinding]) -> dict[str, Any] | None:
        facts = await work.database.read(_facts_now, work.target_id)
        repair = self._repair(facts, work.request)
        if work.request.undo:
            before = await work.database.read(_before, facts.id, work.request.action)
            await repair.undo(work, facts, before)
            async with work.step("note", "note that it is undone") as step:
                if not step.done_before:
                    step.also(_note_undone, facts.id, work.operation_id)
            return {"finding": facts.id, "undone": repair.text}
        undo = await repair.run(work, facts)
        async with work.step("note", "note that the finding is repaired") as step:
            if not step.done_before:
                step.also(_note_repaired, facts.id, work.operation_id)
        return {"finding": facts.id, "did": repair.text, "undo": undo}


# ------------------------------------------------------------------------ transactions


def _facts(session: Session, request: RepairFinding) -> Facts:
    """The finding that a request is about, if it can be repaired so.

    Raises:
        VmlabError: it cannot, and why.
    """
    row = find_finding(session, request.finding)
    code = CODES[row.code]
    if request.undo:
        _undoable(session, row, request.action)
        return Facts.of(row)
    if row.resolved is not None:
        raise Conflict(
            f"finding {row.id} ({row.code}) is resolved", hint="there is nothing to repair"
        )
    if request.action not in row.actions:
        possible = ", ".join(row.actions) or "nothing but what its hint says"
        raise InvalidSpec(
            [SpecProblem("action", request.action, f"what can be done here: {possible}")],
            what=f"repair of a finding of {row.code}",
            hint=row.hint or None,
            operation="finding.repair",
        )
    if request.action in code.destroys and request.name != row.name:
        raise InvalidSpec(
            [SpecProblem("name", request.name, f"the name of what is removed: {row.name!r}")],
            what=f"repair of a finding of {row.code}",
            hint=f"{code.actions[request.action]}: its data is gone then",
            operation="finding.repair",
        )
    return Facts.of(row)


def _facts_now(session: Session, finding: str) -> Facts:
    return Facts.of(session.get_one(FindingRow, finding))


def _undoable(session: Session, row: FindingRow, action: str) -> Mapping[str, Any]:
    """What the repair of a finding has to be undone by.

    Raises:
        VmlabError: there was none of that action, or it cannot be undone.
    """
    operation = session.get(OperationRow, row.operation_id) if row.operation_id else None
    if operation is None or operation.state not in ENDED:
        raise Conflict(
            f"finding {row.id} was not repaired",
            hint="there is nothing to undo" if operation is None else "wait for its repair to end",
        )
    did = operation.request.get("action")
    if did != action:
        raise InvalidSpec(
            [SpecProblem("action", action, f"what was done: {did!r}")],
            what=f"undo of the repair of a finding of {row.code}",
            hint=f"`vmlab findings repair {row.id} {did} --undo`",
            operation="finding.repair",
        )
    undo = (operation.result or {}).get("undo")
    if undo is None:
        raise VmlabError(
            f"what operation {operation.id} did cannot be undone", hint=operation.message or None
        )
    if (operation.result or {}).get("undone_by"):
        raise Conflict(f"operation {operation.id} was undone already")
    found: Mapping[str, Any] = undo
    return found


def _before(session: Session, finding: str, action: str) -> Mapping[str, Any]:
    return dict(_undoable(session, session.get_one(FindingRow, finding), action))


def _note_repaired(session: Session, finding: str, operation: str) -> None:
    row = session.get(FindingRow, finding)
    if row is not None and row.resolved is None:
        resolve(session, row, operation=operation)


def _note_undone(session: Session, finding: str, operation: str) -> None:
    row = session.get_one(FindingRow, finding)
    repaired = session.get(OperationRow, row.operation_id) if row.operation_id else None
    if repaired is not None:
        repaired.result = {**(repaired.result or {}), "undone_by": operation}
        session.get_one(OperationRow, operation).undo_of = repaired.id

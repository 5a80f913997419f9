"""What is done by itself at its time: scheduled snapshots, the end of snapshots that expire, and
the start of machines that ought to run when the manager begins.

Nothing is changed here: what is due is submitted to the operator as anybody else's request, under
the name "schedule", and refused like that where it cannot be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from vmlab.machine.errors import InvalidState, VmlabError
from vmlab.machine.states import OPERATIONS
from vmlab.manager.documents import ENDED
from vmlab.manager.requests import (
    DeleteSnapshot,
    MachinePolicy,
    SnapshotMachine,
    StartMachine,
)
from vmlab.manager.store.tables import MachineRow, OperationRow, SnapshotRow, now

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["ACTOR", "Schedules", "due"]

ACTOR: Final = "schedule"
"""Who asks for what is due."""
_LOG: Final = logging.getLogger(__name__)
_LONGEST_S: Final = 30.0
"""Seconds until what is due is looked for again, if nothing is known to be due before."""
_SHORTEST_S: Final = 0.5
_SNAPSHOT_STATES: Final = frozenset(state.value for state in OPERATIONS["snapshot"])


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be asked for now, and when the next thing is due; None where nothing is known."""

    requests: tuple[SnapshotMachine | DeleteSnapshot, ...]
    next: datetime | None


def due(session: Session, moment: datetime) -> Due:
    """What is due at a moment, by the store.

    A machine's scheduled snapshots begin one interval after it was made; of those there are, the
    newest ones are kept. What was missed while no manager ran is taken once.
    """
    requests: list[SnapshotMachine | DeleteSnapshot] = []
    later: list[datetime] = []
    machines = _with_schedule(session)
    snapshots = _snapshots(session, machines)
    busy = _pending(session)
    for machine_id in sorted({*machines, *snapshots}):
        taken = snapshots.get(machine_id, [])
        dropped = {kept.name for kept in taken if kept.expires and kept.expires <= moment}
        later += [kept.expires for kept in taken if kept.expires and kept.expires > moment]
        machine = machines.get(machine_id)
        if machine is not None:
            scheduled = [kept for kept in taken if kept.scheduled]
            dropped |= {kept.name for kept in scheduled[: -machine.keep]}
            when = (scheduled[-1].created if scheduled else machine.created) + machine.every
            name = f"auto-{moment:%Y%m%dT%H%M%S}"
            if when > moment:
                later.append(when)
            elif (
                machine.state in _SNAPSHOT_STATES
                and ("machine.snapshot", machine_id) not in busy
                and all(kept.name != name for kept in taken)
            ):
                requests.append(SnapshotMachine(machine=machine_id, name=name, scheduled=True))
        if ("snapshot.delete", machine_id) not in busy:
            requests += [DeleteSnapshot(machine=machine_id, name=name) for name in sorted(dropped)]
    return Due(tuple(requests), min(later, default=None))


def to_start(session: Session) -> tuple[StartMachine, ...]:
    """The machines that are started again by themselves; what somebody has stopped is not."""
    rows = select(MachineRow.id).where(
        MachineRow.policy["autostart"].as_boolean(), MachineRow.wanted == "running"
    )
    return tuple(StartMachine(machine=one) for one in session.scalars(rows.order_by(MachineRow.id)))


@dataclass(frozen=True, slots=True)
class _Scheduled:
    """A machine whose policy asks for snapshots."""

    state: str
    created: datetime
    every: timedelta
    keep: int


def _with_schedule(session: Session) -> dict[str, _Scheduled]:
    columns = select(MachineRow.id, MachineRow.state, MachineRow.created, MachineRow.policy)
    wanted = columns.where(MachineRow.policy["snapshot_every"].as_string().is_not(None))
    found = {}
    for machine_id, state, created, kept in session.execute(wanted):
        policy = MachinePolicy.model_validate(kept)
        if policy.snapshot_every is not None:
            found[machine_id] = _Scheduled(
                state, created, policy.snapshot_every, policy.snapshot_keep
            )
    return found


def _snapshots(session: Session, machines: Iterable[str]) -> dict[str, list[SnapshotRow]]:
    """The snapshots of those machines and all that expire, by machine, the oldest first."""
    of_those = SnapshotRow.machine_id.in_(list(machines))
    wanted = select(SnapshotRow).where(or_(of_those, SnapshotRow.expires.is_not(None)))
    found: dict[str, list[SnapshotRow]] = {}
    for row in session.scalars(wanted.order_by(SnapshotRow.created, SnapshotRow.id)):
        found.setdefault(row.machine_id, []).append(row)
    return found


def _pending(session: Session) -> set[tuple[str, str]]:
    """What is queued or under way already: kind and machine."""
    rows = session.execute(
        select(OperationRow.kind, OperationRow.target).where(
            OperationRow.state.not_in(sorted(ENDED)),
            OperationRow.kind.in_(("machine.snapshot", "snapshot.delete")),
        )
    )
    return {(kind, target) for kind, target in rows if target is not None}


class Schedules:
    """Has what is due asked for, for as long as the manager runs.

    Args:
        manager: Whose machines.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._task: asyncio.Task[None] | None = None
        self._refused: dict[str, str] = {}

    async def start(self) -> None:
        """Begin to look; machines that start by themselves are asked to."""
        for request in await self._manager.database.read(to_start):
            with suppress(InvalidState):  # it runs
                await self._submit(request)
        self._task = asyncio.create_task(self._look_again_and_again(), name="schedules")

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None

    async def tick(self, moment: datetime | None = None) -> datetime | None:
        """Ask for what is due at a moment (None: now); returns when the next thing is."""
        moment = moment or now()
        found = await self._manager.database.read(due, moment)
        for request in found.requests:
            try:
                await self._submit(request)
            except InvalidState as error:
                self._tell(request.machine, error)
        return found.next

    async def _submit(self, request: SnapshotMachine | DeleteSnapshot | StartMachine) -> None:
        """Ask for something; what is refused is told, but for a state that does not allow it."""
        try:
            await self._manager.operator.submit(request, actor=ACTOR)
        except InvalidState:
            raise
        except VmlabError as error:
            self._tell(request.machine, error)
        else:
            self._refused.pop(request.machine, None)

    def _tell(self, machine: str, error: VmlabError) -> None:
        """Say once why something cannot be done."""
        if self._refused.get(machine) != error.message:
            self._refused[machine] = error.message
            _LOG.warning("what is scheduled for machine %s is refused: %s", machine, error)

    async def _look_again_and_again(self) -> None:
        while True:
            seconds = _LONGEST_S
            try:
                following = await self.tick()
            except VmlabError as error:
                # The store does not answer just now.
                _LOG.warning("nobody knows what is due: %s", error)
            else:
                if following is not None:
                    seconds = (following - now()).total_seconds()
            await asyncio.sleep(min(_LONGEST_S, max(_SHORTEST_S, seconds)))

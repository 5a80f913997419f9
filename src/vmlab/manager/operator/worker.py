"""Carries one operation out: begins it, runs its handler, and ends, undoes or postpones it.

What it does is in the journal before and after; a `kill -9` between any two lines leaves an
operation that `Execution.run` takes up again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import DeadlineExceeded, OperationAborted, VmlabError, from_record
from vmlab.manager.documents import UNDER_WAY, OperationState
from vmlab.manager.operator.handler import OPERATION, Handler
from vmlab.manager.operator.journal import RollingBack, Step, Work, read_steps
from vmlab.manager.requests import REQUEST
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.database import Database
from vmlab.manager.store.failures import StoreUnavailable
from vmlab.manager.store.tables import MachineRow, OperationRow, ReservationRow, now

__all__ = ["Execution", "Outcome", "end_operation", "surely"]

P = ParamSpec("P")
V = TypeVar("V")

_LOG: Final = logging.getLogger(__name__)
_ATTEMPTS: Final = 6
"""Times that an operation is tried in all, if nothing is wrong but what may pass."""
_FIRST_DELAY_S: Final = 0.5
_LONGEST_DELAY_S: Final = 30.0
_STORE_DELAYS_S: Final = (0.2, 1.0, 5.0, 15.0, 30.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run: `state` if it has ended, or the seconds until it is tried again."""

    state: OperationState | None = None
    again: float | None = None


@dataclass(frozen=True, slots=True)
class _Begun:
    request: Mapping[str, Any]
    request_id: str | None
    target: str | None
    steps: Mapping[str, Step]
    deadline: datetime
    attempts: int
    failure: Mapping[str, Any] | None
    cancelling: bool


class Execution:
    """One operation in the hands of a worker; `cancel` ends it early."""

    def __init__(self, handler: Handler[Any], operation_id: str) -> None:
        self.handler = handler
        self.operation_id = operation_id
        self.cancelled = False
        self._work: Work[Any] | None = None
        self._task: asyncio.Task[dict[str, Any] | None] | None = None

    def cancel(self) -> None:
        """Somebody wants it to end: what it does is interrupted, and undone."""
        self.cancelled = True
        if self._work is not None:
            self._work.cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> Outcome:
        """Carry it out; cancelled from elsewhere (the manager closes), it stays as it is."""
        database = self.handler.manager.database
        begun = await uninterrupted(
            surely(database, _begin, self.operation_id, self.handler.seconds)
        )
        if begun is None:
            return Outcome(state="cancelled")
        self.cancelled = self.cancelled or begun.cancelling
        failure = from_record(begun.failure) if begun.failure is not None else None
        if failure is None and self.cancelled:
            failure = _cancellation()
        work: Work[Any] = Work(
            self.handler.manager,
            self.operation_id,
            REQUEST.validate_python(begun.request),
            target=begun.target,
            steps=begun.steps,
            deadline=begun.deadline,
            request_id=begun.request_id,
            failure=failure,
            recovered=bool(begun.steps),
        )
        work.cancelled = self.cancelled
        self._work = work
        result: dict[str, Any] | None = None
        try:
            result = await self._in_time(work)
            if begun.failure is None:
                # It has done all that it was to do: who cancelled it was too late.
                failure = None
        except RollingBack:
            pass
        except VmlabError as error:
            failure = failure or error
        except Exception as error:
            _LOG.exception("operation %s", self.operation_id)
            failure = failure or _mistake(error)
        finally:
            self._work = None
        if failure is None:
            await uninterrupted(
                surely(database, end_operation, self.operation_id, "succeeded", result=result)
            )
            return Outcome(state="succeeded")
        delay = self._delay(failure, begun.attempts, work)
        if delay is not None:
            await uninterrupted(surely(database, _postpone, self.operation_id, delay, str(failure)))
            return Outcome(again=delay)
        return await self._give_up(work, failure)

    async def _in_time(self, work: Work[Any]) -> dict[str, Any] | None:
        """Run the handler until it ends, its time is over, or somebody cancels it."""
        # Learning how to undo takes no time, and is done however late it is.
        limit = asyncio.timeout(work.seconds_left if work.failure is None else None)
        self._task = asyncio.create_task(self.handler.run(work), name=self.operation_id)
        try:
            async with limit:
                # The run is a task of its own, so that a cancellation from elsewhere (which leaves
                # the operation to the next manager) is told from one that ends it.
                await asyncio.wait((self._task,))
        except TimeoutError:
            work.late = True
        finally:
            if not self._task.done():
                self._task.cancel()
                await uninterrupted(_settled(self._task))
            task, self._task = self._task, None
        if limit.expired() and (task.cancelled() or task.exception() is not None):
            raise DeadlineExceeded(work.request_kind, seconds=work.seconds_given)
        if task.cancelled():
            raise _cancellation()
        return task.result()

    def _delay(self, failure: VmlabError, attempts: int, work: Work[Any]) -> float | None:
        """Seconds until it is tried again; None if it is not."""
        if (
            not self.handler.retry_safe
            or self.cancelled
            or work.failure is not None
            or not isinstance(failure, self.handler.transient)
            or attempts >= _ATTEMPTS
        ):
            return None
        delay = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (attempts - 1))
        delay *= random.uniform(0.75, 1.25)
        return delay if delay < work.seconds_left else None

    async def _give_up(self, work: Work[Any], failure: VmlabError) -> Outcome:
        """Undo what was done, and end the operation."""
        database = self.handler.manager.database
        work.failure = failure
        work.cancelled = self.cancelled
        state: OperationState = "cancelled" if self.cancelled else "failed"
        if work.has_undo:
            await uninterrupted(surely(database, _note_failure, self.operation_id, failure))
            for trouble in await work.undo():
                failure.add_note(trouble)
        await uninterrupted(surely(database, self._end_in_vain, work, state, failure))
        return Outcome(state=state)

    def _end_in_vain(
        self, session: Session, work: Work[Any], state: OperationState, failure: VmlabError
    ) -> None:
        """End what did not succeed; where no step was begun, what it claimed is given back."""
        if work.untouched:
            session.info[OPERATION] = self.operation_id
            self.handler.withdrawn(session, work.request, work.target)
        end_operation(session, self.operation_id, state, error=failure)


async def _settled(task: asyncio.Task[Any]) -> None:
    await asyncio.wait((task,))


async def surely(
    database: Database,
    fn: Callable[Concatenate[Session, P], V],
    *args: P.args,
    **kwargs: P.kwargs,
) -> V:
    """Write, and again if the store does not answer: what was done has to be written down.

    Raises:
        StoreUnavailable: it did not answer for about a minute.
    """
    for delay in _STORE_DELAYS_S:
        try:
            return await database.write(fn, *args, **kwargs)
        except StoreUnavailable as error:
            _LOG.warning("the store does not answer, trying again in %g s: %s", delay, error)
            await asyncio.sleep(delay)
    return await database.write(fn, *args, **kwargs)


def _cancellation() -> OperationAborted:
    return OperationAborted("the operation was cancelled")


def _mistake(error: Exception) -> VmlabError:
    return VmlabError(
        f"{type(error).__name__}: {error}",
        hint="this is a mistake in vmlab: the manager's log has the whole of it",
    )


# ------------------------------------------------------------------------ transactions


def _begin(session: Session, operation_id: str, seconds: float) -> _Begun | None:
    """Write down that it is carried out now; None if it was cancelled before."""
    row = session.get_one(OperationRow, operation_id)
    if row.state not in UNDER_WAY:
        return None
    row.attempts += 1
    row.not_before = None
    row.message = ""
    if row.state == "queued":
        row.state = "running"
        row.started = now()
        _tell(session, row, "operation.started", {"kind": row.kind})
    _show_on_machines(session, row)
    return _Begun(
        request=dict(row.request),
        request_id=row.request_id,
        target=row.target,
        steps=read_steps(session, operation_id),
        deadline=row.deadline or now() + timedelta(seconds=seconds),
        attempts=row.attempts,
        failure=dict(row.error) if row.error is not None else None,
        cancelling=row.cancelling,
    )


def _note_failure(session: Session, operation_id: str, failure: VmlabError) -> None:
    """Write down why it is undone, before it is."""
    session.get_one(OperationRow, operation_id).error = failure.to_record()


def _postpone(session: Session, operation_id: str, delay: float, why: str) -> None:
    row = session.get_one(OperationRow, operation_id)
    row.not_before = now() + timedelta(seconds=delay)
    row.message = f"tried again in {delay:.1f} s, because {why}"
    _tell(
        session,
        row,
        "operation.progress",
        {"progress": row.progress, "message": row.message, "attempts": row.attempts},
    )


def end_operation(
    session: Session,
    operation_id: str,
    state: OperationState,
    *,
    result: dict[str, Any] | None = None,
    error: VmlabError | None = None,
) -> None:
    """End an operation: what was reserved for it is free again, and its machines are told."""
    row = session.get_one(OperationRow, operation_id)
    row.state = state
    row.ended = now()
    row.result = result
    row.error = error.to_record() if error is not None else None
    if state == "succeeded":
        row.progress, row.message = 1.0, ""
    session.execute(delete(ReservationRow).where(ReservationRow.operation_id == operation_id))
    session.execute(
        update(MachineRow).where(MachineRow.operation_id == operation_id).values(operation_id=None)
    )
    data: dict[str, Any] = {"kind": row.kind, "state": state}
    if error is not None:
        data["error"] = error.message
    _tell(session, row, "operation.ended", data)


def _show_on_machines(session: Session, row: OperationRow) -> None:
    """Have the machines that the operation has to itself name it; their versions stay."""
    ids = [name.partition(":")[2] for name in row.lock_keys if name.startswith("machine:")]
    if ids:
        session.execute(
            update(MachineRow).where(MachineRow.id.in_(ids)).values(operation_id=row.id)
        )


def _tell(session: Session, row: OperationRow, kind: str, data: Mapping[str, Any]) -> None:
    add_event(
        session,
        kind,
        subject=row.id,
        name=row.target_name,
        operation=row.id,
        request_id=row.request_id,
        data={"target": row.target, **data},
    )

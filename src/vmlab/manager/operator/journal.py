"""What an operation writes down while it is carried out, so that a crash loses nothing.

A step is written down before it is begun and after it is done: whoever takes the operation up again
begins at the first step that is not done, and a step that was under way is done again. So each step
can be done twice. Once an operation has failed, that is written down before anything is undone:
whoever takes it up then passes the steps that were begun, to learn how each is undone, and goes no
further. No hypervisor and no request is known here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, Final, Generic, ParamSpec, TypeVar

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import DeadlineExceeded, OperationAborted, VmlabError
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.tables import OperationRow, StepRow, now

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager
    from vmlab.manager.settings import Settings
    from vmlab.manager.store.database import Database

__all__ = ["RollingBack", "Step", "Work", "read_steps"]

P = ParamSpec("P")
R = TypeVar("R", bound=BaseModel)
V = TypeVar("V")
Undo = Callable[[], Awaitable[object]]
Change = Callable[[Session], object]

_LOG: Final = logging.getLogger(__name__)
_PROGRESS_S: Final = 0.2
"""Progress is told no more often than this, but for the last of it."""


class RollingBack(BaseException):
    """Ends a handler's run that only had to say how its steps are undone."""


@dataclass(slots=True)
class Step:
    """A step of an operation, as its handler sees it.

    `data` is kept in the journal when the step ends: what it has to remember, JSON.
    """

    name: str
    text: str
    position: int
    state: str = "planned"
    data: dict[str, Any] = field(default_factory=dict)
    done_before: bool = False
    """Whether it was done already, before a crash: there is nothing to do but to remember."""
    _changes: list[Change] = field(default_factory=list)

    def also(
        self, fn: Callable[Concatenate[Session, P], object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Have `fn(session, ...)` run in the transaction that writes down that the step is done."""
        self._changes.append(lambda session: fn(session, *args, **kwargs))

    def skip(self, why: str) -> None:
        """There was nothing to do, for that reason."""
        self.state = "skipped"
        self.text = why

    def failed(self, why: str) -> None:
        """It did not do what it was to do, and the operation goes on by another way."""
        self.state = "failed"
        self.data["passed"] = why


class Work(Generic[R]):
    """An operation under way, as its handler sees it.

    Args:
        manager: Whose operation it is.
        operation_id: Its id.
        request: What was asked for.
        target: Id of what it changes.
        steps: What its journal has, by name.
        deadline: When it has to be done.
        failure: Why it is undone, if it was being undone when it was left.
        recovered: Whether it was under way before.
    """

    def __init__(
        self,
        manager: Manager,
        operation_id: str,
        request: R,
        *,
        target: str | None,
        steps: Mapping[str, Step],
        deadline: datetime,
        request_id: str | None = None,
        failure: VmlabError | None = None,
        recovered: bool = False,
    ) -> None:
        self.manager = manager
        self.operation_id = operation_id
        self.request = request
        self.request_id = request_id
        self.target = target
        self.deadline = deadline
        self.failure = failure
        self.recovered = recovered
        self.cancelled = False
        self.late = False
        self.seconds_given = max(0.0, (deadline - now()).total_seconds())
        self._steps = dict(steps)
        self._ended: set[str] = set()
        self._undo: list[tuple[Step, Undo]] = []
        self._told = 0.0

    @property
    def database(self) -> Database:
        """The store."""
        return self.manager.database

    @property
    def settings(self) -> Settings:
        """The manager's."""
        return self.manager.settings

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; not less than none."""
        return max(0.0, (self.deadline - now()).total_seconds())

    @property
    def target_id(self) -> str:
        """Id of what it changes, where it changes one thing."""
        assert self.target is not None, "this kind of operation has a target"
        return self.target

    # ------------------------------------------------------------------ steps

    @asynccontextmanager
    async def step(
        self, name: str, text: str = "", *, before: Change | None = None
    ) -> AsyncIterator[Step]:
        """One step: written down before, and after.

        The body is entered also where the step was done before a crash (`step.done_before`): it
        says how it is undone, and does nothing else.

        Args:
            name: Its name, one of its kind in the operation.
            text: What it does, for a person.
            before: Run in the transaction that writes down that it is begun.
        """
        step = self._steps.get(name) or Step(name, text, len(self._steps))
        if self.failure is not None and step.state in {"planned", "undone"}:
            # Nothing behind it is left to be undone.
            raise RollingBack
        if step.state in {"done", "skipped", "undone"} or "passed" in step.data:
            step.done_before = True
            yield step
            return
        if self.failure is None:
            self.check_cancelled()
            step.text = text or step.text
            try:
                await self._begin(step, before)
            except asyncio.CancelledError:
                if step.name not in self._steps:
                    raise
                # It is written down as begun, so its body has to say how it is undone; the
                # cancellation comes again where the body first waits for something.
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
        try:
            yield step
        except RollingBack:
            raise
        except Exception as error:
            if self.failure is None:
                step.data["error"] = str(error)
                await uninterrupted(self._end(step, "failed"))
            raise
        if self.failure is not None:
            raise RollingBack
        state = step.state if step.state in {"skipped", "failed"} else "done"
        try:
            await uninterrupted(self._end(step, state))
        except asyncio.CancelledError:
            # What is done is done: whoever wants the operation to end is too late for this step.
            # The next one does not begin; if there is none, the operation has succeeded.
            if step.name not in self._ended or not (self.cancelled or self.late):
                raise

    async def _begin(self, step: Step, before: Change | None) -> None:
        step.state = "running"
        step.data.pop("error", None)

        def write(session: Session) -> None:
            self._save(session, step, started=True)
            if before is not None:
                before(session)

        await uninterrupted(self._write_begin(write, step))

    async def _write_begin(self, write: Change, step: Step) -> None:
        await self.database.write(write)
        self._steps[step.name] = step

    async def _end(self, step: Step, state: str) -> None:
        step.state = state

        def write(session: Session) -> None:
            self._save(session, step)
            if state == "done":
                for change in step._changes:
                    change(session)

        await self.database.write(write)
        self._ended.add(step.name)

    def _save(self, session: Session, step: Step, *, started: bool = False) -> None:
        row = session.get(StepRow, (self.operation_id, step.name))
        if row is None:
            row = StepRow(operation_id=self.operation_id, name=step.name, position=step.position)
            session.add(row)
        row.state, row.text, row.data = step.state, step.text, dict(step.data)
        if started:
            row.started = row.started or now()
        else:
            row.ended = now()
        add_event(
            session,
            "operation.step",
            subject=self.operation_id,
            operation=self.operation_id,
            request_id=self.request_id,
            data={
                "target": self.target,
                "step": step.name,
                "state": step.state,
                "text": step.text,
            },
        )

    # ------------------------------------------------------------------ undoing

    def on_undo(self, step: Step, fn: Undo) -> None:
        """Have `fn()` undo a step if the operation fails or is cancelled; the last step first.

        Called at the beginning of the step's body: what a crash left half done is undone, too. So
        `fn` has to do with a step that did nothing yet, and may be called twice. Why the operation
        failed is in `failure`, and `cancelled` says whether somebody wanted that.
        """
        self._undo.append((step, fn))
        if self.failure is not None and not step.done_before:
            raise RollingBack

    @property
    def untouched(self) -> bool:
        """Whether no step of it was begun: all that there is is what was claimed at first."""
        return all(step.state == "planned" for step in self._steps.values())

    @property
    def has_undo(self) -> bool:
        """Whether there is something to undo."""
        return bool(self._undo)

    def keep(self) -> None:
        """What was done up to here stays, whatever comes."""
        self._undo.clear()

    async def undo(self) -> list[str]:
        """Undo what was done, the last first; returns what could not be undone, in words."""
        troubles = []
        while self._undo:
            step, fn = self._undo.pop()
            try:
                await fn()
            except Exception as error:
                # Whatever it is must not keep the other steps from being undone.
                if not isinstance(error, VmlabError):
                    _LOG.exception("undoing %s of operation %s", step.name, self.operation_id)
                troubles.append(f"{step.name} could not be undone: {error}")
                continue
            step.state = "undone"
            await self.database.write(self._save, step)
        return troubles

    # ------------------------------------------------------------------ while it runs

    def check_cancelled(self) -> None:
        """End here if the operation is cancelled or out of time.

        Raises:
            OperationAborted: it was cancelled.
            DeadlineExceeded: its time is over.
        """
        if self.cancelled:
            raise OperationAborted("the operation was cancelled")
        if self.failure is None and self.deadline <= now():
            raise DeadlineExceeded(self.request_kind, seconds=self.seconds_given)

    @property
    def request_kind(self) -> str:
        """The kind of what was asked for."""
        return str(getattr(self.request, "kind", "operation"))

    async def progress(self, fraction: float, message: str = "") -> None:
        """Tell how far it is: from 0 to 1, and in words. Calls in quick succession are left out."""
        moment = time.monotonic()
        if moment - self._told < _PROGRESS_S and fraction < 1:
            return
        self._told = moment
        await self.database.write(self._write_progress, min(1.0, max(0.0, fraction)), message)

    def _write_progress(self, session: Session, fraction: float, message: str) -> None:
        row = session.get_one(OperationRow, self.operation_id)
        row.progress, row.message = fraction, message
        add_event(
            session,
            "operation.progress",
            subject=self.operation_id,
            name=row.target_name,
            operation=self.operation_id,
            request_id=self.request_id,
            data={"target": row.target, "progress": fraction, "message": message},
        )


def read_steps(session: Session, operation_id: str) -> dict[str, Step]:
    """The steps of an operation as its journal has them, by name."""
    rows = session.scalars(
        select(StepRow).where(StepRow.operation_id == operation_id).order_by(StepRow.position)
    )
    return {
        row.name: Step(row.name, row.text, row.position, row.state, dict(row.data)) for row in rows
    }

"""The operator: takes requests, and has them carried out one after the other for each thing.

A request is checked, what it needs is claimed, and it is written down, in one transaction; what
`submit` has returned is carried out, whatever dies meanwhile. The operation table is the queue and
the journal; the lines in memory (`queue.py`) are made of it anew by each manager.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import OperationAborted, VmlabError
from vmlab.manager.documents import ENDED, OperationDocument
from vmlab.manager.operator.dry_run import pretend
from vmlab.manager.operator.handler import OPERATION, Handler, Target, handlers_for
from vmlab.manager.operator.queue import Entry, Queue
from vmlab.manager.operator.recovery import Unfinished, unfinished
from vmlab.manager.operator.worker import Execution, end_operation
from vmlab.manager.requests import REQUEST, Request
from vmlab.manager.store.changes import Conflict, PreconditionFailed, add_event
from vmlab.manager.store.queries import find_operation, operation_document
from vmlab.manager.store.tables import MachineRow, OperationRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["Operator"]

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Submission:
    """Everything about a request but what it is about."""

    request: Request
    data: dict[str, Any]
    actor: str
    idempotency_key: str | None
    hash: str | None
    request_id: str | None
    dry_run: bool
    deadline: datetime | None
    if_match: int | None
    undo_of: str | None


class Operator:
    """Takes requests and has them carried out; one for each manager.

    Its length is the number of operations that are queued or under way.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._handlers = handlers_for(manager)
        self._queue = Queue(manager.settings.workers)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._executions: dict[str, Execution] = {}
        self._again: dict[str, asyncio.TimerHandle] = {}
        self._open = False

    # ------------------------------------------------------------------ its life

    async def start(self) -> None:
        """Take up what was left, and carry out what comes."""
        for left in await self._manager.database.read(unfinished):
            if self._queue.get(left.id) is None:
                self._take_up(left)
        self._open = True
        self._pump()

    def _take_up(self, left: Unfinished) -> None:
        immediate = self._handler(left.kind).immediate
        self._queue.add(Entry(left.id, left.kind, left.number, left.keys, immediate=immediate))

    async def close(self) -> None:
        """Leave everything as it is: what runs is interrupted, and taken up by the next manager."""
        self._open = False
        for handle in self._again.values():
            handle.cancel()
        self._again.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for entry in self._queue:
            entry.ended.set()

    def __len__(self) -> int:
        return len(self._queue)

    def __bool__(self) -> bool:
        # It is there also when it has nothing to do.
        return True

    @property
    def running(self) -> bool:
        """Whether it carries out what it takes, as it does from `start` to `close`."""
        return self._open

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return not len(self._queue)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of requests that it can have carried out."""
        return frozenset(self._handlers)

    # ------------------------------------------------------------------ taking requests

    async def submit(
        self,
        request: Request,
        *,
        actor: str = "local",
        idempotency_key: str | None = None,
        request_id: str | None = None,
        dry_run: bool | None = None,
        deadline: datetime | None = None,
        if_match: int | None = None,
        undo_of: str | None = None,
    ) -> OperationDocument:
        """Take a request down: checked, with what it needs claimed; then it is carried out.

        Args:
            request: What is asked for.
            actor: Who asks.
            idempotency_key: The same request with the same key of the same actor is the same
                operation, however often it is asked for.
            request_id: What the operation's events are marked with.
            dry_run: Say what would be done, and touch nothing; so it is, too, if the settings say
                so.
            deadline: When it has to be done.
            if_match: Version that what is changed has to have.
            undo_of: Id of the operation that it undoes.

        Raises:
            VmlabError: it cannot work; nothing was changed.
            PreconditionFailed: what is changed has another version.
            Conflict: the key was used for another request, or the store has something against it.
        """
        handler = self._handler(request.kind)
        data: dict[str, Any] = REQUEST.dump_python(request, mode="json")
        submission = _Submission(
            request=request,
            data=data,
            actor=actor,
            idempotency_key=idempotency_key,
            hash=_hash(data) if idempotency_key is not None else None,
            request_id=request_id,
            dry_run=bool(dry_run) or self._manager.settings.dry_run,
            deadline=deadline,
            if_match=if_match,
            undo_of=undo_of,
        )
        database = self._manager.database
        if idempotency_key is not None:
            known = await database.read(_asked_before, submission)
            if known is not None:
                return known
        prepared = await handler.prepare(request)
        # A caller that goes away must not leave an operation in the store that nobody carries out.
        return await uninterrupted(self._take_down(handler, prepared, submission))

    async def _take_down(
        self, handler: Handler[Any], prepared: Request, submission: _Submission
    ) -> OperationDocument:
        document, entry = await self._manager.database.write(
            _take_down, handler, prepared, submission, uuid4().hex
        )
        if entry is not None:
            self._queue.add(entry)
            self._pump()
        return document

    def _handler(self, kind: str) -> Handler[Any]:
        try:
            return self._handlers[kind]
        except KeyError:
            raise VmlabError(
                f"this manager cannot carry out {kind!r}",
                hint="it can carry out " + ", ".join(sorted(self._handlers)),
            ) from None

    # ------------------------------------------------------------------ waiting and cancelling

    async def wait(self, id_: str, timeout: float | None = None) -> OperationDocument:
        """The operation once it has ended, or as it is after `timeout` seconds.

        Raises:
            ResourceNotFound: there is no such operation.
        """
        document = await self.document(id_)
        entry = self._queue.get(document.id)
        if document.state in ENDED or entry is None:
            # It may have ended since it was read.
            return document if document.state in ENDED else await self.document(document.id)
        try:
            async with asyncio.timeout(timeout):
                await entry.ended.wait()
        except TimeoutError:
            pass
        return await self.document(document.id)

    async def document(self, id_: str) -> OperationDocument:
        """The operation as it is now.

        Raises:
            ResourceNotFound: there is none of that id.
        """
        return await self._manager.database.read(_document, id_)

    async def cancel(self, id_: str) -> OperationDocument:
        """End an operation: one that is queued at once, one under way by undoing what it did.

        Raises:
            ResourceNotFound: there is none of that id.
            Conflict: it has ended already, or is of a kind that nothing stops once it runs.
        """
        document = await self.document(id_)
        handler = self._handler(document.kind)
        was_queued = await uninterrupted(
            self._manager.database.write(_ask_to_cancel, document.id, handler)
        )
        self._interrupt(document.id, was_queued=was_queued)
        return await self.document(document.id)

    def _interrupt(self, id_: str, *, was_queued: bool) -> None:
        """What the store says of a cancelled operation is done."""
        entry = self._queue.get(id_)
        if entry is None:
            return
        if was_queued and not entry.running:
            self._queue.remove(entry)
            self._pump()
            return
        execution = self._executions.get(id_)
        if execution is not None:
            execution.cancel()
        elif (handle := self._again.pop(id_, None)) is not None:
            handle.cancel()
            self._retry(entry)

    @asynccontextmanager
    async def alone(self, key: str) -> AsyncIterator[None]:
        """Have one thing to oneself: end what is under way with it, and keep others waiting.

        Operations that are queued for it are cancelled; the one that runs is interrupted, if it is
        of a kind that can be, and waited for.
        """
        others = self._queue.waiting_for(key)
        entry = Entry(uuid4().hex, "alone", -1, frozenset({key}), immediate=True, postponed=True)
        for other in others:
            try:
                await self.cancel(other.id)
            except VmlabError as error:
                # It has ended meanwhile, or cannot be stopped: then it is waited for.
                _LOG.info("operation %s is not cancelled: %s", other.id, error)
        self._queue.add(entry)
        try:
            for other in self._queue.waiting_for(key):
                if other is entry:
                    break
                await other.ended.wait()
            yield
        finally:
            self._queue.remove(entry)
            self._pump()

    # ------------------------------------------------------------------ carrying out

    def _pump(self) -> None:
        """Have carried out what may be."""
        while self._open and (entry := self._queue.next()) is not None:
            execution = Execution(self._handlers[entry.kind], entry.id)
            self._executions[entry.id] = execution
            task = asyncio.create_task(self._carry_out(entry, execution), name=f"run-{entry.id}")
            self._tasks[entry.id] = task

    async def _carry_out(self, entry: Entry, execution: Execution) -> None:
        again: float | None = None
        try:
            outcome = await execution.run()
            again = outcome.again
        except asyncio.CancelledError:
            # The manager closes: the operation is taken up by the next one.
            return
        except Exception:
            # The store is gone for good, or this is a mistake; the journal has what was done.
            _LOG.exception("operation %s is left to the next manager", entry.id)
        finally:
            self._executions.pop(entry.id, None)
            self._tasks.pop(entry.id, None)
        if again is None:
            self._queue.remove(entry)
        else:
            if execution.cancelled:
                # It was while that was written down: its next try is the one that ends it.
                again = 0.0
            self._queue.pause(entry)
            entry.postponed = True
            loop = asyncio.get_running_loop()
            self._again[entry.id] = loop.call_later(again, self._retry, entry)
        self._pump()

    def _retry(self, entry: Entry) -> None:
        self._again.pop(entry.id, None)
        self._queue.offer_again(entry)
        self._pump()


# ------------------------------------------------------------------------ transactions


def _take_down(
    session: Session,
    handler: Handler[Any],
    prepared: Request,
    submission: _Submission,
    id_: str,
) -> tuple[OperationDocument, Entry | None]:
    """Check the request, claim what it needs, write it down."""
    known = _asked_before(session, submission)
    if known is not None:
        return known, None
    row = OperationRow(
        id=id_,
        kind=handler.kind,
        dry_run=submission.dry_run,
        request=submission.data,
        actor=submission.actor,
        idempotency_key=submission.idempotency_key,
        request_hash=submission.hash,
        request_id=submission.request_id,
        undo_of=submission.undo_of,
        deadline=submission.deadline,
        steps=[],
    )
    session.add(row)
    session.flush()
    session.info[OPERATION] = id_
    if submission.dry_run:
        pretend(session, handler, prepared, row, lambda target: _compare(target, submission))
        return operation_document(session, row), None
    target = handler.check(session, prepared)
    _compare(target, submission)
    row.target, row.target_name = target.id, target.name
    row.lock_keys = sorted(target.keys)
    session.flush()
    _announce(session, target, row)
    entry = Entry(id_, row.kind, row.number, target.keys, immediate=handler.immediate)
    return operation_document(session, row), entry


def _announce(session: Session, target: Target, row: OperationRow) -> None:
    for name in target.keys:
        noun, _, id_ = name.partition(":")
        machine = session.get(MachineRow, id_) if noun == "machine" else None
        if machine is not None and machine.operation_id is None:
            machine.operation_id = row.id
    add_event(
        session,
        "operation.queued",
        subject=row.id,
        name=row.target_name,
        operation=row.id,
        request_id=row.request_id,
        data={"kind": row.kind, "target": row.target},
    )


def _compare(target: Target, submission: _Submission) -> None:
    """Refuse a change that was decided upon another version of what it changes."""
    expected = submission.if_match
    if expected is None or target.version is None or expected == target.version:
        return
    raise PreconditionFailed(
        target.name or target.id or "it", expected=expected, actual=target.version
    )


def _asked_before(session: Session, submission: _Submission) -> OperationDocument | None:
    """The operation that this key made before, if it did.

    Raises:
        Conflict: it was another request.
    """
    if submission.idempotency_key is None:
        return None
    row = session.scalar(
        select(OperationRow).where(
            OperationRow.actor == submission.actor,
            OperationRow.idempotency_key == submission.idempotency_key,
        )
    )
    if row is None:
        return None
    if row.request_hash != submission.hash:
        raise Conflict(
            f"the idempotency key {submission.idempotency_key!r} was used for another request "
            f"({row.kind}, operation {row.id})",
            hint="a key is for one request: make a new one for each",
        )
    return operation_document(session, row)


def _hash(data: dict[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _document(session: Session, id_: str) -> OperationDocument:
    return operation_document(session, find_operation(session, id_))


def _ask_to_cancel(session: Session, id_: str, handler: Handler[Any]) -> bool:
    """Write down that somebody wants it to end; whether it was queued, and so has ended.

    Raises:
        Conflict: it has ended already, or nothing stops it.
    """
    row = session.get_one(OperationRow, id_)
    if row.state in ENDED:
        raise Conflict(
            f"operation {row.id} has {row.state} already",
            hint="what it did is not undone by cancelling it",
        )
    if row.state == "queued":
        session.info[OPERATION] = row.id
        handler.withdrawn(session, REQUEST.validate_python(row.request), row.target)
        end_operation(
            session, id_, "cancelled", error=OperationAborted("the operation was cancelled")
        )
        return True
    if not handler.cancellable:
        raise Conflict(
            f"operation {row.id} ({row.kind}) runs, and is not stopped any more",
            hint="wait for it to end",
        )
    row.cancelling = True
    return False

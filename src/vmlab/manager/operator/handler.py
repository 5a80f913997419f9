"""What a kind of change is made of: the checks when it is asked for, its plan, and its steps.

One `Handler` for each kind of request of `vmlab.manager.requests`; each registers itself where its
module is imported, and `vmlab.manager.operator.handlers` imports all of those modules. A handler
has no state of its own: what an operation has to remember is in its journal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from pydantic import BaseModel

from vmlab.machine.errors import HypervisorUnavailable, VmlabError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from vmlab.manager.manager import Manager
    from vmlab.manager.operator.journal import Work

__all__ = [
    "OPERATION",
    "Handler",
    "PlannedStep",
    "Target",
    "handlers_for",
    "key",
    "operation_of",
    "register",
]

R = TypeVar("R", bound=BaseModel)
H = TypeVar("H", bound="type[Handler[Any]]")

OPERATION: Final = "vmlab.operation"
"""Where a session keeps the id of the operation that its transaction takes down."""


def operation_of(session: Session) -> str:
    """Id of the operation that is taken down, or withdrawn, in this transaction."""
    return str(session.info[OPERATION])


def key(noun: str, id_: str) -> str:
    """The name of the lock of one thing: `key("machine", id)`.

    Two operations with a lock in common run one after the other, in the order in which they were
    asked for.
    """
    return f"{noun}:{id_}"


@dataclass(frozen=True, slots=True)
class Target:
    """What an operation changes.

    Args:
        id: Of what is changed; None for what is no one thing.
        name: Its name, for people.
        keys: Locks that it needs, made by `key`; none waits for nobody.
        version: Version of its row, which `If-Match` is compared with.
    """

    id: str | None
    name: str | None = None
    keys: frozenset[str] = field(default_factory=frozenset)
    version: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step that would be done: its name as in the journal, and what it does, for a person."""

    name: str
    text: str


class Handler(ABC, Generic[R]):
    """Carries out one kind of request. One object for each manager."""

    kind: ClassVar[str]
    """The kind of request."""
    retry_safe: ClassVar[bool] = False
    """Whether it may be tried again, from its first step that is not done, after one of
    `transient`."""
    transient: ClassVar[tuple[type[VmlabError], ...]] = (HypervisorUnavailable,)
    """Errors that may go away by themselves."""
    cancellable: ClassVar[bool] = True
    """Whether it can be cancelled once it runs; while it is queued, every operation can."""
    immediate: ClassVar[bool] = False
    """Whether it waits for no worker: what has to happen now."""
    seconds: ClassVar[float] = 900.0
    """Time that it may take from when it begins to run, unless its request has a deadline."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager

    async def prepare(self, request: R) -> R:
        """Find out what `check` needs and what a transaction has no time for; changes nothing.

        Returns:
            The request, or a copy with what was left out filled in: `check` and `plan` get it. What
            is kept, and what `run` gets, is the request as it was made.
        """
        return request

    @abstractmethod
    def check(self, session: Session, request: R) -> Target:
        """Refuse what cannot work, and claim what the operation needs: rows, reservations.

        Runs in the transaction that takes the operation down, in a thread; what it writes is
        undone by the undo of `run`'s first step, or by `withdrawn` if that was never begun.

        Raises:
            VmlabError: saying what cannot work, why, and what would.
        """

    @abstractmethod
    def plan(self, session: Session, request: R) -> Sequence[PlannedStep]:
        """What would be done, step by step; called after `check`, and changes nothing."""

    @abstractmethod
    async def run(self, work: Work[R]) -> dict[str, Any] | None:
        """Do it, step by step; called again from the top after a crash or for another try.

        Returns:
            The operation's result.
        """

    def withdrawn(self, session: Session, request: R, target: str | None) -> None:
        """Give back what `check` claimed: the operation ended before a step of it was begun.

        Args:
            session: The transaction that ends the operation.
            request: As it was made.
            target: Id of what `check` said would be changed.
        """
        return


_KINDS: Final[dict[str, type[Handler[Any]]]] = {}


def register(handler: H) -> H:
    """Have requests of `handler.kind` carried out by it; a decorator of its class."""
    known = _KINDS.setdefault(handler.kind, handler)
    assert known is handler, f"{handler.kind!r} is carried out by {known.__name__} already"
    return handler


def handlers_for(manager: Manager) -> dict[str, Handler[Any]]:
    """A handler of each kind that is registered."""
    return {kind: handler(manager) for kind, handler in _KINDS.items()}

"""How operations run on every machine: order, deadlines, cancellation, states and events.

The machinery under `operated_machine`, which says what each operation of the contract is; nothing
here knows one operation from another. When one fails, times out or is cancelled, the `_undo` hook
removes what was half done, and `_observe` tells what the machine is doing now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vmlab.hypervisors.hooks import MachineHooks
from vmlab.hypervisors.operation import UNDO_TIMEOUT, Operation
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import (
    MachineCrashed,
    OperationAborted,
    OperationFailed,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import OFF, OPERATIONS, TRANSITIONS, Lifecycle, MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor

T = TypeVar("T")
_BOOTS: Final = frozenset({"start", "restart"})
Action = Callable[[Operation], Awaitable[T]]
"""What an operation does once it was allowed to begin."""
Plan = Callable[[MachineState, Capabilities], Awaitable[Action[T]]]
"""Checks that refuse an operation before it begins; what passes them makes its action."""
Needs = Callable[[MachineState], Sequence[Capability]]
"""The capabilities that an operation needs in a state."""


class NothingToDo(Exception):
    """The machine is where the operation would bring it; whoever asked for it need not know."""


class SerialisedMachine(MachineHooks):
    """A machine whose operations run one at a time, bounded, and undone when they fail."""

    def __init__(
        self,
        hypervisor: OperatedHypervisor,
        id_: str,
        spec: MachineSpec,
        state: MachineState = MachineState.CREATED,
    ) -> None:
        self.id = id_
        self.name = spec.name
        self._hypervisor = hypervisor
        self._spec = spec
        self._lock = asyncio.Lock()
        # Operations that were called and have not returned, in the order of the calls.
        self._pending: dict[Operation, None] = {}
        self._current: Operation | None = None
        # How the machine ended by itself under the present operation, and why.
        self._fate: tuple[MachineState, str] | None = None
        self._changed = hypervisor.now()
        self._changes = 0
        self._lifecycle = Lifecycle(spec.name, hypervisor.name, state, self._state_changed)

    @property
    def spec(self) -> MachineSpec:
        return self._spec

    @property
    def state(self) -> MachineState:
        return self._lifecycle.state

    @property
    def hypervisor(self) -> OperatedHypervisor:
        return self._hypervisor

    @property
    def reason(self) -> str:
        """Why the machine is in its state."""
        return self._lifecycle.reason

    @property
    def _deleted(self) -> bool:
        return self.state is MachineState.DELETED

    # What back ends call when something happens by itself.

    def _happened(self, state: MachineState, event: EventType, reason: str) -> None:
        """The machine went to `state` by itself: a crash, a shutdown by the guest, a pause.

        An operation under way that this spoils is ended; one that wanted it is left alone. Of a
        machine that was deleted nothing is heard any more.
        """
        if self._deleted:
            return
        self._emit(event, reason=reason)
        operation = self._current
        if operation is None or (operation.disturbs and not operation.over):
            if not (state is MachineState.STOPPED and self.state in OFF):
                self._settle(state, reason)
            return
        crashed = state is MachineState.FAILED
        if crashed or state is MachineState.STOPPED:
            self._fate = state, reason
        if operation.ending or state is operation.target:
            return
        kind = MachineCrashed if crashed else OperationAborted
        operation.abort(
            kind(
                f"{operation.name} failed: {reason}",
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation=operation.name,
            )
        )

    def _emit(self, event: EventType, **data: Any) -> None:
        operation = self._current.id if self._current is not None else None
        self._hypervisor.log.emit(
            event, machine=self.id, name=self.name, operation=operation, **data
        )

    def _state_changed(self, old: MachineState, new: MachineState, reason: str) -> None:
        self._changed = self._hypervisor.now()
        self._changes += 1
        self._emit(EventType.STATE, **{"from": old.value, "to": new.value, "reason": reason})

    # One operation.

    async def _operate(
        self,
        name: str,
        action: Action[T] | None = None,
        *,
        timeout: float | None,
        plan: Plan[T] | None = None,
        via: MachineState | None = None,
        to: MachineState | Callable[[T], MachineState] | None = None,
        needs: Needs | None = None,
        event: tuple[EventType, Callable[[T], dict[str, Any]]] | None = None,
        ending: bool = False,
        disturbs: bool = False,
        forced: bool = False,
        already: frozenset[MachineState] = frozenset(),
        allowed: frozenset[MachineState] | None = None,
    ) -> T:
        """Run one operation: in turn, allowed, bounded, announced, and undone if it fails.

        Args:
            name: One of OPERATIONS.
            action: What it does; or `plan`.
            timeout: Its deadline in seconds, None for the default.
            plan: Makes the action, or refuses.
            via: The state while it is under way; None leaves the state as it is.
            to: The state after it, or what makes that of the result; None is the one before.
            needs: The capabilities that it cannot do without.
            event: What is announced with data made of the result.
            ending: Whether it wants the machine to end, so that its end does not spoil it.
            disturbs: Whether whatever happens to the machine meanwhile is its doing.
            forced: Whether it ends what other processes do with the machine.
            already: States in which there is nothing left to do.
            allowed: The states it may begin in, where OPERATIONS does not say that.

        Raises:
            NothingToDo: it was its turn, and the state was one of `already`.
        """
        operation = Operation(name, self._hypervisor.next_operation(), timeout)
        operation.ending = ending
        operation.disturbs = disturbs
        operation.forced = forced
        operation.target = to if isinstance(to, MachineState) else None

        async def work() -> T:
            await self._lock.acquire()
            # From here on `_recover` finds the lock held and releases it.
            operation.holds = True
            await self._enter(operation)
            if self.state in already:
                raise NothingToDo
            act = await self._admitted(operation, action, plan, needs, allowed)
            self._begin(operation, via)
            result = await act(operation)
            operation.check()
            target = to(result) if callable(to) else to
            if target is None and via is not None:
                target = operation.before
            if event is not None:
                self._emit(event[0], **event[1](result))
            self._complete(operation, target)
            self._release()
            return result

        async def recover(error: BaseException) -> None:
            if operation.holds:
                await self._recover(operation, error)

        self._pending[operation] = None
        try:
            return await operation.run(
                work, recover, machine=self.name, hypervisor=self._hypervisor.name
            )
        finally:
            del self._pending[operation]

    async def _admitted(
        self,
        operation: Operation,
        action: Action[T] | None,
        plan: Plan[T] | None,
        needs: Needs | None,
        allowed: frozenset[MachineState] | None,
    ) -> Action[T]:
        """The action of an operation whose turn it is, unless it is refused.

        Nothing awaits between the last look at the state and the return, so that what begins
        next begins in a state that allows it.
        """
        name = operation.name

        def require() -> MachineState:
            self._lifecycle.require(name, allowed)
            return self.state

        state = require()
        if needs is None and plan is None:
            assert action is not None, "an operation has an action or a plan"
            return action
        capabilities = await self._hypervisor.capabilities()
        while True:
            state = require()
            if needs is not None:
                capabilities.require(*needs(state), machine=self.name, operation=name)
            if plan is None:
                assert action is not None, "an operation has an action or a plan"
                return action
            planned = await plan(state, capabilities)
            if self.state is state:
                return planned

    def _begin(self, operation: Operation, via: MachineState | None) -> None:
        """Announce an operation that may begin."""
        self._current = operation
        operation.before = self.state
        operation.started = self._hypervisor.now()
        operation.begun = True
        self._fate = None
        self._hypervisor.announce(operation, self)
        if via is not None:
            self._lifecycle.move(via, operation.name)

    def _complete(self, operation: Operation, target: MachineState | None) -> None:
        """Bring a machine whose operation succeeded to `target`."""
        if target is not None:
            self._lifecycle.move(target, operation.name)
        self._hypervisor.announce_end(operation, self)

    async def _recover(self, operation: Operation, error: BaseException) -> None:
        """Let go of an operation that did not succeed."""
        try:
            if operation.begun and self._deleted:
                # It was cancelled after the point of no return: it is done all the same.
                self._hypervisor.announce_end(operation, self)
            elif operation.begun:
                await self._restore_order(operation, operation.failure(error))
        finally:
            self._release()

    def _release(self) -> None:
        self._current = None
        self._leave()
        self._lock.release()

    async def _restore_order(self, operation: Operation, failure: BaseException) -> None:
        """After a failure: undo, look, and settle in a state that lasts."""
        reason = f"{operation.name} {_described(failure)}"
        fatal: BaseException | None = None
        limit = asyncio.timeout(UNDO_TIMEOUT)
        try:
            async with limit:
                await self._undo(operation)
                after = await self._undone_state(operation)
                if self._fate is not None and after in OFF:
                    after, reason = self._fate
        except BaseException as second:
            # Also a hook's own mistake, and a CancelledError that comes out of one: whatever it
            # is, the machine is left in a state that lasts.
            after = MachineState.UNKNOWN
            trouble = (
                "undoing it did not end either"
                if limit.expired()
                else f"undoing it failed too: {_text(second)}"
            )
            reason = f"{reason}; {trouble}"
            failure.add_note(trouble)
            if not isinstance(second, Exception | asyncio.CancelledError):
                fatal = second
        if operation.name in _BOOTS and after in OFF and _is_own(failure):
            # A cancelled or late boot never was; one that failed by itself is remembered.
            after = MachineState.FAILED
        self._settle(after, reason)
        self._hypervisor.announce_failure(operation, self, failure)
        if fatal is not None:
            raise fatal

    async def _undone_state(self, operation: Operation) -> MachineState:
        """The state of the machine after `operation` was undone."""
        after = await self._observe()
        if operation.repause and after is MachineState.RUNNING:
            await self._do_pause(operation)
            after = await self._observe()
        if after is MachineState.STOPPED and operation.before in OFF:
            return operation.before
        if not after.is_stable or after is MachineState.DELETED:
            # Only an operation goes there; a hypervisor that says so is not to be believed.
            return MachineState.UNKNOWN
        return after

    def _settle(self, state: MachineState, reason: str) -> None:
        """Go to `state`, which is a fact: by way of `unknown` where the table has no other."""
        present = self.state
        if state is not present and state not in TRANSITIONS[present]:
            self._lifecycle.move(MachineState.UNKNOWN, reason)
        self._lifecycle.move(state, reason)

    def _end_pending(self, why: str) -> None:
        """End all that was asked of the machine before now, but for what ends it anyway."""
        for operation in tuple(self._pending):
            if operation.name not in {"kill", "delete"}:
                operation.abort(
                    OperationAborted(
                        f"{operation.name} was ended because the machine was {why}",
                        machine=self.name,
                        hypervisor=self._hypervisor.name,
                        operation=operation.name,
                    )
                )

    # Questions.

    async def _query(
        self,
        name: str,
        question: Callable[[], Awaitable[T]],
        timeout: float | None,
        *,
        needs: Sequence[Capability] = (),
        rule: str | None = "",
    ) -> T:
        """Ask something that changes nothing; it does not wait for operations under way.

        `rule` names the operation whose states apply: its own unless given, None for no rule.
        """

        async def ask() -> T:
            if needs:
                capabilities = await self._hypervisor.capabilities()
                capabilities.require(*needs, machine=self.name, operation=name)
            if rule is not None:
                self._lifecycle.require(name, OPERATIONS[rule or name])
            return await question()

        return await Operation(name, 0, timeout).run(
            ask, _nothing, machine=self.name, hypervisor=self._hypervisor.name
        )

    def _agree(self, seen: MachineState, when: float) -> MachineState:
        """Take over what the hypervisor said at `when`, unless something newer is known.

        Only for a machine on which nothing is under way.
        """
        state = self.state
        if seen is state or (seen is MachineState.STOPPED and state in OFF):
            return state
        if when < self._changed:
            return seen
        self._settle(seen, "the hypervisor says so")
        return seen


async def _nothing(error: BaseException) -> None:
    """A question leaves nothing to undo."""


def _described(failure: BaseException) -> str:
    """How an operation ended, as part of a sentence."""
    if isinstance(failure, asyncio.CancelledError):
        return "was cancelled"
    if isinstance(failure, TimeoutError):
        return "took too long"
    return f"failed: {_text(failure)}"


def _text(error: BaseException) -> str:
    """What an error says, or what it is if it says nothing."""
    return str(error) or type(error).__name__


def _is_own(failure: BaseException) -> bool:
    """Whether an operation failed by itself: not ended from outside, and not refused."""
    if isinstance(failure, VmlabError):
        return isinstance(failure, OperationFailed) and not isinstance(failure, OperationAborted)
    return isinstance(failure, Exception)

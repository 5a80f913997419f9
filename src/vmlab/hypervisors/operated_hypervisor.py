"""What hypervisors that run `OperatedMachine`s share: names, creation, events, the end of a run."""

from __future__ import annotations

import asyncio
import math
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from vmlab.hypervisors.base import (
    Hypervisor,
    Machine,
    Snapshot,
)
from vmlab.hypervisors.eventlog import EventLog
from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import UNDO_TIMEOUT, Operation, uninterrupted
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import (
    HypervisorUnavailable,
    InvalidSpec,
    MachineExists,
    MachineNotFound,
    OperationFailed,
    SpecProblem,
    VmlabError,
)
from vmlab.machine.events import Event, EventType
from vmlab.machine.fit import Usage, check_fit, usage_of
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.serialised_machine import SerialisedMachine

DELETED_AT_ONCE: Final = 32
"""How many machines `close` deletes at the same time."""


class OperatedHypervisor(Hypervisor):
    """What hypervisors that run `OperatedMachine`s share: names, creation, events.

    Args:
        owner: Whose machines these are.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        # By id and by name; `adopt`, `enlist` and `forget` keep both.
        self._machines: dict[str, OperatedMachine] = {}
        self._names: dict[str, OperatedMachine] = {}
        # By name, the machines that are being made, and what makes them.
        self._reserved: dict[str, OperatedMachine] = {}
        self._making: dict[str, Operation] = {}
        self._made = asyncio.Event()
        self._operations = 0
        self._closed = False
        self.log = EventLog(self.name, self.now)

    # What back ends fill in.

    @abstractmethod
    def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> OperatedMachine:
        """The object of a machine that does not exist yet; touches nothing."""

    def new_id(self) -> str:
        """An id for a machine."""
        return uuid4().hex

    def now(self) -> float:
        """Seconds on the hypervisor's clock: Unix time unless it has one of its own."""
        return time.time()

    async def _prepare(self) -> None:
        """Called before anything is created: connect, re-adopt, whatever is needed once."""

    # Operations are numbered and announced here, those on machines and those that make them.

    def next_operation(self) -> int:
        """A number that no operation of this hypervisor had before."""
        self._operations += 1
        return self._operations

    def announce(self, operation: Operation, machine: SerialisedMachine) -> None:
        """Record that an operation has begun."""
        self.log.emit(
            EventType.OPERATION_STARTED,
            machine=machine.id,
            name=machine.name,
            operation=operation.id,
            timeout=operation.timeout if operation.timeout < math.inf else None,
        )

    def announce_end(self, operation: Operation, machine: SerialisedMachine) -> None:
        """Record that an operation has succeeded."""
        self.log.emit(
            EventType.OPERATION_FINISHED,
            machine=machine.id,
            name=machine.name,
            operation=operation.id,
            seconds=self._elapsed(operation),
        )

    def announce_failure(
        self, operation: Operation, machine: SerialisedMachine, failure: BaseException
    ) -> None:
        """Record that an operation has failed, timed out or was cancelled, and was undone."""
        cancelled = isinstance(failure, asyncio.CancelledError)
        self.log.emit(
            EventType.OPERATION_FAILED,
            machine=machine.id,
            name=machine.name,
            operation=operation.id,
            error=type(failure).__name__,
            message="it was cancelled" if cancelled else str(failure),
            seconds=self._elapsed(operation),
        )

    def _elapsed(self, operation: Operation) -> float:
        return round(self.now() - operation.started, 6)

    # Making machines.

    @property
    def owner(self) -> Owner:
        return self._owner

    async def create(self, spec: MachineSpec, *, timeout: float | None = None) -> Machine:
        if not isinstance(spec, MachineSpec):
            raise InvalidSpec([SpecProblem("spec", spec, "a MachineSpec")], hypervisor=self.name)

        def plan(capabilities: Capabilities) -> tuple[MachineSpec, MachineState]:
            return spec, MachineState.CREATED

        return await self._bring_forth(
            Operation("create", self.next_operation(), timeout),
            spec.name,
            plan,
            lambda machine, operation: machine._do_create(operation),
        )

    async def create_from(
        self, snapshot: Snapshot, name: str, *, timeout: float | None = None
    ) -> Machine:
        def plan(capabilities: Capabilities) -> tuple[MachineSpec, MachineState]:
            capabilities.require(Capability.RESTORE, machine=name, operation="create_from")
            state = snapshot.state if snapshot.memory else MachineState.STOPPED
            return snapshot.spec.renamed(name), state

        return await self._bring_forth(
            Operation("create_from", self.next_operation(), timeout),
            name,
            plan,
            lambda machine, operation: machine._do_create_from(operation, snapshot),
        )

    async def _bring_forth(
        self,
        operation: Operation,
        name: str,
        plan: Callable[[Capabilities], tuple[MachineSpec, MachineState]],
        build: Callable[[OperatedMachine, Operation], Awaitable[None]],
    ) -> OperatedMachine:
        """Run an operation of the hypervisor's own, which makes a machine."""
        begun: list[OperatedMachine] = []

        async def announced(machine: OperatedMachine) -> None:
            operation.started = self.now()
            begun.append(machine)
            self.announce(operation, machine)
            await build(machine, operation)

        async def work() -> OperatedMachine:
            await self._prepare()
            capabilities = await self.capabilities()
            spec, state = plan(capabilities)
            check_fit(spec, capabilities)
            machine = await self.make(operation, spec, announced, state=state)
            self.announce_end(operation, machine)
            return machine

        async def recover(error: BaseException) -> None:
            # `make` has cleared up what it began.
            if begun:
                self.announce_failure(operation, begun[0], operation.failure(error))

        return await operation.run(work, recover, machine=name, hypervisor=self.name)

    async def make(
        self,
        operation: Operation,
        spec: MachineSpec,
        build: Callable[[OperatedMachine], Awaitable[None]],
        *,
        state: MachineState = MachineState.CREATED,
        id_: str | None = None,
    ) -> OperatedMachine:
        """A new machine in `state`, made by `build`; nothing of it is left when that fails.

        While it is made it has its name and counts in `usage`, but nobody can get at it.

        Raises:
            MachineExists: a machine of that name exists or is being made.
            HypervisorUnavailable: the hypervisor was closed.
        """
        self.require_free(spec.name, operation=operation.name)
        machine = self.new_machine(id_ or self.new_id(), spec, state)
        self._reserved[spec.name] = machine
        self._making[spec.name] = operation
        try:
            await build(machine)
            operation.check()
        except BaseException as error:
            # A migration that has arrived enlisted it: it stays, even if its caller was cancelled.
            if machine.id not in self._machines:
                await uninterrupted(self._unmake(operation, machine, error))
            raise
        finally:
            del self._reserved[spec.name], self._making[spec.name]
            self._made.set()
        if machine.id not in self._machines:
            self.enlist(operation, machine)
        return machine

    def enlist(self, operation: Operation, machine: OperatedMachine) -> None:
        """Take in a machine that `operation` has made."""
        self._add(machine)
        self.log.emit(
            EventType.CREATED,
            machine=machine.id,
            name=machine.name,
            operation=operation.id,
            owner=str(self.owner),
            state=machine.state.value,
        )

    def require_free(self, name: str, *, operation: str) -> None:
        """Refuse a name that a machine has or is to have, and any name once this was closed.

        Raises:
            MachineExists: a machine of that name exists or is being made.
            HypervisorUnavailable: the hypervisor was closed.
        """
        if self._closed:
            raise self._is_closed(name, operation)
        if name in self._reserved or name in self._names:
            raise MachineExists(
                f"there is a machine {name!r} already",
                hint="choose another name, or delete that one first",
                machine=name,
                hypervisor=self.name,
                operation=operation,
            )

    def _is_closed(self, machine: str, operation: str) -> HypervisorUnavailable:
        return HypervisorUnavailable(
            f"cannot {operation} {machine!r}: the hypervisor was closed",
            hint="open it again",
            machine=machine,
            hypervisor=self.name,
            operation=operation,
        )

    async def _unmake(
        self, operation: Operation, machine: OperatedMachine, error: BaseException
    ) -> None:
        """Clear up after a machine that did not come to be."""
        limit = asyncio.timeout(UNDO_TIMEOUT)
        try:
            async with limit:
                await machine._undo(operation)
        except (Exception, asyncio.CancelledError) as second:
            # Whatever came out of it, also a mistake in it, must not hide why there is no machine.
            trouble = "it did not end" if limit.expired() else str(second) or type(second).__name__
            operation.failure(error).add_note(f"clearing up failed too: {trouble}")

    def usage(self, *, without: OperatedMachine | None = None) -> Usage:
        """What the machines take up that are there and that are being made, but for `without`."""
        total = Usage()
        for machine in (*self._machines.values(), *self._reserved.values()):
            if machine is not without:
                # One of which nothing is known may well hold its memory.
                live = machine.state.is_live or machine.state is MachineState.UNKNOWN
                total += usage_of(machine.spec, live=live)
        return total

    # Which machines there are.

    def adopt(self, machine: OperatedMachine) -> None:
        """Take over a machine that exists already: a store's, found again."""
        self._add(machine)
        self.log.emit(
            EventType.ADOPTED,
            machine=machine.id,
            name=machine.name,
            owner=str(self.owner),
            state=machine.state.value,
        )

    def _add(self, machine: OperatedMachine) -> None:
        self._machines[machine.id] = machine
        self._names[machine.name] = machine

    def forget(self, machine: OperatedMachine) -> None:
        """Drop a machine that was deleted."""
        if self._machines.get(machine.id) is machine:
            del self._machines[machine.id]
        if self._names.get(machine.name) is machine:
            del self._names[machine.name]

    async def get(self, name: str) -> Machine:
        await self._prepare()
        machine = self._machines.get(name) or self._names.get(name)
        if machine is None:
            raise MachineNotFound(
                f"there is no machine {name!r}",
                hint="`list` tells those that there are",
                machine=name,
                hypervisor=self.name,
            )
        return machine

    async def list(self) -> Sequence[Machine]:
        await self._prepare()
        return sorted(self._machines.values(), key=lambda machine: machine.name)

    async def events(self, since: int = 0) -> Sequence[Event]:
        return self.log.since(since)

    def subscribe(self, since: int | None = None) -> AsyncIterator[Event]:
        return self.log.follow(since)

    # The end.

    async def close(self) -> None:
        """Let go of it; a run's machines are deleted, all of them even if one refuses.

        Machines that are being made are not made; making more is refused from now on.
        """
        self._closed = True
        try:
            if self.owner.kind == "run":
                await self._delete_all()
        finally:
            self.log.close()

    async def _delete_all(self) -> None:
        for name, operation in self._making.items():
            operation.abort(self._is_closed(name, operation.name))
        turns = asyncio.Semaphore(DELETED_AT_ONCE)

        async def delete(machine: OperatedMachine) -> None:
            async with turns:
                await machine.delete(force=True)

        failures: list[BaseException] = []
        tried: set[str] = set()
        while True:
            # A migration to here that was past being aborted arrives after all.
            await self._none_being_made()
            left = [machine for id_, machine in self._machines.items() if id_ not in tried]
            if not left:
                break
            tried |= {machine.id for machine in left}
            ends = await asyncio.gather(*map(delete, left), return_exceptions=True)
            failures += [end for end in ends if end is not None]
        for failure in failures:
            if not isinstance(failure, VmlabError):
                raise failure
        if failures:
            raise OperationFailed(
                f"{len(failures)} machine{'s' if len(failures) > 1 else ''} could not be deleted: "
                + "; ".join(str(failure) for failure in failures),
                hint="`vmlab clean` removes what dead runs left",
                hypervisor=self.name,
                operation="close",
            )

    async def _none_being_made(self) -> None:
        while self._reserved:
            self._made.clear()
            await self._made.wait()

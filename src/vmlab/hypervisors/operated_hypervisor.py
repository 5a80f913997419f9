"""What hypervisors that run `OperatedMachine`s share: names, creation, events, the end of a run."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from vmlab.hypervisors.base import (
    Hypervisor,
    Machine,
    Snapshot,
)
from vmlab.hypervisors.eventlog import EventLog
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    InvalidSpec,
    MachineExists,
    MachineNotFound,
    OperationFailed,
    SpecProblem,
    VmlabError,
)
from vmlab.machine.events import Event, EventType
from vmlab.machine.fit import check_fit
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

from vmlab.hypervisors.operated_machine import OperatedMachine
from vmlab.hypervisors.operation import UNDO_TIMEOUT, Operation, uninterrupted


class OperatedHypervisor(Hypervisor):
    """What hypervisors that run `OperatedMachine`s share: names, creation, events.

    Args:
        owner: Whose machines these are.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._machines: dict[str, OperatedMachine] = {}
        self._reserved: set[str] = set()
        self._operations = 0
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

    # The contract.

    @property
    def owner(self) -> Owner:
        return self._owner

    def next_operation(self) -> int:
        """A number that no operation of this hypervisor had before."""
        self._operations += 1
        return self._operations

    async def create(self, spec: MachineSpec, *, timeout: float | None = None) -> Machine:
        if not isinstance(spec, MachineSpec):
            raise InvalidSpec([SpecProblem("spec", spec, "a MachineSpec")], hypervisor=self.name)
        await self._prepare()
        check_fit(spec, await self.capabilities())
        operation = Operation("create", self.next_operation(), timeout)
        return await self._run_making(
            operation,
            spec.name,
            lambda: self.make(operation, spec, lambda machine: machine._do_create(operation)),
        )

    async def create_from(
        self, snapshot: Snapshot, name: str, *, timeout: float | None = None
    ) -> Machine:
        await self._prepare()
        capabilities = await self.capabilities()
        capabilities.require(Capability.RESTORE, machine=name, operation="create_from")
        spec = snapshot.spec.with_changes(
            name=name, nics=[nic.model_copy(update={"mac": None}) for nic in snapshot.spec.nics]
        )
        check_fit(spec, capabilities)
        operation = Operation("create_from", self.next_operation(), timeout)
        return await self._run_making(
            operation,
            name,
            lambda: self.make(
                operation,
                spec,
                lambda machine: machine._do_create_from(operation, snapshot),
                state=snapshot.state if snapshot.memory else MachineState.STOPPED,
            ),
        )

    async def _run_making(
        self, operation: Operation, name: str, action: Callable[[], Awaitable[OperatedMachine]]
    ) -> OperatedMachine:
        async def nothing(error: BaseException) -> None:
            """`make` has cleared up what it began."""

        return await operation.run(action, nothing, machine=name, hypervisor=self.name)

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

        Raises:
            MachineExists: a machine of that name exists or is being made.
        """
        if spec.name in self._reserved or any(
            machine.name == spec.name for machine in self._machines.values()
        ):
            raise MachineExists(
                f"there is a machine {spec.name!r} already",
                hint="choose another name, or delete that one first",
                machine=spec.name,
                hypervisor=self.name,
                operation=operation.name,
            )
        self._reserved.add(spec.name)
        machine = self.new_machine(id_ or self.new_id(), spec, state)
        try:
            await build(machine)
        except BaseException as error:
            await uninterrupted(self._unmake(operation, machine, error))
            raise
        finally:
            self._reserved.discard(spec.name)
        self._machines[machine.id] = machine
        self.log.emit(
            EventType.CREATED,
            machine=machine.id,
            name=machine.name,
            operation=operation.id,
            owner=str(self.owner),
            state=state.value,
        )
        return machine

    async def _unmake(
        self, operation: Operation, machine: OperatedMachine, error: BaseException
    ) -> None:
        """Clear up after a machine that did not come to be."""
        try:
            async with asyncio.timeout(UNDO_TIMEOUT):
                await machine._undo(operation)
        except (TimeoutError, VmlabError, OSError, ValueError, LookupError, RuntimeError) as second:
            error.add_note(f"clearing up after {operation.name} failed too: {second}")
        self.log.emit(
            EventType.OPERATION_FAILED,
            machine=machine.id,
            name=machine.name,
            operation=operation.id,
            error=type(operation.aborted_by or error).__name__,
            message=str(operation.aborted_by or error),
        )

    def adopt(self, machine: OperatedMachine) -> None:
        """Take over a machine that exists already: a store's, found again."""
        self._machines[machine.id] = machine
        self.log.emit(
            EventType.ADOPTED,
            machine=machine.id,
            name=machine.name,
            owner=str(self.owner),
            state=machine.state.value,
        )

    def forget(self, machine: OperatedMachine) -> None:
        """Drop a machine that was deleted."""
        self._machines.pop(machine.id, None)

    async def get(self, name: str) -> Machine:
        await self._prepare()
        if name in self._machines:
            return self._machines[name]
        for machine in self._machines.values():
            if machine.name == name:
                return machine
        raise MachineNotFound(
            f"there is no machine {name!r}",
            hint="`list` tells those that there are",
            machine=name,
            hypervisor=self.name,
        )

    async def list(self) -> Sequence[Machine]:
        await self._prepare()
        return sorted(self._machines.values(), key=lambda machine: machine.name)

    async def events(self, since: int = 0) -> Sequence[Event]:
        return self.log.since(since)

    def subscribe(self, since: int | None = None) -> AsyncIterator[Event]:
        return self.log.follow(since)

    async def close(self) -> None:
        """Let go of it; a run's machines are deleted, all of them even if one refuses."""
        failures: list[VmlabError] = []
        if self.owner.kind == "run":
            for machine in tuple(self._machines.values()):
                try:
                    await machine.delete(force=True)
                except VmlabError as error:
                    failures.append(error)
        self.log.close()
        if failures:
            raise OperationFailed(
                f"{len(failures)} machines could not be deleted: "
                + "; ".join(str(failure) for failure in failures),
                hint="`vmlab clean` removes what dead runs left",
                hypervisor=self.name,
                operation="close",
            )

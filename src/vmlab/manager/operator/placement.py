"""A machine at its hypervisor, as operations need it: looked up, defined, put where it can run.

What the hypervisor knows of a machine is asked before a request is taken down, so that a machine
that stopped by itself can be started although the store does not say so yet.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Hypervisor, Machine
from vmlab.machine.errors import (
    HypervisorUnavailable,
    InvalidState,
    MachineExists,
    MachineNotFound,
    ResourceExhausted,
    VmlabError,
)
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState
from vmlab.manager.operator.definition import spec_of
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.operator.journal import Work
from vmlab.manager.requests import MachinePolicy
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.queries import find_machine
from vmlab.manager.store.tables import HostRow, MachineRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = [
    "Placed",
    "actual_state",
    "defined",
    "look",
    "on_some_host",
    "placed",
    "refuse_unless",
    "specification",
]

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    """What the store says of a machine, as far as an operation needs it."""

    id: str
    name: str
    host: str
    state: MachineState
    wanted: str
    fallback: tuple[str, ...]
    spec: dict[str, Any]
    image: str | None
    hostname: str


def placed(session: Session, machine_id: str) -> Placed:
    """What the store says of a machine.

    Raises:
        MachineNotFound: it has none of that id.
    """
    row = find_machine(session, machine_id)
    policy = MachinePolicy.model_validate(row.policy)
    return Placed(
        id=row.id,
        name=row.name,
        host=row.host,
        state=MachineState(row.state),
        wanted=row.wanted,
        fallback=policy.fallback,
        spec=dict(row.spec),
        image=row.image,
        hostname=row.metadata_.get("hostname") or row.name,
    )


async def look(manager: Manager, machine: str) -> None:
    """Have it known what a machine does now, where its hypervisor can say so.

    Args:
        manager: Whose machine it is.
        machine: Its name or id; one that is not there is no error here.
    """
    try:
        known = await manager.database.read(placed, machine)
        if manager.hosts.breaker(known.host).state == "closed":
            await manager.machine(known.id)
    except VmlabError as error:
        # What the store says has to do then, and whoever acts on it is told what is wrong.
        _LOG.debug("machine %s cannot be looked at: %s", machine, error)


def actual_state(manager: Manager, row: MachineRow) -> MachineState:
    """What a machine does, as its hypervisor knows, or else as the store says."""
    machine = manager.known_machine(row.id, row.host)
    gone = machine is not None and machine.state is MachineState.DELETED
    # One that somebody deleted at its hypervisor is the store's to tell of.
    if machine is not None and machine.state.is_stable and not gone:
        return machine.state
    return MachineState(row.state)


def refuse_unless(
    manager: Manager, row: MachineRow, operation: str, allowed: frozenset[MachineState]
) -> None:
    """Refuse an operation that the machine's present state does not allow.

    One that has operations waiting is another one by the time this is carried out: then it is
    looked at.

    Raises:
        InvalidState: saying which states would allow it.
    """
    if row.operation_id is not None:
        return
    state = actual_state(manager, row)
    if state not in allowed:
        raise InvalidState(
            operation,
            expected=tuple(state.value for state in MachineState if state in allowed),
            actual=state.value,
            machine=row.name,
            hypervisor=row.hypervisor,
        )


async def defined(hypervisor: Hypervisor, machine: Placed, spec: MachineSpec) -> Machine:
    """The machine at a hypervisor, made there if it is not."""
    name = machine_name(machine.id)
    try:
        return await hypervisor.get(name)
    except MachineNotFound:
        pass
    try:
        return await hypervisor.create(spec.with_changes(name=name))
    except MachineExists:
        # Its making, which was interrupted, came to its end after all.
        return await hypervisor.get(name)


async def on_some_host(
    work: Work[Any],
    machine: Placed,
    action: Callable[[Hypervisor], Awaitable[T]],
    *,
    movable: bool,
) -> T:
    """Do something with a machine on its host, or on the first that can of those it may move to.

    Args:
        work: The operation.
        machine: Which one.
        action: What to do; called with the hypervisor.
        movable: Whether nothing of it would be lost by that.

    Raises:
        VmlabError: no host could; it is the first one's reason.
    """
    manager = work.manager
    hosts = [machine.host, *machine.fallback] if movable else [machine.host]
    refusal: VmlabError | None = None
    for host in dict.fromkeys(hosts):
        try:
            async with manager.hosts.guarded(host):
                result = await action(await manager.hosts.get(host))
        except (HypervisorUnavailable, ResourceExhausted) as error:
            refusal = refusal or error
            continue
        if host != machine.host:
            await work.database.write(_move, machine.id, host, work.operation_id, str(refusal))
        return result
    assert refusal is not None, "there is a host"
    raise refusal


def _move(session: Session, machine_id: str, host: str, operation: str, why: str) -> None:
    """The machine is on another host now."""
    row = session.get_one(MachineRow, machine_id)
    before = row.host
    row.host = host
    row.hypervisor = session.get_one(HostRow, host).hypervisor
    add_event(
        session,
        "machine.updated",
        subject=row.id,
        name=row.name,
        operation=operation,
        data={"host": host, "before": before, "reason": why},
    )


def specification(machine: Placed) -> MachineSpec:
    """A machine's specification as the store has it."""
    return spec_of(machine.spec)

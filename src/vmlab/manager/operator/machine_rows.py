"""A machine's row, and what its hypervisor says of the machine: whether it may be changed, what to
write down afterwards.

What an operation needs of a machine is asked twice: of the row when the operation is submitted, so
that what cannot work is refused at once, and of the hypervisor when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine
from vmlab.machine.states import OFF, OPERATIONS, MachineState
from vmlab.manager.operator.definition import json_of
from vmlab.manager.operator.placement import actual_state, refuse_unless
from vmlab.manager.store.changes import add_event, set_machine_state
from vmlab.manager.store.tables import MachineRow, OperationRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["Facts", "at_rest", "other_of", "require_state", "write_facts"]


def require_state(manager: Manager, row: MachineRow, operation: str, kind: str) -> None:
    """Refuse an operation of the contract's in whose states the machine is not.

    Args:
        manager: Whose machine it is.
        row: The machine's.
        operation: Name in `vmlab.machine.states.OPERATIONS`.
        kind: What was asked for, for the error.

    Raises:
        InvalidState: naming the states that would do.
    """
    refuse_unless(manager, row, kind.replace(".", " "), OPERATIONS[operation])


def other_of(session: Session, operation: str, noun: str, target: str) -> str:
    """Id of the other thing that an operation has a lock of, beside its target: what it copies.

    A name in its request may be another one's by now.
    """
    keys = session.get_one(OperationRow, operation).lock_keys
    ids = [id_ for kind, _, id_ in (key.partition(":") for key in keys) if kind == noun]
    return next(id_ for id_ in ids if id_ != target)


def at_rest(manager: Manager, row: MachineRow) -> bool:
    """Whether nothing of the machine runs, as far as that is known here."""
    return actual_state(manager, row) in OFF


@dataclass(frozen=True, slots=True)
class Facts:
    """What a hypervisor says of a machine; `spec` is JSON, `memory` bytes."""

    state: MachineState
    reason: str
    spec: dict[str, Any]
    vcpus: int
    memory: int

    @classmethod
    async def of(cls, machine: Machine) -> Facts:
        """Ask a machine's hypervisor."""
        status = await machine.status()
        spec = machine.spec
        return cls(
            status.state,
            status.reason,
            json_of(spec),
            spec.cpus.count,
            spec.memory.size,
        )


def write_facts(
    session: Session, machine_id: str, facts: Facts, operation: str, *, updated: bool = True
) -> None:
    """Have a machine's row say what its hypervisor says; a state that passes is not written.

    Args:
        session: A transaction that writes.
        machine_id: Whose row.
        facts: What was found.
        operation: Id of the operation that changed the machine.
        updated: Whether to tell that the machine is made otherwise than before.
    """
    row = session.get_one(MachineRow, machine_id)
    # Its name at the hypervisor is nobody's business.
    row.spec = {**facts.spec, "name": row.spec.get("name", row.name)}
    row.vcpus, row.memory = facts.vcpus, facts.memory
    if facts.state.is_stable:
        set_machine_state(session, row, facts.state, reason=facts.reason, operation=operation)
    if updated:
        data = {"vcpus": facts.vcpus, "memory": facts.memory}
        add_event(
            session,
            "machine.updated",
            subject=row.id,
            name=row.name,
            operation=operation,
            data=data,
        )

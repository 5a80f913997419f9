"""Snapshots of machines: taken, brought back, removed.

The contents are the hypervisor's; the store has the names, and when they expire. Disks of the
store are no part of a machine, so they are not in its snapshots either: they are set aside for as
long as one is taken or brought back, which a live machine does not let them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine, Snapshot
from vmlab.machine.errors import InvalidState, OperationFailed, SnapshotNotFound
from vmlab.machine.spec import Disk
from vmlab.machine.states import OFF, MachineState
from vmlab.manager.operator.admission import Need, drop_reservation, reserve
from vmlab.manager.operator.disk_rows import disk_part, waited_for
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.machine_rows import Facts, at_rest, require_state, write_facts
from vmlab.manager.operator.placement import look
from vmlab.manager.operator.wiring import connect, ended, remembers, tell_guest
from vmlab.manager.requests import DeleteSnapshot, RestoreMachine, SnapshotMachine
from vmlab.manager.storage import Storage
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_machine, find_snapshot
from vmlab.manager.store.tables import DiskRow, MachineRow, SnapshotRow, now

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["removed", "require_disks_aside", "set_aside", "store_disks"]

# ------------------------------------------------------------------------ disks of the store


def store_disks(session: Session, storage: Storage, machine_id: str) -> list[Disk]:
    """The disks of the store that a machine has, as parts of its specification."""
    waiting = waited_for(session, machine_id)
    rows = session.scalars(
        select(DiskRow)
        .where(DiskRow.machine_id == machine_id, DiskRow.id.not_in(waiting))
        .order_by(DiskRow.name)
    )
    return [disk_part(storage, row) for row in rows]


def require_disks_aside(session: Session, manager: Manager, machine: MachineRow, what: str) -> None:
    """Refuse what copies a live machine that writes to disks of the store.

    Raises:
        Conflict: naming them.
    """
    names = session.scalars(
        select(DiskRow.name).where(DiskRow.machine_id == machine.id, ~DiskRow.readonly)
    ).all()
    if names and not at_rest(manager, machine):
        raise Conflict(
            f"machine {machine.name!r}, which is {machine.state}, writes to disks that are no part "
            f"of it ({', '.join(sorted(names))}) and cannot be {what}",
            hint="stop it, or detach them first",
        )


@asynccontextmanager
async def set_aside(work: Work[Any], machine: Machine, machine_id: str) -> AsyncIterator[None]:
    """Have a machine at rest without the disks of the store; they are put back afterwards.

    It is done in steps of the operation, so that they are put back whatever happens.
    """
    disks = await work.database.read(store_disks, work.manager.storage, machine_id)
    if machine.state not in OFF:
        # A live one keeps those that it only reads; others were refused.
        disks = []
    if not disks:
        yield
        return

    async def put_back() -> None:
        for disk in disks:
            if machine.spec.disk(disk.name) is None:
                await machine.plug_disk(disk)

    names = ", ".join(disk.serial or disk.name for disk in disks)
    async with work.step("set-aside", f"set disks of the store aside: {names}") as step:
        work.on_undo(step, put_back)
        if not step.done_before:
            for disk in disks:
                if machine.spec.disk(disk.name) is not None:
                    await machine.unplug_disk(disk.name)
    yield
    async with work.step("put-back", f"put disks of the store back: {names}") as step:
        if not step.done_before:
            await put_back()


# ------------------------------------------------------------------------ take


@register
class SnapshotHandler(Handler[SnapshotMachine]):
    """Saves a machine's disks, and its memory if it is live and its hypervisor can."""

    kind = "machine.snapshot"
    retry_safe = True

    async def prepare(self, request: SnapshotMachine) -> SnapshotMachine:
        """Have it known what the machine does."""
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: SnapshotMachine) -> Target:
        """Refuse a name that is taken and a machine in another state."""
        row = find_machine(session, request.machine)
        require_state(self.manager, row, "snapshot", self.kind)
        if request.memory and at_rest(self.manager, row):
            raise InvalidState(
                self.kind,
                expected=(MachineState.RUNNING.value, MachineState.PAUSED.value),
                actual=row.state,
                machine=row.name,
                hint="a machine at rest has no memory to save: leave `memory` out",
            )
        taken = session.scalar(
            select(SnapshotRow.id).where(
                SnapshotRow.machine_id == row.id, SnapshotRow.name == request.name
            )
        )
        if taken is not None:
            raise Conflict(
                f"machine {row.name!r} has a snapshot {request.name!r} already",
                hint="choose another name, or delete that one first",
            )
        if request.expires is not None and request.expires.tzinfo is None:
            raise Conflict(
                f"{request.expires.isoformat()} has no time zone",
                hint='such as "2027-01-31T12:00:00Z"',
            )
        require_disks_aside(session, self.manager, row, "saved")
        return Target(row.id, row.name, frozenset({key("machine", row.id)}), row.version)

    def plan(self, session: Session, request: SnapshotMachine) -> Sequence[PlannedStep]:
        """Save; with disks of the store, set them aside and put them back."""
        row = find_machine(session, request.machine)
        live = not at_rest(self.manager, row) and request.memory is not False
        what = "its disks" + (" and, where the hypervisor can, its memory" if live else "")
        return [PlannedStep("snapshot", f"save {what} of machine {row.name!r} as {request.name!r}")]

    async def run(self, work: Work[SnapshotMachine]) -> dict[str, Any]:
        """Take it and enter it."""
        request, machine_id = work.request, work.target_id
        machine = await self.manager.machine(machine_id)
        async with (
            set_aside(work, machine, machine_id),
            work.step("snapshot", f"save it as {request.name!r}") as step,
        ):
            # One that is there was made by this operation before a crash, or by others.
            ours = work.recovered

            async def undo() -> None:
                if ours:
                    await removed(machine, request.name)

            work.on_undo(step, undo)
            if not step.done_before:
                taken = await _named(machine, request.name)
                if taken is None:
                    ours = True
                    taken = await machine.snapshot(request.name, memory=request.memory)
                elif not ours:
                    raise OperationFailed(
                        f"the hypervisor has a snapshot {request.name!r} that the store does "
                        "not know",
                        hint="choose another name",
                        machine=machine.name,
                    )
                step.data |= {"memory": taken.memory, "size": taken.size}
        memory, size = bool(step.data["memory"]), int(step.data["size"])
        async with work.step("keep", "enter it") as step:
            if not step.done_before:
                step.also(
                    _entered, machine_id, request, work.operation_id, memory=memory, size=size
                )
        return {"machine": machine_id, "snapshot": request.name, "memory": memory, "size": size}


async def _named(machine: Machine, name: str) -> Snapshot | None:
    return next((kept for kept in await machine.snapshots() if kept.name == name), None)


async def removed(machine: Machine, name: str) -> None:
    """Remove a snapshot at the hypervisor; one that is not there is no error."""
    if await _named(machine, name) is not None:
        await machine.delete_snapshot(name)


def _entered(
    session: Session,
    machine_id: str,
    request: SnapshotMachine,
    operation: str,
    *,
    memory: bool,
    size: int,
) -> None:
    row = SnapshotRow(
        machine_id=machine_id,
        name=request.name,
        memory=memory,
        size=size,
        scheduled=request.scheduled,
        expires=request.expires,
        created=now(),
    )
    session.add(row)
    _tell(session, machine_id, "snapshot.taken", request.name, operation, memory=memory, size=size)


def _tell(
    session: Session, /, machine_id: str, kind: str, name: str, operation: str, **data: Any
) -> None:
    machine = session.get_one(MachineRow, machine_id)
    add_event(
        session,
        kind,
        subject=machine_id,
        name=machine.name,
        operation=operation,
        data={"snapshot": name, **data},
    )


# ------------------------------------------------------------------------ delete


@register
class DeleteSnapshotHandler(Handler[DeleteSnapshot]):
    """Removes a snapshot."""

    kind = "snapshot.delete"
    retry_safe = True
    cancellable = False

    async def prepare(self, request: DeleteSnapshot) -> DeleteSnapshot:
        """Have it known what the machine does."""
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: DeleteSnapshot) -> Target:
        """Refuse one that is not there, and a machine in another state."""
        row = find_machine(session, request.machine)
        find_snapshot(session, row, request.name)
        require_state(self.manager, row, "delete_snapshot", self.kind)
        return Target(row.id, row.name, frozenset({key("machine", row.id)}), row.version)

    def plan(self, session: Session, request: DeleteSnapshot) -> Sequence[PlannedStep]:
        """One step."""
        return [PlannedStep("remove", f"remove snapshot {request.name!r}")]

    async def run(self, work: Work[DeleteSnapshot]) -> dict[str, Any]:
        """Remove it; what is removed does not come back."""
        request, machine_id = work.request, work.target_id
        async with work.step("remove", f"remove snapshot {request.name!r}") as step:
            if not step.done_before:
                machine = await self.manager.machine(machine_id)
                await removed(machine, request.name)
                step.also(_forgotten, machine_id, request.name, work.operation_id)
        return {"machine": machine_id, "snapshot": request.name}


def _forgotten(session: Session, machine_id: str, name: str, operation: str) -> None:
    row = session.scalar(
        select(SnapshotRow).where(SnapshotRow.machine_id == machine_id, SnapshotRow.name == name)
    )
    if row is not None:
        session.delete(row)
        _tell(session, machine_id, "snapshot.deleted", name, operation)


# ------------------------------------------------------------------------ restore


@register
class RestoreHandler(Handler[RestoreMachine]):
    """Brings a snapshot back: disks, and with memory also what the machine did."""

    kind = "machine.restore"
    cancellable = False

    async def prepare(self, request: RestoreMachine) -> RestoreMachine:
        """Have it known what the machine does."""
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: RestoreMachine) -> Target:
        """Refuse a snapshot that is not there, and a live machine for one without memory."""
        row = find_machine(session, request.machine)
        kept = find_snapshot(session, row, request.snapshot)
        require_state(self.manager, row, "restore", self.kind)
        if not kept.memory and not at_rest(self.manager, row):
            raise InvalidState(
                self.kind,
                expected=tuple(state.value for state in MachineState if state in OFF),
                actual=row.state,
                machine=row.name,
                hint=f"snapshot {kept.name!r} has no memory in it: stop the machine first",
            )
        require_disks_aside(session, self.manager, row, "brought back")
        if kept.memory and session.scalar(
            select(DiskRow.id).where(DiskRow.machine_id == row.id).limit(1)
        ):
            raise Conflict(
                f"snapshot {kept.name!r} has the memory of a guest that knew of no disks of the "
                f"store, and machine {row.name!r} has some",
                hint="detach them first",
            )
        if kept.memory and at_rest(self.manager, row):
            # It is live afterwards.
            reserve(
                session,
                self.manager.settings,
                Need(vcpus=row.vcpus, memory=row.memory),
                operation=operation_of(session),
                host=row.host,
                machine=row.id,
                what=f"bring machine {row.name!r} back as it ran",
            )
        return Target(row.id, row.name, frozenset({key("machine", row.id)}), row.version)

    def plan(self, session: Session, request: RestoreMachine) -> Sequence[PlannedStep]:
        """One step."""
        return [PlannedStep("restore", f"bring snapshot {request.snapshot!r} back")]

    async def run(self, work: Work[RestoreMachine]) -> dict[str, Any]:
        """Bring it back; what the machine was before is lost."""
        request, machine_id = work.request, work.target_id
        machine = await self.manager.machine(machine_id)
        async with (
            set_aside(work, machine, machine_id),
            work.step("restore", f"bring snapshot {request.snapshot!r} back") as step,
        ):
            if not step.done_before:
                if await _named(machine, request.snapshot) is None:
                    raise SnapshotNotFound(
                        f"the hypervisor has no snapshot {request.snapshot!r} any more",
                        hint="delete it from the store, too",
                        machine=machine.name,
                    )
                await self.manager.guests.forget(machine_id)
                host = await work.database.read(lambda s: s.get_one(MachineRow, machine_id).host)
                await connect(self.manager, machine_id, host)
                await machine.restore(request.snapshot)
        async with work.step("look", "see what it does now") as step:
            if not step.done_before:
                facts = await Facts.of(machine)
                if not facts.state.is_live:
                    await ended(self.manager, machine_id)
                step.also(write_facts, machine_id, facts, work.operation_id)
                step.also(_wanted, self.manager, machine_id, facts.state, work.operation_id)
                step.also(
                    _tell, machine_id, "snapshot.restored", request.snapshot, work.operation_id
                )
        async with work.step("refresh", "have its guest know the time, and its addresses") as step:
            if not step.done_before:
                await tell_guest(self.manager, machine_id, machine.state, step)
        return {"machine": machine_id, "snapshot": request.snapshot}


def _wanted(
    session: Session, manager: Manager, machine_id: str, state: MachineState, operation: str
) -> None:
    """A machine is wanted to be what it was brought back as; a live one has its addresses."""
    row = session.get_one(MachineRow, machine_id)
    drop_reservation(session, operation, machine=machine_id)
    if state in {MachineState.RUNNING, MachineState.PAUSED}:
        row.wanted = state.value
        manager.networks.prepare(session, row, operation=operation)
        remembers(row)
    else:
        row.wanted = "stopped"

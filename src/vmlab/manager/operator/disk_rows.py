"""A disk's row, and what goes with it: its part in a machine, who may have it, who has it.

One machine has a disk at a time, the one in its row. The claim is made in the transaction that
takes an operation down; when the operation fails, the store says who has the disk by the
hypervisor's word. An operation whose machine was deleted before its turn may find the claim of
another one in the row, which waits behind it: it leaves that alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import MachineNotFound, VmlabError
from vmlab.machine.spec import Disk
from vmlab.manager.documents import UNDER_WAY
from vmlab.manager.operator.admission import Need, reserve
from vmlab.manager.operator.handler import key, operation_of
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.placement import look
from vmlab.manager.storage import Storage
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_disk
from vmlab.manager.store.tables import DiskRow, MachineRow, OperationRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = [
    "Standing",
    "all_attached",
    "attached",
    "claim",
    "claim_for",
    "device_of",
    "disk_keys",
    "disk_part",
    "fitting_bus",
    "found_machine",
    "holds",
    "let_go",
    "look_at_machine_of",
    "machine_name_of",
    "require_room",
    "serial_of",
    "set_disk_state",
    "standing_of",
    "standing_or_none",
    "tell_disk",
    "waited_for",
]

_LONGEST_SERIAL: Final = 20
"""Bytes of a virtio-blk serial number (VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6)."""


def device_of(disk_id: str) -> str:
    """The name of a disk in the specification of the machine that has it."""
    return f"d-{disk_id[:12]}"


def disk_part(storage: Storage, row: DiskRow) -> Disk:
    """A disk of the store's as a part of the specification of the machine that has it.

    Guests find it by its serial number: its name, or where that is too long the device's.
    """
    return Disk(
        name=row.device or device_of(row.id),
        file=storage.path(row.id, row.format),
        format="qcow2" if row.format == "qcow2" else "raw",
        bus="scsi" if row.bus == "scsi" else "virtio",
        readonly=row.readonly,
        serial=serial_of(row),
    )


def serial_of(row: DiskRow) -> str:
    """What a guest finds the disk by."""
    return row.name if len(row.name) <= _LONGEST_SERIAL else device_of(row.id)


def fitting_bus(machine: MachineRow) -> Literal["virtio", "scsi"]:
    """The bus that a running machine of its architecture lets go of a disk on."""
    return "scsi" if machine.architecture == Architecture.RISCV64.value else "virtio"


def require_room(session: Session, manager: Manager, more: int, what: str) -> None:
    """Refuse `more` bytes of disks where the quota has no room for them (ResourceExhausted)."""
    operation = operation_of(session)
    need = Need(disk=more)
    reserve(session, manager.settings, need, operation=operation, what=what, keep=False)


def claim_for(session: Session, row: DiskRow, machine: MachineRow) -> None:
    """Take a disk that nobody has for a machine.

    Raises:
        Conflict: somebody has it, or it is not whole.
    """
    if row.machine_id is not None:
        raise Conflict(
            f"disk {row.name!r} belongs to machine {machine_name_of(session, row.machine_id)!r}",
            hint=f"`vmlab disk detach {row.name}` takes it from there",
        )
    if row.state != "available":
        raise Conflict(
            f"disk {row.name!r} is {row.state}",
            hint=row.reason or "wait until it is available: `vmlab disk list` tells",
        )
    row.machine_id, row.device, row.state = machine.id, device_of(row.id), "attaching"


def machine_name_of(session: Session, machine_id: str) -> str:
    machine = session.get(MachineRow, machine_id)
    return machine.name if machine is not None else machine_id


def attached(session: Session, disk_id: str, bus: str, operation: str) -> None:
    """Write down that a machine has a disk that was claimed for it."""
    row = session.get_one(DiskRow, disk_id)
    row.state, row.bus, row.reason = "attached", bus, ""
    tell_disk(session, row, "disk.attached", operation, machine=row.machine_id, device=row.device)


def waited_for(session: Session, machine_id: str) -> frozenset[str]:
    """Ids of the disks in a machine's rows that it does not have yet: their turn is to come."""
    waiting = (
        select(DiskRow.id)
        .join(OperationRow, OperationRow.target == DiskRow.id)
        .where(
            DiskRow.machine_id == machine_id,
            DiskRow.state == "attaching",
            OperationRow.kind == "disk.attach",
            OperationRow.state.in_(UNDER_WAY),
        )
    )
    return frozenset(session.scalars(waiting))


def all_attached(session: Session, machine_id: str, operation: str) -> None:
    """Write down that a machine that was made has the disks that were claimed for it."""
    waiting = waited_for(session, machine_id)
    claimed = select(DiskRow).where(
        DiskRow.machine_id == machine_id,
        DiskRow.state == "attaching",
        DiskRow.id.not_in(waiting),
    )
    for row in session.scalars(claimed).all():
        attached(session, row.id, row.bus or "virtio", operation)


def let_go(session: Session, disk_id: str, operation: str, *, reason: str = "") -> None:
    """Write down that no machine has a disk any more; one that is about to go stays so."""
    row = session.get(DiskRow, disk_id)
    if row is None:
        return
    machine, had = row.machine_id, row.state in {"attached", "detaching"}
    row.machine_id = row.device = row.bus = None
    row.readonly, row.reason = False, reason
    row.state = "deleting" if row.state == "deleting" else "available"
    if had:
        tell_disk(session, row, "disk.detached", operation, machine=machine)


async def claim(work: Work[Any], disk_id: str, text: str) -> None:
    """The first step of what claimed a disk: what comes of the claim if the operation fails.

    The store says then who has the disk by the hypervisor's word.
    """
    async with work.step("claim", text) as step:
        work.on_undo(step, lambda: _settle(work, disk_id))


def holds(session: Session, operation: str, row: DiskRow) -> bool:
    """Whether an operation has the lock of the machine that a disk's row names, if it names one."""
    if row.machine_id is None:
        return True
    return key("machine", row.machine_id) in session.get_one(OperationRow, operation).lock_keys


async def _settle(work: Work[Any], disk_id: str) -> None:
    standing = await work.database.read(
        standing_or_none, work.manager.storage, disk_id, work.operation_id
    )
    if standing is None:
        return
    try:
        machine = None
        if standing.machine is not None:
            machine = await found_machine(work.manager, standing.machine)
    except VmlabError as error:
        reason = f"nobody knows which machine has it: {error.message}"
        await work.database.write(set_disk_state, disk_id, "failed", reason)
        raise
    if machine is not None and machine.spec.disk(standing.part.name) is not None:
        await work.database.write(set_disk_state, disk_id, "attached")
    else:
        await work.database.write(_free, disk_id, work.operation_id)


def _free(session: Session, disk_id: str, operation: str) -> None:
    """Nobody has a disk, and whatever was about to happen to it has failed."""
    row = session.get(DiskRow, disk_id)
    if row is not None and holds(session, operation, row):
        let_go(session, disk_id, operation)
        row.state = "available"


def tell_disk(session: Session, row: DiskRow, kind: str, operation: str, **data: Any) -> None:
    add_event(session, kind, subject=row.id, name=row.name, operation=operation, data=data)


def set_disk_state(session: Session, disk_id: str, state: str, reason: str = "") -> None:
    row = session.get(DiskRow, disk_id)
    if row is not None:
        row.state, row.reason = state, reason


@dataclass(frozen=True, slots=True)
class Standing:
    """What a handler has to know of a disk when it runs.

    `machine` is the one that has it, or is to have it, and whose lock the operation has.
    """

    part: Disk
    format: str
    size: int
    name: str
    serial: str
    machine: str | None
    machine_name: str | None


def standing_or_none(
    session: Session, storage: Storage, disk_id: str, operation: str
) -> Standing | None:
    if session.get(DiskRow, disk_id) is None:
        return None
    return standing_of(session, storage, disk_id, operation)


def standing_of(session: Session, storage: Storage, disk_id: str, operation: str) -> Standing:
    row = session.get_one(DiskRow, disk_id)
    machine = None
    if row.machine_id is not None and holds(session, operation, row):
        machine = session.get_one(MachineRow, row.machine_id)
    return Standing(
        disk_part(storage, row),
        row.format,
        row.size,
        row.name,
        serial_of(row),
        machine.id if machine is not None else None,
        machine.name if machine is not None else None,
    )


def disk_keys(row: DiskRow) -> frozenset[str]:
    keys = {key("disk", row.id)}
    if row.machine_id is not None:
        keys.add(key("machine", row.machine_id))
    return frozenset(keys)


async def look_at_machine_of(manager: Manager, disk: str) -> None:
    machine = await manager.database.read(lambda s: find_disk(s, disk).machine_id)
    if machine is not None:
        await look(manager, machine)


async def found_machine(manager: Manager, machine_id: str) -> Machine | None:
    """A machine of the store's; None if its hypervisor has it no more."""
    try:
        return await manager.machine(machine_id)
    except MachineNotFound:
        return None

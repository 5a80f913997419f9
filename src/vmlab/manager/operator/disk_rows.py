"""A disk's row, and what goes with it: its part in a machine, who may have it, who has it.

One machine has a disk at a time, the one in its row. The claim is made in the transaction that
takes an operation down; when the operation fails, the store says who has the disk by the
hypervisor's word.
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
from vmlab.manager.operator.admission import Need, reserve
from vmlab.manager.operator.handler import key, operation_of
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.placement import look
from vmlab.manager.storage import Storage
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_disk
from vmlab.manager.store.tables import DiskRow, MachineRow

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
    "let_go",
    "look_at_machine_of",
    "machine_name_of",
    "require_room",
    "serial_of",
    "set_disk_state",
    "standing_of",
    "standing_or_none",
    "tell_disk",
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


def all_attached(session: Session, machine_id: str, operation: str) -> None:
    """Write down that a machine that was made has the disks that were claimed for it."""
    claimed = select(DiskRow).where(DiskRow.machine_id == machine_id, DiskRow.state == "attaching")
    for row in session.scalars(claimed).all():
        attached(session, row.id, row.bus or "virtio", operation)


def let_go(session: Session, disk_id: str, operation: str, *, reason: str = "") -> None:
    """Write down that no machine has a disk any more."""
    row = session.get(DiskRow, disk_id)
    if row is None:
        return
    machine, had = row.machine_id, row.state in {"attached", "detaching"}
    row.machine_id = row.device = row.bus = None
    row.readonly, row.state, row.reason = False, "available", reason
    if had:
        tell_disk(session, row, "disk.detached", operation, machine=machine)


async def claim(work: Work[Any], disk_id: str, text: str) -> None:
    """The first step of what claimed a disk: what comes of the claim if the operation fails.

    The store says then who has the disk by the hypervisor's word.
    """
    async with work.step("claim", text) as step:
        work.on_undo(step, lambda: _settle(work, disk_id))


async def _settle(work: Work[Any], disk_id: str) -> None:
    standing = await work.database.read(standing_or_none, work.manager.storage, disk_id)
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
        await work.database.write(let_go, disk_id, work.operation_id)


def tell_disk(session: Session, row: DiskRow, kind: str, operation: str, **data: Any) -> None:
    add_event(session, kind, subject=row.id, name=row.name, operation=operation, data=data)


def set_disk_state(session: Session, disk_id: str, state: str, reason: str = "") -> None:
    row = session.get(DiskRow, disk_id)
    if row is not None:
        row.state, row.reason = state, reason


@dataclass(frozen=True, slots=True)
class Standing:
    """What a handler has to know of a disk when it runs."""

    part: Disk
    format: str
    size: int
    name: str
    serial: str
    machine: str | None
    machine_name: str | None


def standing_or_none(session: Session, storage: Storage, disk_id: str) -> Standing | None:
    return standing_of(session, storage, disk_id) if session.get(DiskRow, disk_id) else None


def standing_of(session: Session, storage: Storage, disk_id: str) -> Standing:
    row = session.get_one(DiskRow, disk_id)
    machine = session.get(MachineRow, row.machine_id) if row.machine_id is not None else None
    return Standing(
        disk_part(storage, row),
        row.format,
        row.size,
        row.name,
        serial_of(row),
        row.machine_id,
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

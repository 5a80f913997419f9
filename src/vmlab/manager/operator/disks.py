"""Disks of the store: made, given to machines and taken from them, grown, removed.

Such a disk is a file of the store's (`vmlab.manager.storage`) that a machine uses where it is
(`Disk.file` of the contract): the file outlives the machine, and one machine has it at a time,
which is the one in its row. The claim is made when the operation is submitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import DiskInfo, Machine
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import (
    InvalidSpec,
    MachineNotFound,
    OperationFailed,
    SpecProblem,
    VmlabError,
)
from vmlab.machine.sizes import format_size
from vmlab.machine.spec import Disk
from vmlab.machine.states import OFF, MachineState
from vmlab.manager.guests import SeenDisk, disks_seen
from vmlab.manager.operator.admission import Need, reserve
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.journal import Step, Work
from vmlab.manager.operator.machine_rows import (
    Facts,
    at_rest,
    other_of,
    require_state,
    write_facts,
)
from vmlab.manager.operator.placement import actual_state, look
from vmlab.manager.requests import AttachDisk, CreateDisk, DeleteDisk, DetachDisk, ResizeDisk
from vmlab.manager.storage import Storage
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_disk, find_machine
from vmlab.manager.store.tables import DiskRow, MachineRow, new_id

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = [
    "all_attached",
    "attached",
    "claim_for",
    "device_of",
    "disk_part",
    "fitting_bus",
    "let_go",
    "serial_of",
]

_SECTOR: Final = 512
_LONGEST_SERIAL: Final = 20
_LET_GO: Final = frozenset({MachineState.FAILED, MachineState.DELETED})
"""States in which a machine lets go of a disk although the contract has no such change: what is
left of a failed one is killed first, and one that its hypervisor lost has no disk."""
_GUEST_ANSWERS_S: Final = 10.0
"""Seconds that a guest is given to say what disks it has; one that boots is not waited for."""
_GUEST_SEES_S: Final = 120.0
"""Seconds that a guest that answers is given to find a new disk, or to lose an old one."""

# ------------------------------------------------------------------------ what a disk is


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
            f"disk {row.name!r} belongs to machine {_name_of(session, row.machine_id)!r}",
            hint=f"`vmlab disk detach {row.name}` takes it from there",
        )
    if row.state != "available":
        raise Conflict(
            f"disk {row.name!r} is {row.state}",
            hint=row.reason or "wait until it is available: `vmlab disk list` tells",
        )
    row.machine_id, row.device, row.state = machine.id, device_of(row.id), "attaching"


def _name_of(session: Session, machine_id: str) -> str:
    machine = session.get(MachineRow, machine_id)
    return machine.name if machine is not None else machine_id


def attached(session: Session, disk_id: str, bus: str, operation: str) -> None:
    """Write down that a machine has a disk that was claimed for it."""
    row = session.get_one(DiskRow, disk_id)
    row.state, row.bus, row.reason = "attached", bus, ""
    _tell(session, row, "disk.attached", operation, machine=row.machine_id, device=row.device)


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
        _tell(session, row, "disk.detached", operation, machine=machine)


async def claim(work: Work[Any], disk_id: str, text: str) -> None:
    """The first step of what claimed a disk: what comes of the claim if the operation fails.

    The store says then who has the disk by the hypervisor's word.
    """
    async with work.step("claim", text) as step:
        work.on_undo(step, lambda: _settle(work, disk_id))


async def _settle(work: Work[Any], disk_id: str) -> None:
    standing = await work.database.read(_standing_of, work.manager.storage, disk_id)
    if standing is None:
        return
    try:
        machine = None
        if standing.machine is not None:
            machine = await found_machine(work.manager, standing.machine)
    except VmlabError as error:
        reason = f"nobody knows which machine has it: {error.message}"
        await work.database.write(_set_state, disk_id, "failed", reason)
        raise
    if machine is not None and machine.spec.disk(standing.part.name) is not None:
        await work.database.write(_set_state, disk_id, "attached")
    else:
        await work.database.write(let_go, disk_id, work.operation_id)


def _tell(session: Session, row: DiskRow, kind: str, operation: str, **data: Any) -> None:
    add_event(session, kind, subject=row.id, name=row.name, operation=operation, data=data)


def _set_state(session: Session, disk_id: str, state: str, reason: str = "") -> None:
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


def _standing_of(session: Session, storage: Storage, disk_id: str) -> Standing | None:
    return _standing(session, storage, disk_id) if session.get(DiskRow, disk_id) else None


def _standing(session: Session, storage: Storage, disk_id: str) -> Standing:
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


def _keys(row: DiskRow) -> frozenset[str]:
    keys = {key("disk", row.id)}
    if row.machine_id is not None:
        keys.add(key("machine", row.machine_id))
    return frozenset(keys)


# ------------------------------------------------------------------------ create


@register
class CreateDiskHandler(Handler[CreateDisk]):
    """Makes a disk: empty and sparse, or a copy of another one."""

    kind = "disk.create"

    def check(self, session: Session, request: CreateDisk) -> Target:
        """Refuse a size that is none, a source that is in use and a full quota; make the row."""
        size, keys = request.size, set[str]()
        if request.source is not None:
            source = find_disk(session, request.source)
            _require_still(session, self.manager, source, "copied")
            keys |= _keys(source)
            if size is not None and size < source.size:
                expected = f"at least the {source.size} bytes of {source.name!r}, or left out"
                raise _wrong("size", size, expected)
            size = source.size if size is None else size
        if size is None:
            raise _wrong("size", None, 'a size such as "1G", or a disk to copy as source')
        if size <= 0 or size % _SECTOR:
            raise _wrong("size", size, f"a positive multiple of {_SECTOR} bytes")
        self.manager.storage.check_format(request.format)
        require_room(session, self.manager, size, f"make disk {request.name!r}")
        row = DiskRow(
            id=new_id(),
            name=request.name,
            size=size,
            format=request.format,
            state="creating",
            mount_point=request.mount_point,
        )
        session.add(row)
        session.flush()
        return Target(row.id, row.name, frozenset({key("disk", row.id), *keys}))

    def plan(self, session: Session, request: CreateDisk) -> Sequence[PlannedStep]:
        """One step, or two for a copy that grows."""
        of = f", a copy of {request.source!r}" if request.source is not None else ""
        steps = [PlannedStep("file", f"make {request.name!r} in {request.format}{of}")]
        if request.source is not None and request.size is not None:
            steps.append(PlannedStep("grow", f"have it {format_size(request.size)} large"))
        return steps

    def withdrawn(self, session: Session, request: CreateDisk, target: str | None) -> None:
        """It never came about."""
        _forget(session, target)

    async def run(self, work: Work[CreateDisk]) -> dict[str, Any]:
        """Make the file."""
        request, storage, disk_id = work.request, self.manager.storage, work.target_id
        size = await work.database.read(lambda s: s.get_one(DiskRow, disk_id).size)

        async def undo() -> None:
            await storage.remove(disk_id, request.format)
            await work.database.write(_forget, disk_id)

        async with work.step("file", f"make {request.name!r} in {request.format}") as step:
            work.on_undo(step, undo)
            if not step.done_before:
                if request.source is None:
                    await storage.create(disk_id, request.format, size)
                else:
                    await self._copy(work, disk_id, request.format)
        if request.source is not None:
            async with work.step("grow", f"have it {format_size(size)} large") as step:
                if not step.done_before:
                    await storage.resize(disk_id, request.format, size)
        async with work.step("keep", "enter it as available") as step:
            if not step.done_before:
                step.also(_created, disk_id, work.operation_id)
        return {"disk": disk_id, "size": size}

    async def _copy(self, work: Work[Any], disk_id: str, form: str) -> None:
        storage = self.manager.storage

        def find(session: Session) -> Standing:
            row = session.get_one(DiskRow, other_of(session, work.operation_id, "disk", disk_id))
            _require_still(session, self.manager, row, "copied")
            return _standing(session, storage, row.id)

        standing = await work.database.read(find)
        assert standing.part.file is not None
        await storage.copy(standing.part.file, standing.format, disk_id, form)


def _created(session: Session, disk_id: str, operation: str) -> None:
    row = session.get_one(DiskRow, disk_id)
    row.state = "available"
    _tell(session, row, "disk.created", operation, size=row.size, format=row.format)


def _forget(session: Session, disk_id: str | None) -> None:
    row = session.get(DiskRow, disk_id) if disk_id is not None else None
    if row is not None:
        session.delete(row)


def _require_still(session: Session, manager: Manager, row: DiskRow, what: str) -> None:
    """Refuse a disk that a guest may be writing to, or that is not whole."""
    machine = session.get(MachineRow, row.machine_id) if row.machine_id is not None else None
    if machine is not None and not at_rest(manager, machine):
        raise Conflict(
            f"disk {row.name!r} cannot be {what}: machine {machine.name!r}, which is "
            f"{machine.state}, has it",
            hint=f"stop the machine, or `vmlab disk detach {row.name}`",
        )
    if row.state not in {"available", "attached"}:
        raise Conflict(
            f"disk {row.name!r} cannot be {what}: it is {row.state}",
            hint=row.reason or "wait until it is available",
        )


def _wrong(field: str, value: object, expected: str) -> InvalidSpec:
    return InvalidSpec([SpecProblem(field, value, expected)], what="disk")


# ------------------------------------------------------------------------ attach and detach


@register
class AttachDiskHandler(Handler[AttachDisk]):
    """Gives a disk to a machine, and looks whether the machine and its guest have it."""

    kind = "disk.attach"
    retry_safe = True

    async def prepare(self, request: AttachDisk) -> AttachDisk:
        """Have it known what the machine does."""
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: AttachDisk) -> Target:
        """Refuse a disk that somebody has and a machine in another state; claim the disk."""
        row, machine = find_disk(session, request.disk), find_machine(session, request.machine)
        require_state(self.manager, machine, "plug_disk", self.kind)
        version = row.version
        claim_for(session, row, machine)
        row.bus = request.bus or fitting_bus(machine)
        row.readonly = request.readonly
        row.mount_point = request.mount_point or row.mount_point
        return Target(row.id, row.name, _keys(row), version)

    def plan(self, session: Session, request: AttachDisk) -> Sequence[PlannedStep]:
        """Plug, verify."""
        machine = find_machine(session, request.machine)
        how = "hot-plug it into" if not at_rest(self.manager, machine) else "add it to"
        return [
            PlannedStep("plug", f"{how} machine {machine.name!r}"),
            PlannedStep("verify", "ask the hypervisor, and the guest where there is one"),
        ]

    def withdrawn(self, session: Session, request: AttachDisk, target: str | None) -> None:
        """Nobody has it."""
        if target is not None:
            let_go(session, target, "")

    async def run(self, work: Work[AttachDisk]) -> dict[str, Any]:
        """Plug it and verify that it is there."""
        disk_id, storage = work.target_id, self.manager.storage
        await claim(work, disk_id, "have it for that machine")
        standing = await work.database.read(_standing, storage, disk_id)
        part = standing.part
        assert standing.machine is not None, "it was claimed"
        machine = await self.manager.machine(standing.machine)
        if not work.failure:
            await _require_whole(storage, disk_id, standing)

        async def undo() -> None:
            if machine.spec.disk(part.name) is not None:
                await machine.unplug_disk(part.name)

        async with work.step("plug", f"give it to machine {standing.machine_name!r}") as step:
            work.on_undo(step, undo)
            if not step.done_before and machine.spec.disk(part.name) is None:
                await machine.plug_disk(part)
        async with work.step("verify", "ask the hypervisor, and the guest") as step:
            if not step.done_before:
                info = await _verified(machine, standing)
                step.data |= info.model_dump(mode="json")
                step.data["guest"] = await self._seen_by_guest(machine, standing)
                step.also(attached, disk_id, info.bus, work.operation_id)
                facts = await Facts.of(machine)
                step.also(write_facts, standing.machine, facts, work.operation_id)
        return {
            "disk": disk_id,
            "machine": standing.machine,
            "device": part.name,
            "bus": step.data["bus"],
            "serial": standing.serial,
            "guest": step.data["guest"],
        }

    async def _seen_by_guest(self, machine: Machine, standing: Standing) -> str:
        """Where the guest has the disk: its device; or why that is not known, in brackets.

        Raises:
            OperationFailed: it answers, and does not find the disk.
        """
        assert standing.machine is not None
        found = await guest_disks(self.manager, machine, standing.machine)
        if isinstance(found, str):
            return f"({found})"
        guest = await self.manager.guests.get(standing.machine)
        # What is waited for is awaited in the guest: its kernel finds devices when it has time.
        if standing.serial not in found:
            await guest.wait_until_succeeds(_has_serial(standing.serial), timeout=_GUEST_SEES_S)
            found = await disks_seen(guest)
        return _found_in(found, standing)


def _has_serial(serial: str) -> str:
    """A command that succeeds once the guest has a disk with that serial number."""
    return (
        "for d in /sys/block/[vs]d*; do "
        "s=$(cat $d/serial 2>/dev/null) || "
        "s=$(dd if=$d/device/vpd_pg80 bs=1 skip=4 2>/dev/null); "
        f'[ "$s" = {serial} ] && exit 0; done; exit 1'
    )


def _found_in(found: dict[str, SeenDisk], standing: Standing) -> str:
    seen = found.get(standing.serial)
    if seen is None:
        raise OperationFailed(
            f"the guest does not find disk {standing.name!r} (serial {standing.serial})",
            hint="its kernel needs drivers for disks that come while it runs",
        )
    if seen.size != standing.size:
        raise OperationFailed(
            f"the guest finds {format_size(seen.size)} at disk {standing.name!r}, "
            f"which has {format_size(standing.size)}",
            hint="detach it, and look at its file",
        )
    return seen.device


async def guest_disks(manager: Any, machine: Machine, machine_id: str) -> dict[str, SeenDisk] | str:
    """The disks that a machine's guest has; or why it does not say."""
    if machine.state is not MachineState.RUNNING:
        return f"the machine is {machine.state.value}"
    try:
        guest = await manager.guests.get(machine_id, timeout=_GUEST_ANSWERS_S)
        return await disks_seen(guest)
    except VmlabError as error:
        return error.message.partition("\n")[0]


async def _require_whole(storage: Storage, disk_id: str, standing: Standing) -> None:
    """Refuse a disk whose file is not as the store has it."""
    size = await storage.size(disk_id, standing.format)
    if size != standing.size:
        raise OperationFailed(
            f"the file of disk {standing.name!r} has {format_size(size)}, and the store "
            f"{format_size(standing.size)}",
            hint="the observer's finding disk-size-mismatch tells more",
        )


async def _verified(machine: Machine, standing: Standing) -> DiskInfo:
    """The disk as the hypervisor has it.

    Raises:
        OperationFailed: it has it not, or not so.
    """
    for found in (await machine.info()).disks:
        if found.name == standing.part.name:
            break
    else:
        raise OperationFailed(
            f"the hypervisor does not have disk {standing.name!r} in its machine",
            machine=standing.machine_name,
            hypervisor=machine.hypervisor.name,
        )
    if (found.size, found.path) != (standing.size, standing.part.file):
        raise OperationFailed(
            f"the hypervisor has {found.path} with {found.size} bytes as disk {standing.name!r}, "
            f"not {standing.part.file} with {standing.size}",
            machine=standing.machine_name,
            hypervisor=machine.hypervisor.name,
        )
    return found


@register
class DetachDiskHandler(Handler[DetachDisk]):
    """Takes a disk from its machine."""

    kind = "disk.detach"
    retry_safe = True

    async def prepare(self, request: DetachDisk) -> DetachDisk:
        """Have it known what the machine does that has it."""
        await _look_at_machine_of(self.manager, request.disk)
        return request

    def check(self, session: Session, request: DetachDisk) -> Target:
        """Refuse a disk that no machine has, and a machine in another state."""
        row = find_disk(session, request.disk)
        if row.machine_id is None or row.state not in {"attached", "failed"}:
            raise Conflict(
                f"no machine has disk {row.name!r}: it is {row.state}",
                hint="`vmlab disk list` tells which machine has which disk",
            )
        machine = session.get_one(MachineRow, row.machine_id)
        if actual_state(self.manager, machine) not in _LET_GO:
            require_state(self.manager, machine, "unplug_disk", self.kind)
        version, row.state = row.version, "detaching"
        return Target(row.id, row.name, _keys(row), version)

    def plan(self, session: Session, request: DetachDisk) -> Sequence[PlannedStep]:
        """Unplug, verify."""
        return [
            PlannedStep("guest", "see that its guest has not mounted it, and have it written out"),
            PlannedStep("unplug", "take it from its machine"),
            PlannedStep("verify", "ask the hypervisor, and the guest where there is one"),
        ]

    def withdrawn(self, session: Session, request: DetachDisk, target: str | None) -> None:
        """The machine still has it."""
        if target is not None:
            _set_state(session, target, "attached")

    async def run(self, work: Work[DetachDisk]) -> dict[str, Any]:
        """Unplug it and verify that it is gone."""
        await claim(work, work.target_id, "let nobody else have it meanwhile")
        standing = await work.database.read(_standing, self.manager.storage, work.target_id)
        await unplug(work, standing, work.target_id)
        return {"disk": work.target_id, "machine": standing.machine}


async def unplug(work: Work[Any], standing: Standing, disk_id: str) -> None:
    """The steps that take a disk, which the operation has claimed, from its machine."""
    manager = work.manager
    assert standing.machine is not None
    machine = await found_machine(manager, standing.machine)
    part = standing.part

    async with work.step("guest", "see that its guest has not mounted it") as step:
        if not step.done_before and machine is not None:
            await _released_by_guest(manager, machine, standing, step)
    async with work.step("unplug", f"take it from machine {standing.machine_name!r}") as step:
        if not step.done_before and machine is not None and machine.spec.disk(part.name):
            if machine.state is MachineState.FAILED:
                # Nothing of a failed machine is changed before what is left of it has ended.
                await machine.kill()
            await machine.unplug_disk(part.name)
    async with work.step("verify", "ask the hypervisor") as step:
        if not step.done_before:
            if machine is not None:
                await _gone(machine, standing)
                facts = await Facts.of(machine)
                step.also(write_facts, standing.machine, facts, work.operation_id)
            step.also(let_go, disk_id, work.operation_id)


async def _look_at_machine_of(manager: Manager, disk: str) -> None:
    machine = await manager.database.read(lambda s: find_disk(s, disk).machine_id)
    if machine is not None:
        await look(manager, machine)


async def found_machine(manager: Manager, machine_id: str) -> Machine | None:
    """A machine of the store's; None if its hypervisor has it no more."""
    try:
        return await manager.machine(machine_id)
    except MachineNotFound:
        return None


async def _released_by_guest(
    manager: Manager, machine: Machine, standing: Standing, step: Step
) -> None:
    """Refuse a disk that its guest has mounted; have it written out."""
    assert standing.machine is not None
    found = await guest_disks(manager, machine, standing.machine)
    if isinstance(found, str):
        step.skip(found)
        return
    seen = found.get(standing.serial)
    if seen is not None and seen.mounted:
        raise OperationFailed(
            f"the guest of machine {standing.machine_name!r} has disk {standing.name!r} mounted at "
            + ", ".join(seen.mounted),
            hint="unmount it in the guest first, or stop the machine",
        )
    guest = await manager.guests.get(standing.machine)
    await guest.execute("sync", timeout=_GUEST_SEES_S)


async def _gone(machine: Machine, standing: Standing) -> None:
    if any(found.name == standing.part.name for found in (await machine.info()).disks):
        raise OperationFailed(
            f"the hypervisor still has disk {standing.name!r} in its machine",
            machine=standing.machine_name,
            hypervisor=machine.hypervisor.name,
        )


# ------------------------------------------------------------------------ resize and delete


@register
class ResizeDiskHandler(Handler[ResizeDisk]):
    """Grows a disk, under its machine if one has it."""

    kind = "disk.resize"
    retry_safe = True

    async def prepare(self, request: ResizeDisk) -> ResizeDisk:
        """Have it known what the machine does that has it."""
        await _look_at_machine_of(self.manager, request.disk)
        return request

    def check(self, session: Session, request: ResizeDisk) -> Target:
        """Refuse a size that is smaller or none, and what the quota has no room for."""
        row = find_disk(session, request.disk)
        if request.size <= 0 or request.size % _SECTOR:
            raise _wrong("size", request.size, f"a positive multiple of {_SECTOR} bytes")
        if request.size < row.size:
            expected = f"at least its present {row.size} bytes: a disk can only grow"
            raise _wrong("size", request.size, expected)
        if row.state not in {"available", "attached"}:
            raise Conflict(f"disk {row.name!r} is {row.state}", hint="wait until it is available")
        if row.readonly:
            raise Conflict(
                f"disk {row.name!r} is only read by its machine",
                hint="detach it first, and attach it again when it has grown",
            )
        if row.machine_id is not None:
            machine = session.get_one(MachineRow, row.machine_id)
            require_state(self.manager, machine, "resize_disk", self.kind)
        require_room(session, self.manager, request.size - row.size, f"grow disk {row.name!r}")
        return Target(row.id, row.name, _keys(row), row.version)

    def plan(self, session: Session, request: ResizeDisk) -> Sequence[PlannedStep]:
        """One step."""
        return [PlannedStep("grow", f"have it {format_size(request.size)} large")]

    async def run(self, work: Work[ResizeDisk]) -> dict[str, Any]:
        """Grow it; what has grown cannot be undone."""
        disk_id, size, storage = work.target_id, work.request.size, self.manager.storage
        standing = await work.database.read(_standing, storage, disk_id)
        async with work.step("grow", f"have it {format_size(size)} large") as step:
            if step.done_before:
                return {"disk": disk_id, "size": size}
            if standing.machine is None:
                await storage.resize(disk_id, standing.format, size)
            else:
                machine = await self.manager.machine(standing.machine)
                grown = await machine.resize_disk(standing.part.name, size)
                if grown.size != size:
                    raise OperationFailed(
                        f"the hypervisor has {grown.size} bytes as disk {standing.name!r}, "
                        f"not {size}",
                        machine=standing.machine_name,
                    )
                facts = await Facts.of(machine)
                step.also(write_facts, standing.machine, facts, work.operation_id)
            step.also(_grown, disk_id, size, work.operation_id)
        return {"disk": disk_id, "size": size}


def _grown(session: Session, disk_id: str, size: int, operation: str) -> None:
    row = session.get_one(DiskRow, disk_id)
    before, row.size = row.size, size
    _tell(session, row, "disk.resized", operation, before=before, size=size)


@register
class DeleteDiskHandler(Handler[DeleteDisk]):
    """Removes a disk and its file; it is taken from a machine at rest first."""

    kind = "disk.delete"
    retry_safe = True

    async def prepare(self, request: DeleteDisk) -> DeleteDisk:
        """Have it known what the machine does that has it."""
        await _look_at_machine_of(self.manager, request.disk)
        return request

    def check(self, session: Session, request: DeleteDisk) -> Target:
        """Refuse a disk that a machine which is not at rest has, and one that is being changed."""
        row = find_disk(session, request.disk)
        if row.state not in {"available", "attached", "failed"}:
            raise Conflict(
                f"disk {row.name!r} is {row.state}", hint="wait until that operation has ended"
            )
        if row.machine_id is not None:
            machine = session.get_one(MachineRow, row.machine_id)
            state = actual_state(self.manager, machine)
            if state not in OFF | _LET_GO and machine.operation_id is None:
                raise Conflict(
                    f"disk {row.name!r} belongs to machine {machine.name!r}, which is {state}",
                    hint=f"`vmlab disk detach {row.name}` first, or stop the machine",
                )
        version, row.state = row.version, "deleting"
        return Target(row.id, row.name, _keys(row), version)

    def plan(self, session: Session, request: DeleteDisk) -> Sequence[PlannedStep]:
        """Detach it, if need be; remove the file."""
        row = find_disk(session, request.disk)
        steps = [PlannedStep("remove", f"remove disk {row.name!r} and its file")]
        if row.machine_id is not None:
            name = _name_of(session, row.machine_id)
            steps.insert(0, PlannedStep("unplug", f"take it from machine {name!r}"))
        return steps

    def withdrawn(self, session: Session, request: DeleteDisk, target: str | None) -> None:
        """It is as it was."""
        if target is not None:
            _kept(session, target)

    async def run(self, work: Work[DeleteDisk]) -> dict[str, Any]:
        """Take it from its machine and remove it."""
        disk_id, storage = work.target_id, self.manager.storage
        standing = await work.database.read(_standing_of, storage, disk_id)
        if standing is None:
            # The last step's transaction was the last thing that a crash let it do.
            return {"disk": disk_id}
        await claim(work, disk_id, "let nobody else have it meanwhile")
        if standing.machine is not None:
            machine = await found_machine(self.manager, standing.machine)
            if machine is not None and not work.failure:
                await self._require_rest(machine, standing)
            await unplug(work, standing, disk_id)
        async with work.step("remove", f"remove disk {standing.name!r} and its file") as step:
            if not step.done_before:
                await storage.remove(disk_id, standing.format)
                step.also(_deleted, disk_id, work.operation_id)
        return {"disk": disk_id}

    async def _require_rest(self, machine: Machine, standing: Standing) -> None:
        state = (await machine.status()).state
        if state.is_live or state is MachineState.UNKNOWN:
            raise OperationFailed(
                f"disk {standing.name!r} belongs to machine {standing.machine_name!r}, which is "
                f"{state.value} by its hypervisor's word",
                hint=f"`vmlab disk detach {standing.name}` first, or stop the machine",
            )


def _kept(session: Session, disk_id: str) -> None:
    row = session.get(DiskRow, disk_id)
    if row is not None and row.state == "deleting":
        row.state = "attached" if row.machine_id is not None else "available"
        row.reason = ""


def _deleted(session: Session, disk_id: str, operation: str) -> None:
    row = session.get(DiskRow, disk_id)
    if row is not None:
        _tell(session, row, "disk.deleted", operation, size=row.size)
        session.delete(row)

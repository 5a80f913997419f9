"""Disks of the store: made, grown, removed; `attachments` gives them to machines.

Such a disk is a file of the store's (`vmlab.manager.storage`) that a machine uses where it is
(`Disk.file` of the contract): the file outlives the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import InvalidSpec, OperationFailed, SpecProblem
from vmlab.machine.sizes import format_size
from vmlab.machine.states import OFF, MachineState
from vmlab.manager.operator.admission import Need, drop_reservation, reserve
from vmlab.manager.operator.attachments import LET_GO, unplug
from vmlab.manager.operator.disk_rows import (
    Standing,
    claim,
    disk_keys,
    found_machine,
    look_at_machine_of,
    machine_name_of,
    require_room,
    standing_of,
    standing_or_none,
    tell_disk,
)
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.machine_rows import (
    Facts,
    at_rest,
    other_of,
    require_state,
    write_facts,
)
from vmlab.manager.operator.placement import actual_state
from vmlab.manager.requests import CreateDisk, DeleteDisk, ResizeDisk
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.queries import find_disk
from vmlab.manager.store.tables import DiskRow, MachineRow, new_id

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["CreateDiskHandler", "DeleteDiskHandler", "ResizeDiskHandler"]

_SECTOR: Final = 512


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
            keys |= disk_keys(source)
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
            return standing_of(session, storage, row.id, work.operation_id)

        standing = await work.database.read(find)
        assert standing.part.file is not None
        await storage.copy(standing.part.file, standing.format, disk_id, form)


def _created(session: Session, disk_id: str, operation: str) -> None:
    row = session.get_one(DiskRow, disk_id)
    row.state = "available"
    tell_disk(session, row, "disk.created", operation, size=row.size, format=row.format)


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


@register
class ResizeDiskHandler(Handler[ResizeDisk]):
    """Grows a disk, under its machine if one has it."""

    kind = "disk.resize"
    retry_safe = True
    cancellable = False

    async def prepare(self, request: ResizeDisk) -> ResizeDisk:
        """Have it known what the machine does that has it."""
        await look_at_machine_of(self.manager, request.disk)
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
        reserve(
            session,
            self.manager.settings,
            Need(disk=request.size - row.size),
            operation=operation_of(session),
            what=f"grow disk {row.name!r}",
        )
        return Target(row.id, row.name, disk_keys(row), row.version)

    def plan(self, session: Session, request: ResizeDisk) -> Sequence[PlannedStep]:
        """One step."""
        return [PlannedStep("grow", f"have it {format_size(request.size)} large")]

    async def run(self, work: Work[ResizeDisk]) -> dict[str, Any]:
        """Grow it; what has grown cannot be undone."""
        disk_id, size, storage = work.target_id, work.request.size, self.manager.storage
        standing = await work.database.read(standing_of, storage, disk_id, work.operation_id)
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
            step.also(drop_reservation, work.operation_id)
        return {"disk": disk_id, "size": size}


def _grown(session: Session, disk_id: str, size: int, operation: str) -> None:
    row = session.get_one(DiskRow, disk_id)
    before, row.size = row.size, size
    tell_disk(session, row, "disk.resized", operation, before=before, size=size)


@register
class DeleteDiskHandler(Handler[DeleteDisk]):
    """Removes a disk and its file; it is taken from a machine at rest first."""

    kind = "disk.delete"
    retry_safe = True
    cancellable = False

    async def prepare(self, request: DeleteDisk) -> DeleteDisk:
        """Have it known what the machine does that has it."""
        await look_at_machine_of(self.manager, request.disk)
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
            if state not in OFF | LET_GO and machine.operation_id is None:
                raise Conflict(
                    f"disk {row.name!r} belongs to machine {machine.name!r}, which is {state}",
                    hint=f"`vmlab disk detach {row.name}` first, or stop the machine",
                )
        version, row.state = row.version, "deleting"
        return Target(row.id, row.name, disk_keys(row), version)

    def plan(self, session: Session, request: DeleteDisk) -> Sequence[PlannedStep]:
        """Detach it, if need be; remove the file."""
        row = find_disk(session, request.disk)
        steps = [PlannedStep("remove", f"remove disk {row.name!r} and its file")]
        if row.machine_id is not None:
            name = machine_name_of(session, row.machine_id)
            steps.insert(0, PlannedStep("unplug", f"take it from machine {name!r}"))
        return steps

    def withdrawn(self, session: Session, request: DeleteDisk, target: str | None) -> None:
        """It is as it was."""
        if target is not None:
            _kept(session, target)

    async def run(self, work: Work[DeleteDisk]) -> dict[str, Any]:
        """Take it from its machine and remove it."""
        disk_id, storage = work.target_id, self.manager.storage
        standing = await work.database.read(standing_or_none, storage, disk_id, work.operation_id)
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
        tell_disk(session, row, "disk.deleted", operation, size=row.size)
        session.delete(row)

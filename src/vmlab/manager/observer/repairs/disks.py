"""Disks and their files brought together again: rows changed, files moved aside, grown, removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import OperationFailed, VmlabError
from vmlab.machine.sizes import format_size
from vmlab.manager.observer.collect.files import QUARANTINE
from vmlab.manager.observer.repairs.repair import Delegated, Facts, Repair, repair
from vmlab.manager.operator.disk_rows import let_go
from vmlab.manager.operator.handler import PlannedStep, key
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.placement import look
from vmlab.manager.requests import AttachDisk, DetachDisk, ResizeDisk
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_disk, find_machine
from vmlab.manager.store.tables import DiskRow

__all__: list[str] = []


def _tell(session: Session, row: DiskRow, kind: str, operation: str, **data: Any) -> None:
    add_event(session, kind, subject=row.id, name=row.name, operation=operation, data=data)


def _keys(*disk_and_machines: str | None) -> frozenset[str]:
    disk, *machines = disk_and_machines
    found = {key("machine", machine) for machine in machines if machine is not None}
    return frozenset(found | ({key("disk", disk)} if disk is not None else set()))


class _OnRow(Repair):
    """What repairs share that change a disk's row: how it was before is what undoes them."""

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        row = find_disk(session, facts.subject)
        return _keys(row.id, row.machine_id, facts.evidence.get("machine"))

    async def change(self, work: Work[Any], facts: Facts) -> dict[str, Any]:
        """The one step: the row as it was, kept, and `write` in the step's transaction."""
        async with work.step(self.action, self.text) as step:
            work.on_undo(step, lambda: self.put_back(work, facts, step.data))
            if not step.done_before:
                step.data |= await work.database.read(_row_of, facts.subject)
                step.also(self.write, facts, work.operation_id)
        return dict(step.data)

    def write(self, session: Session, facts: Facts, operation: str) -> None:
        """Change the row."""
        raise NotImplementedError

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        return await self.change(work, facts)

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        await self.put_back(work, facts, before)

    async def put_back(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        """Write the row as it was."""
        if "state" in before:
            await work.database.write(_put_back, facts.subject, dict(before), work.operation_id)


_COLUMNS = ("state", "reason", "machine_id", "device", "bus", "readonly", "mount_point", "size")


def _row_of(session: Session, disk: str) -> dict[str, Any]:
    row = session.get_one(DiskRow, disk)
    return {column: getattr(row, column) for column in _COLUMNS}


def _put_back(session: Session, disk: str, before: dict[str, Any], operation: str) -> None:
    row = session.get(DiskRow, disk)
    if row is None:
        return
    for column in _COLUMNS:
        setattr(row, column, before[column])
    _tell(session, row, "disk.attached" if row.machine_id else "disk.detached", operation)


# ------------------------------------------------------------------------ missing


@repair
class MarkFailed(_OnRow):
    """The disk is marked as failed."""

    code = "missing-disk"
    action = "adopt"
    text = "mark the disk as failed"

    def write(self, session: Session, facts: Facts, operation: str) -> None:
        row = session.get_one(DiskRow, facts.subject)
        row.state, row.reason = "failed", str(facts.evidence["problem"])
        _tell(session, row, "disk.updated", operation, state="failed", reason=row.reason)


# ------------------------------------------------------------------------ orphans


class _OnFile(Repair):
    """What repairs of files share: they have to be still nobody's."""

    code = "orphan-disk"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        disk = facts.evidence.get("disk")
        known = session.get(DiskRow, disk) if disk is not None else None
        # What is left half made beside a disk's file is not the disk's.
        if known is not None and self.path(facts) == self.manager.storage.path(
            known.id, known.format
        ):
            raise Conflict(
                f"{facts.subject} is the file of disk {known.name!r} by now",
                hint="there is nothing to repair",
            )
        return frozenset({key("disk", disk or facts.subject)})

    def path(self, facts: Facts) -> Path:
        """Where the file is: by its name alone, below the directory of disks."""
        return self.manager.storage.directory / Path(facts.subject).name


@repair
class AdoptFile(_OnFile):
    """The store takes it in as a disk."""

    action = "adopt"
    text = "take the file in as a disk"

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        disk, form = facts.subject.split(".", 1)
        async with work.step("adopt", self.text) as step:
            work.on_undo(step, lambda: work.database.write(_forget, disk, work.operation_id))
            if not step.done_before:
                size = await self.manager.storage.size(disk, form)
                step.also(_take_in, disk, form, size, work.operation_id)
        return {"disk": disk}

    def check_undo(self, session: Session, facts: Facts, before: Mapping[str, Any]) -> None:
        row = session.get(DiskRow, before["disk"])
        if row is not None and row.machine_id is not None:
            raise Conflict(f"disk {row.name!r} belongs to a machine by now", hint="detach it first")

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        await work.database.write(_forget, str(before["disk"]), work.operation_id)


def _take_in(session: Session, disk: str, form: str, size: int, operation: str) -> None:
    name, number = f"found-{disk[:8]}", 1
    while session.scalar(select(DiskRow.id).where(DiskRow.name == name)) is not None:
        number += 1
        name = f"found-{disk[:8]}-{number}"
    row = DiskRow(id=disk, name=name, size=size, format=form, state="available")
    session.add(row)
    session.flush()
    _tell(session, row, "disk.created", operation, size=size, format=form, adopted=True)


def _forget(session: Session, disk: str, operation: str) -> None:
    """The store does not know that disk any more; its file stays."""
    row = session.get(DiskRow, disk)
    if row is not None:
        session.delete(row)
        _tell(session, row, "disk.deleted", operation)


@repair
class MoveAside(_OnFile):
    """The file is moved aside."""

    action = "quarantine"
    text = "move the file aside"

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        path = self.path(facts)
        aside = path.parent / QUARANTINE / f"{facts.id[:12]}-{path.name}"
        async with work.step("quarantine", f"{self.text}: {aside}") as step:
            work.on_undo(step, partial(done_in_thread, _move, aside, path))
            if not step.done_before:
                await done_in_thread(_move, path, aside)
        return {"from": path.name, "to": str(aside.relative_to(path.parent))}

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        path = self.path(facts)
        aside = path.parent / QUARANTINE / f"{facts.id[:12]}-{path.name}"
        async with work.step("back", "move the file back") as step:
            if not step.done_before:
                await done_in_thread(_move, aside, path)


def _move(source: Path, target: Path) -> None:
    """Give a file another name; one that has it already is no error.

    Raises:
        OperationFailed: another file has that name, or it cannot be done.
    """
    if not source.exists():
        if target.exists():
            return
        raise OperationFailed(f"there is no {source}", operation="finding.repair")
    if target.exists():
        raise OperationFailed(f"there is a {target} already", operation="finding.repair")
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        source.rename(target)
    except OSError as error:
        raise OperationFailed(
            f"{source} cannot be moved to {target}: {error.strerror}", operation="finding.repair"
        ) from error


@repair
class RemoveFile(_OnFile):
    """The file is removed."""

    action = "reconcile"
    text = "remove the file"

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async with work.step("reconcile", self.text) as step:
            if not step.done_before:
                await done_in_thread(_remove, self.path(facts))
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OperationFailed(
            f"{path} cannot be removed: {error.strerror}", operation="finding.repair"
        ) from error


# ------------------------------------------------------------------------ attachments


def _adopt_attachment(session: Session, facts: Facts, operation: str) -> None:
    """Have a disk's row say what its machine has."""
    row = session.get_one(DiskRow, facts.subject)
    if facts.evidence["direction"] == "store":
        let_go(session, row.id, operation)
        return
    machine = find_machine(session, str(facts.evidence["machine"]))
    row.machine_id, row.device, row.state = machine.id, str(facts.evidence["device"]), "attached"
    _tell(session, row, "disk.attached", operation, machine=machine.id, device=row.device)


@repair
class AdoptAttachment(_OnRow):
    """The store takes over what the machine has."""

    code = "disk-attachment-mismatch"
    action = "adopt"
    text = "write into the store which machine has the disk"

    def write(self, session: Session, facts: Facts, operation: str) -> None:
        _adopt_attachment(session, facts, operation)


@repair
class ReconcileAttachment(_OnRow):
    """The disk is attached or detached as the store says."""

    code = "disk-attachment-mismatch"
    action = "reconcile"
    text = "attach or detach the disk as the store says"

    def _delegated(self, facts: Facts) -> Delegated:
        disk, machine = facts.subject, str(facts.evidence["machine"])
        if facts.evidence["direction"] == "store":
            return Delegated(self.manager, AttachDisk(disk=disk, machine=machine), disk)
        return Delegated(self.manager, DetachDisk(disk=disk), disk)

    async def prepare(self, facts: Facts) -> None:
        await look(self.manager, str(facts.evidence["machine"]))

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        row = find_disk(session, facts.subject)
        keys = super().check(session, facts)
        if facts.evidence.get("stored_machine") is not None:
            # Another machine has it by right: it is taken from this one without a word of the row.
            return keys
        # The store says first what is, then the operation that makes it what it ought to be runs.
        _adopt_attachment(session, facts, "")
        session.flush()
        return keys | self._delegated(facts).check(session) | _keys(row.id)

    def withdrawn(self, session: Session, facts: Facts) -> None:
        if facts.evidence.get("stored_machine") is None:
            self._delegated(facts).withdrawn(session)

    def plan(self, session: Session, facts: Facts) -> Sequence[PlannedStep]:
        if facts.evidence.get("stored_machine") is not None:
            return [PlannedStep("unplug", "take the disk from the machine that has it wrongly")]
        return self._delegated(facts).plan(session)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        if facts.evidence.get("stored_machine") is None:
            await self._delegated(facts).run(work)
            return {"direction": facts.evidence["direction"]}
        device = str(facts.evidence["device"])
        async with work.step("unplug", f"take {device} from the machine that has it") as step:
            if not step.done_before:
                machine = await self.manager.machine(str(facts.evidence["machine"]))
                if machine.spec.disk(device) is None:
                    step.skip("it does not have it any more")
                else:
                    await machine.unplug_disk(device)
        return None

    def check_undo(self, session: Session, facts: Facts, before: Mapping[str, Any]) -> None:
        self._reverse(facts).check(session)

    def _reverse(self, facts: Facts) -> Delegated:
        disk, machine = facts.subject, str(facts.evidence["machine"])
        if facts.evidence["direction"] == "store":
            return Delegated(self.manager, DetachDisk(disk=disk), disk)
        return Delegated(self.manager, AttachDisk(disk=disk, machine=machine), disk)

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        await self._reverse(facts).run(work)


# ------------------------------------------------------------------------ sizes


@repair
class AdoptSize(_OnRow):
    """The store takes over the size."""

    code = "disk-size-mismatch"
    action = "adopt"
    text = "write the file's size into the store"

    def write(self, session: Session, facts: Facts, operation: str) -> None:
        _set_size(session, facts.subject, int(facts.evidence["seen"]), operation)


def _set_size(session: Session, disk: str, size: int, operation: str) -> None:
    row = session.get_one(DiskRow, disk)
    before, row.size = row.size, size
    _tell(session, row, "disk.resized", operation, before=before, size=size)


@repair
class Grow(_OnRow):
    """The disk is grown to the size that the store says."""

    code = "disk-size-mismatch"
    action = "reconcile"
    text = "grow the disk to the size that the store says"

    def _delegated(self, facts: Facts) -> Delegated:
        size = int(facts.evidence["stored"])
        return Delegated(self.manager, ResizeDisk(disk=facts.subject, size=size), facts.subject)

    async def prepare(self, facts: Facts) -> None:
        await self._delegated(facts).prepare()

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        row = find_disk(session, facts.subject)
        if int(facts.evidence["seen"]) > row.size:
            raise VmlabError(
                f"the file of disk {row.name!r} is larger than the {format_size(row.size)} of the "
                "store, and a disk is never shrunk",
                hint="adopt writes the file's size into the store",
            )
        return super().check(session, facts) | self._delegated(facts).check(session)

    def plan(self, session: Session, facts: Facts) -> Sequence[PlannedStep]:
        return self._delegated(facts).plan(session)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        await self._delegated(facts).run(work)
        return None

"""Giving disks of the store to machines and taking them from them, running and at rest.

What the hypervisor says afterwards is believed, and not that it did what it was told to: a disk has
to be among the machine's, with its file and its size; and a guest that answers has to find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session

from vmlab.hypervisors.base import DiskInfo, Machine
from vmlab.machine.errors import MachineNotFound, OperationFailed, VmlabError
from vmlab.machine.sizes import format_size
from vmlab.machine.states import MachineState
from vmlab.manager.guests import SeenDisk, disks_seen
from vmlab.manager.operator.disk_rows import (
    Standing,
    attached,
    claim,
    claim_for,
    disk_keys,
    fitting_bus,
    found_machine,
    holds,
    let_go,
    look_at_machine_of,
    standing_of,
)
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    operation_of,
    register,
)
from vmlab.manager.operator.journal import Step, Work
from vmlab.manager.operator.machine_rows import Facts, at_rest, require_state, write_facts
from vmlab.manager.operator.placement import actual_state, look
from vmlab.manager.requests import AttachDisk, DetachDisk
from vmlab.manager.storage import Storage
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.queries import find_disk, find_machine
from vmlab.manager.store.tables import DiskRow, MachineRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["LET_GO", "AttachDiskHandler", "DetachDiskHandler", "unplug"]

LET_GO: Final = frozenset({MachineState.FAILED, MachineState.DELETED})
"""States in which a machine lets go of a disk although the contract has no such change: what is
left of a failed one is killed first, and one that its hypervisor lost has no disk."""
_GUEST_ANSWERS_S: Final = 10.0
"""Seconds that a guest is given to say what disks it has; one that boots is not waited for."""
_GUEST_SEES_S: Final = 120.0
"""Seconds that a guest that answers is given to find a new disk, or to lose an old one."""


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
        return Target(row.id, row.name, disk_keys(row), version)

    def plan(self, session: Session, request: AttachDisk) -> Sequence[PlannedStep]:
        """Plug, verify."""
        machine = find_machine(session, request.machine)
        how = "hot-plug it into" if not at_rest(self.manager, machine) else "add it to"
        return [
            PlannedStep("plug", f"{how} machine {machine.name!r}"),
            PlannedStep("verify", "ask the hypervisor, and the guest where there is one"),
        ]

    def withdrawn(self, session: Session, request: AttachDisk, target: str | None) -> None:
        """Nobody has it, unless its machine is gone and another one is to have it."""
        row = session.get(DiskRow, target) if target is not None else None
        if row is not None and holds(session, operation_of(session), row):
            let_go(session, row.id, "")

    async def run(self, work: Work[AttachDisk]) -> dict[str, Any]:
        """Plug it and verify that it is there."""
        disk_id, storage = work.target_id, self.manager.storage
        await claim(work, disk_id, "have it for that machine")
        standing = await work.database.read(standing_of, storage, disk_id, work.operation_id)
        part = standing.part
        if standing.machine is None:
            # Whoever was before this in the machine's line has deleted it.
            raise MachineNotFound(
                f"machine {work.request.machine!r} was deleted before it had disk {standing.name!r}"
            )
        machine = await self.manager.machine(standing.machine)
        if not work.failure:
            await _require_whole(storage, disk_id, standing)

        async def has_it() -> bool:
            if machine.spec.disk(part.name) is not None:
                return True
            # Asked, not remembered: what a manager that was killed had begun may have come about.
            return any(found.name == part.name for found in (await machine.info()).disks)

        async def undo() -> None:
            if await has_it():
                await machine.unplug_disk(part.name)

        async with work.step("plug", f"give it to machine {standing.machine_name!r}") as step:
            work.on_undo(step, undo)
            if not step.done_before and not await has_it():
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
        await look_at_machine_of(self.manager, request.disk)
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
        if actual_state(self.manager, machine) not in LET_GO:
            require_state(self.manager, machine, "unplug_disk", self.kind)
        version, row.state = row.version, "detaching"
        return Target(row.id, row.name, disk_keys(row), version)

    def plan(self, session: Session, request: DetachDisk) -> Sequence[PlannedStep]:
        """Unplug, verify."""
        return [
            PlannedStep("guest", "see that its guest has not mounted it, and have it written out"),
            PlannedStep("unplug", "take it from its machine"),
            PlannedStep("verify", "ask the hypervisor, and the guest where there is one"),
        ]

    def withdrawn(self, session: Session, request: DetachDisk, target: str | None) -> None:
        """The machine still has it, if it is there."""
        row = session.get(DiskRow, target) if target is not None else None
        if row is not None and row.state == "detaching":
            row.state = "attached" if row.machine_id is not None else "available"

    async def run(self, work: Work[DetachDisk]) -> dict[str, Any]:
        """Unplug it and verify that it is gone."""
        await claim(work, work.target_id, "let nobody else have it meanwhile")
        standing = await work.database.read(
            standing_of, self.manager.storage, work.target_id, work.operation_id
        )
        await unplug(work, standing, work.target_id)
        return {"disk": work.target_id, "machine": standing.machine}


async def unplug(work: Work[Any], standing: Standing, disk_id: str) -> None:
    """The steps that take a disk, which the operation has claimed, from its machine."""
    manager = work.manager
    if standing.machine is None:
        # It was let go of before a crash, or its machine was deleted before this came to its turn.
        return
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

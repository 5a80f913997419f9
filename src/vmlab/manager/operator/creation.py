"""Making machines, changing what is known of them, and removing them: create, update, delete.

A machine has its row, its name and its id from the moment that its creation is taken down. One
whose creation fails or is cancelled leaves nothing; one whose first start fails is there, failed,
with the reason.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Hypervisor
from vmlab.hypervisors.threads import in_thread
from vmlab.images.progress import ProgressEvent
from vmlab.machine.errors import (
    InvalidState,
    MachineNotFound,
    ResourceExhausted,
)
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import OPERATIONS, MachineState
from vmlab.manager.operator.admission import Need, reserve
from vmlab.manager.operator.definition import (
    SIMULATED,
    PreparedMachine,
    bootable,
    json_of,
    new_mac,
    prepare,
    spec_of,
)
from vmlab.manager.operator.disk_rows import (
    all_attached,
    claim_for,
    disk_part,
    fitting_bus,
    let_go,
    waited_for,
)
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.lifecycle import (
    BOOT_STEPS,
    boot,
    claim_room,
    found_state,
    machine_target,
    write_state,
)
from vmlab.manager.operator.placement import (
    Placed,
    actual_state,
    defined,
    look,
    on_some_host,
    placed,
)
from vmlab.manager.operator.wiring import ended, wired, write_spec
from vmlab.manager.requests import CreateMachine, DeleteMachine, Metadata, NewNic, UpdateMachine
from vmlab.manager.storage import Storage
from vmlab.manager.store.changes import Conflict, add_event, set_machine_state
from vmlab.manager.store.queries import find_disk, find_machine, find_network, find_template
from vmlab.manager.store.tables import HostRow, MachineRow, NicRow, new_id

_TELL_S: Final = 0.5


@register
class CreateHandler(Handler[CreateMachine]):
    """Makes a machine from a template, an image or a specification, and starts it if asked to."""

    kind = "machine.create"
    retry_safe = True
    seconds = 3600.0

    async def prepare(self, request: CreateMachine) -> CreateMachine:
        return await prepare(self.manager, request)

    def check(self, session: Session, request: CreateMachine) -> Target:
        assert isinstance(request, PreparedMachine), "`prepare` has made it one"
        name = str(request.name)
        if session.scalar(select(MachineRow.id).where(MachineRow.name == name)) is not None:
            raise Conflict(
                f"there is a machine {name!r} already; names are unique",
                hint="choose another name, or delete that machine",
            )
        operation = operation_of(session)
        host = self._admit(session, request, operation)
        row = self._row(session, request, host)
        session.add(row)
        session.flush()
        if request.start:
            claim_room(session, self, row, operation, keep=True)
            self.manager.networks.prepare(session, row, operation=operation)
        add_event(
            session,
            "machine.created",
            subject=row.id,
            name=row.name,
            operation=operation,
            data={"host": host, "image": row.image, "template": request.template},
        )
        keys = {key("machine", row.id)}
        for name in request.disks:
            disk = find_disk(session, name)
            claim_for(session, disk, row)
            disk.bus = fitting_bus(row)
            keys.add(key("disk", disk.id))
        return Target(row.id, row.name, frozenset(keys))

    def _admit(self, session: Session, request: PreparedMachine, operation: str) -> str:
        """The first host that has room for it.

        Raises:
            ResourceExhausted: none has; it is the first one's reason.
        """
        need = Need(machines=1)
        if request.start:
            need += Need(vcpus=request.vcpus or 0, memory=request.memory or 0)
        refusal: ResourceExhausted | None = None
        for host in request.hosts:
            try:
                reserve(
                    session,
                    self.manager.settings,
                    need,
                    operation=operation,
                    host=host,
                    what=f"create {request.name!r}",
                    keep=False,
                )
            except ResourceExhausted as error:
                refusal = refusal or error
            else:
                return host
        assert refusal is not None, "there is a host"
        raise refusal

    def _row(self, session: Session, request: PreparedMachine, host: str) -> MachineRow:
        spec = spec_of(dict(request.spec or {}))
        template = find_template(session, request.template) if request.template else None
        for fallback in request.policy.fallback:
            self.manager.hosts.setting(fallback)
        id_ = new_id()
        return MachineRow(
            id=id_,
            name=request.name,
            host=host,
            hypervisor=session.get_one(HostRow, host).hypervisor,
            template_id=template.id if template is not None else None,
            image=request.image,
            architecture=spec.architecture.value,
            vcpus=spec.cpus.count,
            memory=spec.memory.size,
            spec=json_of(spec.with_changes(name=machine_name(id_))),
            labels=dict(request.labels),
            policy=request.policy.model_dump(mode="json"),
            metadata_=request.metadata.model_dump(mode="json"),
            nics=[_nic_row(session, position, nic) for position, nic in enumerate(request.nics)],
        )

    def plan(self, session: Session, request: CreateMachine) -> Sequence[PlannedStep]:
        steps = [PlannedStep("register", f"take {request.name!r} down")]
        if request.image is not None:
            steps.append(PlannedStep("image", f"have the image {request.image!r}"))
        steps.append(PlannedStep("define", f"define it on host {request.host!r}"))
        return [*steps, *(BOOT_STEPS if request.start else ())]

    def withdrawn(self, session: Session, request: CreateMachine, target: str | None) -> None:
        if target is not None:
            _forget(session, target, None)

    async def run(self, work: Work[CreateMachine]) -> dict[str, Any] | None:
        async with work.step("register", "take it down") as step:
            work.on_undo(step, partial(self._unmake, work))
        await self._define(work)
        if work.request.start:
            # What is made stays, whatever becomes of its start.
            work.keep()
            await boot(self, work)
        return {"machine": work.target_id}

    async def _unmake(self, work: Work[CreateMachine]) -> None:
        """Nothing of it is left: what it had of networks, then its row."""
        await ended(self.manager, work.target_id, deleted=True)
        await work.database.write(_forget, work.target_id, work.operation_id)

    async def _define(self, work: Work[CreateMachine]) -> None:
        machine = await work.database.read(placed, work.target_id)
        async with work.step("image", f"have the image {machine.image!r}") as step:
            if not step.done_before:
                spec = await self._specification(work, machine)
                if machine.image is None:
                    step.skip("it boots from no image")
                    await work.database.write(write_spec, machine.id, spec)
                else:
                    step.also(write_spec, machine.id, spec)
        async with work.step("define", f"define it on host {machine.host!r}") as step:
            work.on_undo(step, partial(undefine, work, machine.id))
            if not step.done_before:
                machine = await work.database.read(placed, machine.id)
                spec = spec_of(machine.spec)

                async def action(hypervisor: Hypervisor) -> None:
                    await defined(hypervisor, machine, spec)

                await on_some_host(work, machine, action, movable=True)
                step.also(all_attached, machine.id, work.operation_id)

    async def _specification(self, work: Work[CreateMachine], machine: Placed) -> MachineSpec:
        """The machine as its hypervisor is to make it."""
        spec = await work.database.read(_spec_with_parts, self.manager.storage, machine.id)
        spec = await wired(self.manager, machine.id, spec)
        hypervisor = self.manager.hosts.setting(machine.host).hypervisor
        if machine.image is None or hypervisor == SIMULATED:
            return spec.with_changes(boot={**spec.boot.model_dump(), "image": None})
        return await self._bootable(work, spec, machine)

    async def _bootable(
        self, work: Work[CreateMachine], spec: MachineSpec, machine: Placed
    ) -> MachineSpec:
        """The machine with its image, which is fetched or built now; tells how far that is."""
        assert machine.image is not None
        image, latest = machine.image, list[ProgressEvent]()

        def build(check: Callable[[], None]) -> MachineSpec:
            worker = threading.get_ident()

            def told(event: ProgressEvent) -> None:
                latest[:] = [event]
                if threading.get_ident() == worker:
                    check()  # a cancelled operation waits for no image

            return bootable(spec, image, hostname=machine.hostname, progress=told)

        async def tell() -> None:
            while True:
                await asyncio.sleep(_TELL_S)
                if latest:
                    event = latest[0]
                    share = event.done / event.total if event.total else 0.0
                    # The image is half of the way, as far as anybody can know.
                    await work.progress(share / 2, event.step)

        telling = asyncio.create_task(tell())
        try:
            return await in_thread(build)
        finally:
            telling.cancel()
            await asyncio.wait((telling,))


def _nic_row(session: Session, position: int, nic: NewNic) -> NicRow:
    known = nic.network in {"user", "none"}
    return NicRow(
        position=position,
        name=nic.name or f"net{position}",
        mode=nic.network if known else "network",
        network_id=None if known else find_network(session, nic.network).id,
        mac=nic.mac.lower() if nic.mac else new_mac(),
        requested_address=nic.address,
    )


def _spec_with_parts(session: Session, storage: Storage, machine_id: str) -> MachineSpec:
    """The machine's specification with the MAC addresses of its NICs, and disks of the store."""
    row = find_machine(session, machine_id)
    macs = {nic.name: nic.mac for nic in row.nics}
    spec = spec_of(dict(row.spec))
    nics = tuple(nic.model_copy(update={"mac": macs[nic.name]}) for nic in spec.nics)
    waiting = waited_for(session, machine_id)
    disks = [disk_part(storage, disk) for disk in row.disks if disk.id not in waiting]
    return spec.with_changes(
        nics=nics, disks=[*spec.disks, *(disk for disk in disks if spec.disk(disk.name) is None)]
    )


def _forget(session: Session, machine_id: str, operation: str | None) -> None:
    """Remove a machine's row; again does nothing. Disks of the store are free again."""
    row = session.get(MachineRow, machine_id)
    if row is None:
        return
    for disk in list(row.disks):
        let_go(session, disk.id, operation or "")
    session.flush()
    session.expire(row, ["disks"])
    session.delete(row)
    add_event(session, "machine.deleted", subject=row.id, name=row.name, operation=operation)


async def undefine(work: Work[Any], machine_id: str) -> None:
    """Remove a machine at its hypervisor; one that is not there is no error."""
    machine = await work.database.read(placed, machine_id)

    async def action(hypervisor: Hypervisor) -> None:
        try:
            found = await hypervisor.get(machine_name(machine_id))
        except MachineNotFound:
            return
        await found.delete(force=True)

    await on_some_host(work, machine, action, movable=False)


# ------------------------------------------------------------------------ update


_ONCE: Final = ("user_data", "ssh_keys")
"""What cloud-init looks at once for each instance id."""


@register
class UpdateHandler(Handler[UpdateMachine]):
    """Changes what is known of a machine: its name, labels, policy, metadata."""

    kind = "machine.update"

    def check(self, session: Session, request: UpdateMachine) -> Target:
        row = find_machine(session, request.machine)
        if request.name is not None and request.name != row.name:
            taken = session.scalar(select(MachineRow.id).where(MachineRow.name == request.name))
            if taken is not None:
                raise Conflict(
                    f"there is a machine {request.name!r} already; names are unique",
                    hint="choose another name",
                )
        if request.policy is not None:
            for host in request.policy.fallback:
                self.manager.hosts.setting(host)
        return machine_target(row)

    def plan(self, session: Session, request: UpdateMachine) -> Sequence[PlannedStep]:
        return [PlannedStep("write", f"write down its {', '.join(_changes(request))}")]

    async def run(self, work: Work[UpdateMachine]) -> dict[str, Any] | None:
        changed = _changes(work.request)
        async with work.step("write", f"write down its {', '.join(changed)}") as step:
            if not step.done_before:
                step.also(_update, work.target_id, work.request, work.operation_id)
        return {"changed": changed}


def _changes(request: UpdateMachine) -> list[str]:
    fields = ("name", "labels", "policy", "metadata")
    return [field for field in fields if getattr(request, field) is not None]


def _told(before: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """What a guest is told from now on; cloud-init is to begin anew if it would not look else.

    A hostname it sets at every boot, but what it runs, and who may log in, only once.
    """
    told = metadata.model_dump(mode="json")
    instance = int(before.get("instance") or 0)
    changed = any((before.get(each) or None) != (told[each] or None) for each in _ONCE)
    told["instance"] = max(told["instance"], instance + 1 if changed else instance)
    return told


def _update(session: Session, machine_id: str, request: UpdateMachine, operation: str) -> None:
    row = find_machine(session, machine_id)
    if request.name is not None:
        row.name = request.name
    if request.labels is not None:
        row.labels = dict(request.labels)
    if request.policy is not None:
        row.policy = request.policy.model_dump(mode="json")
    if request.metadata is not None:
        row.metadata_ = _told(row.metadata_, request.metadata)
    add_event(
        session,
        "machine.updated",
        subject=row.id,
        name=row.name,
        operation=operation,
        data={"changed": _changes(request)},
    )


# ------------------------------------------------------------------------ delete


@register
class DeleteHandler(Handler[DeleteMachine]):
    """Removes a machine with what is its own; disks of the store are detached and stay."""

    kind = "machine.delete"
    retry_safe = True
    cancellable = False

    async def prepare(self, request: DeleteMachine) -> DeleteMachine:
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: DeleteMachine) -> Target:
        row = find_machine(session, request.machine)
        if row.operation_id is None:
            self._refuse_live(row, request)
        return machine_target(row)

    def _refuse_live(self, row: MachineRow, request: DeleteMachine) -> None:
        state = actual_state(self.manager, row)
        if not request.force and state not in OPERATIONS["delete"]:
            raise InvalidState(
                "delete",
                expected=tuple(s.value for s in MachineState if s in OPERATIONS["delete"]),
                actual=state.value,
                machine=row.name,
                hypervisor=row.hypervisor,
                hint="stop it first, or have it killed by `force`",
            )

    def plan(self, session: Session, request: DeleteMachine) -> Sequence[PlannedStep]:
        row = find_machine(session, request.machine)
        disks = ", ".join(disk.name for disk in row.disks)
        return [
            PlannedStep("claim", "say that it goes"),
            PlannedStep("remove", f"remove it from host {row.host!r}, with its own storage"),
            PlannedStep("forget", f"forget it; {disks} stay" if disks else "forget it"),
        ]

    async def run(self, work: Work[DeleteMachine]) -> dict[str, Any] | None:
        machine_id = work.target_id

        def claim(session: Session) -> None:
            row = find_machine(session, machine_id)
            if not work.recovered:
                self._refuse_live(row, work.request)
            set_machine_state(session, row, MachineState.DELETING, operation=work.operation_id)

        async with work.step("claim", "say that it goes", before=claim) as step:
            work.on_undo(step, partial(self._still_there, work))
        async with work.step("remove", "remove it from its host, with its own storage") as step:
            if not step.done_before:
                await undefine(work, machine_id)
                await ended(self.manager, machine_id, deleted=True)
                await self.manager.boot_files.remove(machine_id)
        async with work.step("forget", "forget it") as step:
            if not step.done_before:
                step.also(_forget, machine_id, work.operation_id)
        self.manager.forget_machine(machine_id)
        return None

    async def _still_there(self, work: Work[DeleteMachine]) -> None:
        """It could not be removed: the store says what there is, and why."""
        state, reason = await found_state(work, work.target_id)
        if not state.is_live:
            state = MachineState.FAILED if state is not MachineState.UNKNOWN else state
            why = work.failure.message if work.failure is not None else ""
            reason = f"it could not be deleted: {why}"
        await work.database.write(
            write_state, work.target_id, state, work.operation_id, reason=reason
        )


__all__ = ["CreateHandler", "DeleteHandler", "UpdateHandler", "undefine"]

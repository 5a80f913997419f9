"""Second ones of machines: of a snapshot, or as the machine is now.

A live machine is forked, where its hypervisor can; of one at rest a snapshot is taken, a machine
made of that, and the snapshot removed. The clone has an id, a name, addresses of MAC and IP and a
disk for cloud-init of its own, and its guest is told of them if it runs; what only one machine can
have stays with the first: disks of the store, and addresses that somebody asked for.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Hypervisor, Machine, Snapshot
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import MachineNotFound, SnapshotNotFound, VmlabError
from vmlab.machine.states import MachineState
from vmlab.manager.networks.addresses import release
from vmlab.manager.operator.admission import Need, drop_reservation, reserve
from vmlab.manager.operator.definition import new_mac
from vmlab.manager.operator.handler import (
    Handler,
    PlannedStep,
    Target,
    key,
    operation_of,
    register,
)
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.operator.journal import Step, Work
from vmlab.manager.operator.machine_rows import Facts, at_rest, other_of, require_state, write_facts
from vmlab.manager.operator.placement import look
from vmlab.manager.operator.snapshots import removed, require_disks_aside, set_aside
from vmlab.manager.operator.wiring import connect, remembers, reseed, tell_guest
from vmlab.manager.requests import CloneMachine
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.queries import find_machine, find_snapshot
from vmlab.manager.store.tables import DiskRow, MachineRow, NicRow, new_id

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager
    from vmlab.manager.networks.networks import Networks

__all__ = ["CloneHandler"]


@register
class CloneHandler(Handler[CloneMachine]):
    """Makes a second machine of one."""

    kind = "machine.clone"

    async def prepare(self, request: CloneMachine) -> CloneMachine:
        """Refuse what the hypervisor cannot do; give the clone a name."""
        await look(self.manager, request.machine)
        host, live = await self.manager.database.read(_host_and_life, self.manager, request.machine)
        capabilities = await self.manager.hosts.capabilities(host)
        needed = [Capability.FORK] if request.snapshot is None and live else [Capability.SNAPSHOT]
        if needed == [Capability.SNAPSHOT]:
            needed.append(Capability.RESTORE)
        capabilities.require(*needed, machine=request.machine, operation=self.kind)
        name = request.name or f"{request.machine[:52]}-{secrets.token_hex(3)}"
        return request.model_copy(update={"name": name})

    def check(self, session: Session, request: CloneMachine) -> Target:
        """Refuse what cannot be copied; make the clone's row."""
        source = find_machine(session, request.machine)
        live = False
        if request.snapshot is not None:
            kept = find_snapshot(session, source, request.snapshot)
            live = kept.memory
        else:
            require_state(self.manager, source, "snapshot", self.kind)
            require_disks_aside(session, self.manager, source, "copied")
            live = not at_rest(self.manager, source)
        clone_id = new_id()
        row = MachineRow(
            id=clone_id,
            name=request.name,
            state=MachineState.CREATED.value,
            wanted="stopped",
            host=source.host,
            hypervisor=source.hypervisor,
            template_id=source.template_id,
            image=source.image,
            architecture=source.architecture,
            vcpus=source.vcpus,
            memory=source.memory,
            spec={
                **source.spec,
                "name": machine_name(clone_id),
                "disks": _own_disks(session, source),
            },
            labels=dict(source.labels),
            # What it is to do by itself is decided anew for each machine.
            policy={**source.policy, "autostart": False, "snapshot_every": None},
            metadata_={**source.metadata_, "hostname": None, "instance": 0},
        )
        session.add(row)
        session.flush()
        for nic in source.nics:
            session.add(
                NicRow(
                    machine_id=row.id,
                    position=nic.position,
                    name=nic.name,
                    mode=nic.mode,
                    network_id=nic.network_id,
                    mac=new_mac(),
                    data={},
                )
            )
        reserve(
            session,
            self.manager.settings,
            # Its row counts as a machine already.
            Need(vcpus=source.vcpus, memory=source.memory) if live else Need(),
            operation=operation_of(session),
            host=source.host,
            machine=row.id,
            what=f"clone machine {source.name!r}",
        )
        keys = {key("machine", source.id), key("machine", row.id)}
        return Target(row.id, row.name, frozenset(keys))

    def plan(self, session: Session, request: CloneMachine) -> Sequence[PlannedStep]:
        """Copy, enter."""
        source = find_machine(session, request.machine)
        of = f"of its snapshot {request.snapshot!r}" if request.snapshot else "as it is now"
        return [PlannedStep("copy", f"make a machine of {source.name!r} {of}")]

    def withdrawn(self, session: Session, request: CloneMachine, target: str | None) -> None:
        """It never came about."""
        _forget(session, target)

    async def run(self, work: Work[CloneMachine]) -> dict[str, Any]:
        """Make it; nothing is left of one that fails."""
        clone_id = work.target_id

        async with work.step("claim", "have its name to itself") as step:
            work.on_undo(step, lambda: work.database.write(_forget, clone_id))
        source_id, host = await work.database.read(_source, work.operation_id, clone_id)
        hypervisor = await self.manager.hosts.get(host)
        source = await self.manager.machine(source_id)
        async with work.step("way", "see what is to be copied") as step:
            if not step.done_before:
                step.data["passing"] = work.request.snapshot is None and not source.state.is_live
        # Of one at rest a snapshot is taken, which is gone afterwards.
        passing = f"clone-{work.operation_id[:12]}" if step.data["passing"] else None
        aside = set_aside(work, source, source_id) if passing else nullcontext()

        async def undo() -> None:
            copy = await _at(hypervisor, machine_name(clone_id))
            if copy is not None:
                await copy.delete(force=True)
            if passing:
                await removed(source, passing)

        async with aside, work.step("copy", "make it at the hypervisor") as step:
            work.on_undo(step, undo)
            if not step.done_before:
                if await _at(hypervisor, machine_name(clone_id)) is None:
                    if not passing:
                        # It may run, and be on networks, from its first moment.
                        await connect(self.manager, clone_id, host)
                    await _copy(work, hypervisor, source, machine_name(clone_id), passing)
                if passing:
                    await removed(source, passing)
        copy = await hypervisor.get(machine_name(clone_id))
        async with work.step("wire", "have addresses of its own for it") as step:
            if not step.done_before:
                macs = {nic.name: nic.mac for nic in (await copy.info()).nics}
                networks = self.manager.networks if copy.state.is_live else None
                step.also(
                    _wired,
                    clone_id,
                    source_id,
                    macs,
                    networks=networks,
                    operation=work.operation_id,
                )
        async with work.step("seed", "have it told what it is") as step:
            if not step.done_before:
                await self._seed(copy, clone_id, step)
        async with work.step("keep", "enter it") as step:
            if not step.done_before:
                facts = await Facts.of(copy)
                step.also(_entered, clone_id, source_id, facts, work.operation_id)
                step.also(drop_reservation, work.operation_id, machine=clone_id)
        work.keep()
        async with work.step("refresh", "have its guest be another one") as step:
            if not step.done_before:
                await tell_guest(self.manager, clone_id, copy.state, step, copy=True)
        return {"machine": clone_id, "of": source_id}

    async def _seed(self, copy: Machine, clone_id: str, step: Step) -> None:
        """Give a clone what cloud-init is to tell it, in place of what the first one is told.

        A guest that runs has read that already: it is for what it reads later, and no reason to
        fail; its next start brings it in any case.
        """
        capabilities = await copy.hypervisor.capabilities()
        plugs = copy.state is MachineState.RUNNING and Capability.HOTPLUG_DISK in capabilities
        if copy.state.is_live and not plugs:
            step.skip("it is told when it is started again")
            return
        try:
            await reseed(self.manager, clone_id, copy)
        except VmlabError as error:
            if not copy.state.is_live:
                raise
            step.failed(error.message.partition("\n")[0])


async def _copy(
    work: Work[CloneMachine],
    hypervisor: Hypervisor,
    source: Machine,
    name: str,
    passing: str | None,
) -> None:
    wanted = work.request.snapshot or passing
    if wanted is None:
        await source.fork(name)
        return
    if passing and not any(kept.name == passing for kept in await source.snapshots()):
        await source.snapshot(passing, memory=False)
    await hypervisor.create_from(await _named(source, wanted), name)


async def _at(hypervisor: Hypervisor, name: str) -> Machine | None:
    try:
        return await hypervisor.get(name)
    except MachineNotFound:
        return None


async def _named(machine: Machine, name: str) -> Snapshot:
    for kept in await machine.snapshots():
        if kept.name == name:
            return kept
    raise SnapshotNotFound(
        f"the hypervisor has no snapshot {name!r} any more",
        hint="delete it from the store, too",
        machine=machine.name,
    )


def _host_and_life(session: Session, manager: Manager, name: str) -> tuple[str, bool]:
    row = find_machine(session, name)
    return row.host, not at_rest(manager, row)


def _own_disks(session: Session, source: MachineRow) -> list[Any]:
    devices = set(
        session.scalars(select(DiskRow.device).where(DiskRow.machine_id == source.id)).all()
    )
    return [disk for disk in source.spec.get("disks", []) if disk["name"] not in devices]


def _source(session: Session, operation: str, clone_id: str) -> tuple[str, str]:
    source = other_of(session, operation, "machine", clone_id)
    return source, session.get_one(MachineRow, clone_id).host


def _wired(
    session: Session,
    clone_id: str,
    source_id: str,
    macs: dict[str, str],
    *,
    networks: Networks | None,
    operation: str,
) -> None:
    """It has the MAC addresses that its hypervisor gave it, and addresses if there are networks.

    There are none for one at rest, whose guest remembers nothing.
    """
    row = session.get_one(MachineRow, clone_id)
    for nic in row.nics:
        nic.mac = macs.get(nic.name, nic.mac)
    if networks is not None:
        networks.prepare(session, row, operation=operation)
        remembers(row, session.get_one(MachineRow, source_id))


def _entered(session: Session, clone_id: str, source_id: str, facts: Facts, operation: str) -> None:
    row = session.get_one(MachineRow, clone_id)
    live = facts.state in {MachineState.RUNNING, MachineState.PAUSED}
    row.wanted = facts.state.value if live else "stopped"
    add_event(
        session,
        "machine.created",
        subject=row.id,
        name=row.name,
        operation=operation,
        data={"host": row.host, "of": source_id},
    )
    write_facts(session, clone_id, facts, operation, updated=False)


def _forget(session: Session, clone_id: str | None) -> None:
    row = session.get(MachineRow, clone_id) if clone_id is not None else None
    if row is not None:
        release(session, row.id)
        session.delete(row)

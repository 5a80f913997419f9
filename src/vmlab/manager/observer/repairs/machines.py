"""Machines brought to what is wanted of them, or the store to what they do; orphans taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import MachineNotFound
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import OFF, MachineState
from vmlab.manager.networks import names
from vmlab.manager.observer.repairs.repair import Delegated, Facts, Repair, repair
from vmlab.manager.operator.definition import json_of
from vmlab.manager.operator.handler import PlannedStep, key
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.lifecycle import found_state
from vmlab.manager.operator.placement import look
from vmlab.manager.requests import (
    MachinePolicy,
    Metadata,
    PauseMachine,
    Request,
    ResumeMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.store.changes import Conflict, add_event, set_machine_state
from vmlab.manager.store.queries import find_machine
from vmlab.manager.store.tables import HostRow, MachineRow, NetworkRow, NicRow

__all__: list[str] = []

_WANTED = {MachineState.RUNNING: "running", MachineState.PAUSED: "paused"}


# ------------------------------------------------------------------------ state


@repair
class AdoptState(Repair):
    """The store takes over what the machine does."""

    code = "machine-state-mismatch"
    action = "adopt"
    text = "write into the store what the machine does"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        row = find_machine(session, facts.subject)
        return frozenset({key("machine", row.id)})

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async with work.step("adopt", self.text) as step:
            work.on_undo(step, lambda: self._back(work, facts, step.data))
            if not step.done_before:
                before = await work.database.read(_state_of, facts.subject)
                state, reason = await found_state(work, facts.subject)
                # What it was before is remembered before it is changed.
                step.data |= before
                after = {
                    "state": state.value,
                    "reason": reason,
                    "wanted": _WANTED.get(state, "stopped"),
                }
                step.also(_write, facts.subject, after, work.operation_id)
        return dict(step.data)

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        await self._back(work, facts, before)

    async def _back(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        if "state" in before:
            await work.database.write(_write, facts.subject, before, work.operation_id)


def _state_of(session: Session, machine: str) -> dict[str, Any]:
    row = find_machine(session, machine)
    return {"state": row.state, "reason": row.reason, "wanted": row.wanted}


def _write(session: Session, machine: str, what: Mapping[str, Any], operation: str) -> None:
    row = session.get(MachineRow, machine)
    if row is not None:
        row.wanted = what["wanted"]
        set_machine_state(session, row, what["state"], reason=what["reason"], operation=operation)


@repair
class ReconcileState(Repair):
    """The machine is brought to what it was last told to be."""

    code = "machine-state-mismatch"
    action = "reconcile"
    text = "bring the machine to what it was last told to be"

    async def prepare(self, facts: Facts) -> None:
        await look(self.manager, facts.subject)
        for delegated in self._delegates(facts)[:1]:
            await delegated.prepare()

    def _delegates(self, facts: Facts) -> list[Delegated]:
        machine = facts.subject
        wanted, seen = facts.evidence["wanted"], MachineState(facts.evidence["seen"])
        requests: list[Request] = []
        if wanted == "stopped":
            requests.append(StopMachine(machine=machine))
        elif seen in OFF:
            requests.append(StartMachine(machine=machine))
            if wanted == "paused":
                requests.append(PauseMachine(machine=machine))
        elif wanted == "paused":
            requests.append(PauseMachine(machine=machine))
        else:
            requests.append(ResumeMachine(machine=machine))
        return [Delegated(self.manager, request, machine) for request in requests]

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        # The others' states are those that the ones before them lead to.
        return self._delegates(facts)[0].check(session)

    def withdrawn(self, session: Session, facts: Facts) -> None:
        self._delegates(facts)[0].withdrawn(session)

    def plan(self, session: Session, facts: Facts) -> Sequence[PlannedStep]:
        return [step for each in self._delegates(facts) for step in each.plan(session)]

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        for delegated in self._delegates(facts):
            await delegated.run(work)
        return {"seen": facts.evidence["seen"]}

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        """The machine is as it was found: at rest, paused or running."""
        seen = MachineState(before["seen"])
        state, _ = await found_state(work, facts.subject)
        requests: list[Request] = []
        if seen in OFF and state not in OFF:
            requests.append(StopMachine(machine=facts.subject))
        elif seen is MachineState.PAUSED and state is MachineState.RUNNING:
            requests.append(PauseMachine(machine=facts.subject))
        elif seen is MachineState.RUNNING and state is MachineState.PAUSED:
            requests.append(ResumeMachine(machine=facts.subject))
        elif seen is MachineState.RUNNING and state in OFF:
            requests.append(StartMachine(machine=facts.subject))
        for request in requests:
            await Delegated(self.manager, request, facts.subject).run(work)


# ------------------------------------------------------------------------ orphans


async def _orphan(repair_: Repair, facts: Facts) -> Machine:
    """The machine that a finding is about, at its hypervisor.

    Raises:
        MachineNotFound: it is gone.
    """
    hypervisor = await repair_.manager.hosts.get(str(facts.evidence["host"]))
    return await hypervisor.get(str(facts.evidence["machine"]))


def _still_unknown(session: Session, facts: Facts) -> frozenset[str]:
    """Refuse a machine that the store knows by now; the locks of one that it does not."""
    at = str(facts.evidence["at"])
    digits = at.partition("-")[2]
    for id_ in session.scalars(
        select(MachineRow.id).where(MachineRow.host == str(facts.evidence["host"]))
    ):
        if machine_name(id_) == at:
            raise Conflict(
                f"machine {at!r} of host {facts.evidence['host']!r} is in the store by now",
                hint="there is nothing to repair",
            )
    return frozenset({key("machine", digits or at)})


@repair
class AdoptMachine(Repair):
    """The store takes the machine in."""

    code = "orphan-machine"
    action = "adopt"
    text = "take the machine into the store"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        return _still_unknown(session, facts)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        # Its name at the hypervisor begins its id; the rest is this operation's, so that doing it
        # again makes the same one.
        digits = str(facts.evidence["at"]).partition("-")[2]
        id_ = digits + work.operation_id[: 32 - len(digits)]
        async with work.step("adopt", self.text) as step:
            work.on_undo(step, lambda: work.database.write(_forget, id_, work.operation_id))
            if not step.done_before:
                machine = await _orphan(self, facts)
                found = _Found(
                    str(facts.evidence["host"]), machine.spec, (await machine.status()).state
                )
                step.also(_take_in, id_, found, work.operation_id)
        return {"machine": id_}

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        await work.database.write(_forget, str(before["machine"]), work.operation_id)
        self.manager.forget_machine(str(before["machine"]))


@dataclass(frozen=True, slots=True)
class _Found:
    """A machine that a hypervisor has and the store has not."""

    host: str
    spec: MachineSpec
    state: MachineState


def _take_in(session: Session, id_: str, found: _Found, operation: str) -> None:
    """A row for a machine that a hypervisor has."""
    spec = found.spec
    segments = {
        f"segment:{names.segment(network)}": network
        for network in session.scalars(select(NetworkRow.id))
    }
    row = MachineRow(
        id=id_,
        name=_free_name(session, f"found-{id_[:8]}"),
        state=found.state.value,
        wanted=_WANTED.get(found.state, "stopped"),
        host=found.host,
        hypervisor=session.get_one(HostRow, found.host).hypervisor,
        image=spec.boot.image,
        architecture=spec.architecture.value,
        vcpus=spec.cpus.count,
        memory=spec.memory.size,
        spec=json_of(spec),
        labels=dict(spec.labels),
        policy=MachinePolicy().model_dump(mode="json"),
        metadata_=Metadata().model_dump(mode="json"),
    )
    session.add(row)
    session.flush()
    for position, nic in enumerate(spec.nics):
        network = segments.get(nic.network)
        session.add(
            NicRow(
                machine_id=id_,
                position=position,
                name=nic.name,
                mode="network" if network else "user" if nic.network == "user" else "none",
                network_id=network,
                mac=nic.mac or f"{position:02x}:{id_[:10]}"[:17],
            )
        )
    data = {"host": found.host, "image": row.image, "adopted": True}
    add_event(
        session, "machine.created", subject=id_, name=row.name, operation=operation, data=data
    )


def _free_name(session: Session, wanted: str) -> str:
    taken = set(session.scalars(select(MachineRow.name).where(MachineRow.name.startswith(wanted))))
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def _forget(session: Session, id_: str, operation: str) -> None:
    """The store does not know that machine any more; the machine itself stays as it is."""
    row = session.get(MachineRow, id_)
    if row is None:
        return
    for disk in list(row.disks):
        disk.machine_id, disk.device, disk.bus, disk.state = None, None, None, "available"
    session.flush()
    session.expire(row, ["disks"])
    session.delete(row)
    add_event(session, "machine.deleted", subject=id_, name=row.name, operation=operation)


@repair
class QuarantineMachine(Repair):
    """The machine is paused."""

    code = "orphan-machine"
    action = "quarantine"
    text = "pause the machine"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        return _still_unknown(session, facts)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async with work.step("quarantine", self.text) as step:
            work.on_undo(step, lambda: self._resume(facts))
            if not step.done_before:
                machine = await _orphan(self, facts)
                if (await machine.status()).state is MachineState.RUNNING:
                    await machine.pause()
        return {"machine": facts.evidence["machine"]}

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        async with work.step("resume", "let the machine run on") as step:
            if not step.done_before:
                await self._resume(facts)

    async def _resume(self, facts: Facts) -> None:
        machine = await _orphan(self, facts)
        if (await machine.status()).state is MachineState.PAUSED:
            await machine.resume()


@repair
class DeleteMachine(Repair):
    """The machine is deleted with its disks."""

    code = "orphan-machine"
    action = "reconcile"
    text = "delete the machine with its disks"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        return _still_unknown(session, facts)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async with work.step("reconcile", self.text) as step:
            if not step.done_before:
                try:
                    machine = await _orphan(self, facts)
                except MachineNotFound:
                    step.skip("it is gone already")
                else:
                    await machine.delete(force=True)
        return None

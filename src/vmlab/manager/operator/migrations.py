"""Machines that move to another host of the same hypervisor, running or at rest.

It is all or nothing at the hypervisors (`Machine.migrate`): after a crash the machine is asked for
at both, and is where it is found. Disks of the store stay where they are: both hosts are of this
computer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import InvalidSpec, InvalidState, MachineNotFound, SpecProblem
from vmlab.machine.fit import check_fit
from vmlab.machine.states import OPERATIONS, MachineState
from vmlab.manager.operator.admission import Need, drop_reservation, reserve
from vmlab.manager.operator.definition import spec_of
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
from vmlab.manager.operator.machine_rows import Facts, at_rest, require_state, write_facts
from vmlab.manager.operator.placement import look
from vmlab.manager.requests import MigrateMachine
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.queries import find_host, find_machine
from vmlab.manager.store.tables import MachineRow

__all__ = ["MigrateHandler"]


@register
class MigrateHandler(Handler[MigrateMachine]):
    """Moves a machine."""

    kind = "machine.migrate"

    async def prepare(self, request: MigrateMachine) -> MigrateMachine:
        """Refuse a host that cannot have such a machine."""
        await look(self.manager, request.machine)
        spec = await self.manager.database.read(
            lambda s: spec_of(dict(find_machine(s, request.machine).spec))
        )
        await self.manager.database.read(lambda s: find_host(s, request.host).name)
        check_fit(spec, await self.manager.hosts.capabilities(request.host))
        return request

    def check(self, session: Session, request: MigrateMachine) -> Target:
        """Refuse a host of another hypervisor, or without room."""
        row, host = find_machine(session, request.machine), find_host(session, request.host)
        if host.name == row.host:
            expected = f"another host than {row.host!r}, where it is"
            raise InvalidSpec([SpecProblem("host", host.name, expected)], what="migrate")
        if host.hypervisor != row.hypervisor:
            expected = f"a host of the hypervisor {row.hypervisor!r}: this is {host.hypervisor!r}"
            raise InvalidSpec([SpecProblem("host", host.name, expected)], what="migrate")
        require_state(self.manager, row, "migrate", self.kind)
        live = not at_rest(self.manager, row)
        if request.live is not None and request.live is not live:
            fitting = tuple(
                state.value
                for state in MachineState
                if state in OPERATIONS["migrate"] and state.is_live is request.live
            )
            raise InvalidState(self.kind, expected=fitting, actual=row.state, machine=row.name)
        reserve(
            session,
            self.manager.settings,
            Need(vcpus=row.vcpus, memory=row.memory) if live else Need(),
            operation=operation_of(session),
            host=host.name,
            machine=row.id,
            moves=True,
            what=f"move machine {row.name!r} to host {host.name!r}",
        )
        return Target(row.id, row.name, frozenset({key("machine", row.id)}), row.version)

    def plan(self, session: Session, request: MigrateMachine) -> Sequence[PlannedStep]:
        """One step."""
        row = find_machine(session, request.machine)
        how = "at rest" if at_rest(self.manager, row) else "while it is live"
        text = f"move machine {row.name!r} from host {row.host!r} to {request.host!r}, {how}"
        return [PlannedStep("migrate", text)]

    async def run(self, work: Work[MigrateMachine]) -> dict[str, Any]:
        """Move it, and enter where it is."""
        request, machine_id = work.request, work.target_id
        before = await work.database.read(lambda s: s.get_one(MachineRow, machine_id).host)
        async with work.step("migrate", f"move it to host {request.host!r}") as step:

            async def find() -> None:
                """Wherever it is, the store says so."""
                for host in (request.host, before):
                    machine = await self._at(host, machine_id)
                    if machine is not None:
                        facts = await Facts.of(machine)
                        await work.database.write(
                            _moved, machine_id, host, facts, work.operation_id
                        )
                        return

            work.on_undo(step, find)
            if not step.done_before:
                await self.manager.guests.forget(machine_id)
                arrived = await self._moved(work, before)
                facts = await Facts.of(arrived)
                step.also(_moved, machine_id, request.host, facts, work.operation_id)
                step.also(drop_reservation, work.operation_id, machine=machine_id)
        return {"machine": machine_id, "host": request.host, "from": before}

    async def _moved(self, work: Work[MigrateMachine], before: str) -> Machine:
        """The machine at its new host."""
        request, machine_id = work.request, work.target_id
        target = await self.manager.hosts.get(request.host)
        machine = await self._at(before, machine_id)
        if machine is None:
            # A crash came between its arrival and the line in the journal.
            return await self.manager.hosts.machine(request.host, machine_id)
        told: set[asyncio.Task[None]] = set()

        def progress(transferred: int, total: int) -> None:
            task = asyncio.ensure_future(
                work.progress(transferred / max(total, 1), f"{transferred} of {total} bytes")
            )
            told.add(task)
            task.add_done_callback(told.discard)

        try:
            return await machine.migrate(target, live=request.live, progress=progress)
        finally:
            if told:
                await asyncio.wait(told)

    async def _at(self, host: str, machine_id: str) -> Machine | None:
        try:
            return await (await self.manager.hosts.get(host)).get(machine_name(machine_id))
        except MachineNotFound:
            return None


def _moved(session: Session, machine_id: str, host: str, facts: Facts, operation: str) -> None:
    row = session.get_one(MachineRow, machine_id)
    before, row.host = row.host, host
    write_facts(session, machine_id, facts, operation, updated=False)
    if before != host:
        add_event(
            session,
            "machine.updated",
            subject=row.id,
            name=row.name,
            operation=operation,
            data={"host": host, "from": before},
        )

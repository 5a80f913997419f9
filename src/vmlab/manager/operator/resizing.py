"""Machines of another size: vCPUs and memory, at rest or while they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.sizes import format_size
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
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.machine_rows import Facts, at_rest, require_state, write_facts
from vmlab.manager.operator.placement import look
from vmlab.manager.requests import ResizeMachine
from vmlab.manager.store.queries import find_machine

__all__ = ["ResizeHandler"]


@register
class ResizeHandler(Handler[ResizeMachine]):
    """Changes a machine's vCPUs and memory."""

    kind = "machine.resize"
    retry_safe = True
    cancellable = False

    async def prepare(self, request: ResizeMachine) -> ResizeMachine:
        """Have it known what the machine does."""
        await look(self.manager, request.machine)
        return request

    def check(self, session: Session, request: ResizeMachine) -> Target:
        """Refuse what is no size of a machine, and what there is no room for."""
        row = find_machine(session, request.machine)
        if request.vcpus is None and request.memory is None:
            raise InvalidSpec(
                [SpecProblem("vcpus", None, "vcpus or memory has to be given")], what="resize"
            )
        require_state(self.manager, row, "resize", self.kind)
        spec = spec_of({**row.spec, "name": row.name})
        cpus, memory = spec.cpus.model_dump(), spec.memory.model_dump()
        if request.vcpus is not None:
            cpus |= {"count": request.vcpus, "sockets": None, "cores": None, "threads": None}
        if request.memory is not None:
            memory |= {"size": request.memory}
        spec.with_changes(cpus=cpus, memory=memory)
        if not at_rest(self.manager, row):
            need = Need(
                vcpus=max(0, (request.vcpus or row.vcpus) - row.vcpus),
                memory=max(0, (request.memory or row.memory) - row.memory),
            )
            reserve(
                session,
                self.manager.settings,
                need,
                operation=operation_of(session),
                host=row.host,
                machine=row.id,
                what=f"have machine {row.name!r} grow",
            )
        return Target(row.id, row.name, frozenset({key("machine", row.id)}), row.version)

    def plan(self, session: Session, request: ResizeMachine) -> Sequence[PlannedStep]:
        """One step."""
        return [PlannedStep("resize", f"have it {_words(request)}")]

    async def run(self, work: Work[ResizeMachine]) -> dict[str, Any]:
        """Change it; a machine at rest gets its size back if that fails half-way."""
        request, machine_id = work.request, work.target_id
        async with work.step("resize", f"have it {_words(request)}") as step:
            if not step.done_before:
                machine = await self.manager.machine(machine_id)
                await machine.resize(vcpus=request.vcpus, memory=request.memory)
                facts = await Facts.of(machine)
                step.data |= {"vcpus": facts.vcpus, "memory": facts.memory}
                step.also(write_facts, machine_id, facts, work.operation_id)
                step.also(drop_reservation, work.operation_id, machine=machine_id)
        return {"machine": machine_id, **step.data}


def _words(request: ResizeMachine) -> str:
    parts = []
    if request.vcpus is not None:
        parts.append(f"{request.vcpus} vCPUs")
    if request.memory is not None:
        parts.append(f"{format_size(request.memory)} of memory")
    return " and ".join(parts)

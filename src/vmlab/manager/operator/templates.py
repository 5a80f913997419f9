"""Templates: specifications under names, for machines to be made of. Nothing runs here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.spec import MachineSpec
from vmlab.manager.operator.handler import Handler, PlannedStep, Target, key, register
from vmlab.manager.operator.journal import Work
from vmlab.manager.requests import CreateTemplate, DeleteTemplate
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_template
from vmlab.manager.store.tables import MachineRow, TemplateRow, new_id

__all__ = ["CreateTemplateHandler", "DeleteTemplateHandler"]


@register
class CreateTemplateHandler(Handler[CreateTemplate]):
    """Keeps a specification."""

    kind = "template.create"

    def check(self, session: Session, request: CreateTemplate) -> Target:
        """Refuse a specification that is none, and a name that is taken."""
        if (request.image is None) is (request.spec is None):
            raise InvalidSpec(
                [SpecProblem("image", request.image, "either an image or a spec")],
                what="template",
                hint="an image by name, or a whole specification",
            )
        if request.spec is not None:
            given = {"memory": request.memory, "cpus": request.vcpus, **request.spec}
            MachineSpec.of(**{**given, "name": request.name})
        row = TemplateRow(
            id=new_id(),
            name=request.name,
            image=request.image,
            vcpus=request.vcpus,
            memory=request.memory,
            spec=request.spec,
            labels=dict(request.labels),
        )
        session.add(row)
        # A name that is taken is told now.
        session.flush()
        return Target(row.id, row.name, frozenset({key("template", row.id)}))

    def plan(self, session: Session, request: CreateTemplate) -> Sequence[PlannedStep]:
        """One step."""
        return [PlannedStep("keep", f"keep template {request.name!r}")]

    def withdrawn(self, session: Session, request: CreateTemplate, target: str | None) -> None:
        """It never came about."""
        _remove(session, target)

    async def run(self, work: Work[CreateTemplate]) -> dict[str, Any]:
        """Tell of it: the row is there since it was asked for."""
        template_id = work.target_id
        async with work.step("keep", f"keep template {work.request.name!r}") as step:
            work.on_undo(step, lambda: work.database.write(_remove, template_id))
            if not step.done_before:
                step.also(_tell, template_id, "template.created", work.operation_id)
        return {"template": template_id}


@register
class DeleteTemplateHandler(Handler[DeleteTemplate]):
    """Removes a template that no machine was made of."""

    kind = "template.delete"

    def check(self, session: Session, request: DeleteTemplate) -> Target:
        """Refuse one that machines were made of."""
        row = find_template(session, request.template)
        made = session.scalars(
            select(MachineRow.name).where(MachineRow.template_id == row.id).limit(5)
        ).all()
        if made:
            count = session.scalar(
                select(func.count()).select_from(MachineRow).where(MachineRow.template_id == row.id)
            )
            raise Conflict(
                f"template {row.name!r} has machines that were made of it ({count}): "
                + ", ".join(sorted(made)),
                hint="delete those first",
            )
        return Target(row.id, row.name, frozenset({key("template", row.id)}), row.version)

    def plan(self, session: Session, request: DeleteTemplate) -> Sequence[PlannedStep]:
        """One step."""
        return [PlannedStep("remove", f"remove template {request.template!r}")]

    async def run(self, work: Work[DeleteTemplate]) -> dict[str, Any]:
        """Remove it; a machine that was made of it meanwhile keeps it (Conflict)."""
        template_id = work.target_id
        async with work.step("remove", "remove it") as step:
            if not step.done_before:
                step.also(_tell, template_id, "template.deleted", work.operation_id)
                step.also(_remove, template_id)
        return {"template": template_id}


def _tell(session: Session, template_id: str, kind: str, operation: str) -> None:
    row = session.get(TemplateRow, template_id)
    if row is not None:
        add_event(session, kind, subject=row.id, name=row.name, operation=operation)


def _remove(session: Session, template_id: str | None) -> None:
    row = session.get(TemplateRow, template_id) if template_id is not None else None
    if row is not None:
        session.delete(row)

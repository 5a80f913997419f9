"""`/v1/machines`, `/v1/snapshots`: machines, what is done with them, what they say."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from vmlab.machine.documents import build
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.states import MachineState
from vmlab.manager import requests
from vmlab.manager.api.changing import ANSWERS, Asked, route_of_change
from vmlab.manager.api.problems import documented
from vmlab.manager.api.service import ASK_SECONDS, Here, Paging, told, version_of
from vmlab.manager.api.streaming import of_type
from vmlab.manager.documents import MachineDocument, OperationDocument, Page, SnapshotDocument
from vmlab.manager.store import queries

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["machines"])

Name = Annotated[str, Path(description="name or id of the machine")]


@router.get("/machines", response_model=Page[MachineDocument], responses=documented())
async def list_machines(
    *,
    here: Here,
    paging: Paging,
    state: Annotated[list[MachineState] | None, Query(description="in one of these states")] = None,
    label: Annotated[str | None, Query(description='"key" or "key=value"')] = None,
    host: str | None = None,
    name: Annotated[str | None, Query(description="* and ? stand for any characters")] = None,
    template: str | None = None,
) -> Response:
    """Machines, by name."""
    return told(
        await here.manager.database.read(
            queries.list_machines,
            state=state,
            label=label,
            host=host,
            name=name,
            template=template,
            **paging.arguments(),
        )
    )


route_of_change(router, "/machines", requests.CreateMachine, name="create_machine")


@router.get("/machines/{machine}", response_model=MachineDocument, responses=documented(404))
async def show_machine(here: Here, machine: Name) -> Response:
    """One machine; its ETag is its version."""
    document = await here.manager.database.read(
        lambda s: queries.machine_document(s, queries.find_machine(s, machine))
    )
    return told(document, headers=version_of(document))


@router.delete(
    "/machines/{machine}", status_code=202, response_model=OperationDocument, responses=ANSWERS
)
async def delete_machine(
    change: Asked,
    machine: Name,
    force: Annotated[bool, Query(description="kill it first if it is live")] = False,
) -> Response:
    """Remove it with the storage that is its own."""
    return await change.submit(build(requests.DeleteMachine, {"machine": machine, "force": force}))


for _action, _model in {
    "start": requests.StartMachine,
    "stop": requests.StopMachine,
    "restart": requests.RestartMachine,
    "pause": requests.PauseMachine,
    "resume": requests.ResumeMachine,
    "resize": requests.ResizeMachine,
    "snapshot": requests.SnapshotMachine,
    "restore": requests.RestoreMachine,
    "clone": requests.CloneMachine,
    "migrate": requests.MigrateMachine,
    "export": requests.ExportMachine,
}.items():
    route_of_change(
        router,
        f"/machines/{{machine}}/actions/{_action}",
        _model,
        noun="machine",
        name=f"{_action}_machine",
    )
route_of_change(
    router,
    "/machines/{machine}",
    requests.UpdateMachine,
    noun="machine",
    name="update_machine",
    method="PATCH",
)


# ------------------------------------------------------------------- snapshots


@router.get(
    "/snapshots",
    response_model=Page[SnapshotDocument],
    responses=documented(404),
    tags=["snapshots"],
)
async def list_snapshots(
    here: Here,
    paging: Paging,
    machine: Annotated[str | None, Query(description="name or id of the machine")] = None,
) -> Response:
    """Snapshots, the oldest first."""
    return told(
        await here.manager.database.read(
            queries.list_snapshots, machine=machine, **paging.arguments()
        )
    )


@router.delete(
    "/machines/{machine}/snapshots/{snapshot}",
    status_code=202,
    response_model=OperationDocument,
    responses=ANSWERS,
    tags=["snapshots"],
)
async def delete_snapshot(change: Asked, machine: Name, snapshot: str) -> Response:
    """Remove a snapshot."""
    return await change.submit(
        build(requests.DeleteSnapshot, {"machine": machine, "name": snapshot})
    )


# ------------------------------------------------------------------- what a machine says


@router.get(
    "/machines/{machine}/metrics",
    response_model=MachineMetrics,
    responses=documented(404, 409, 502, 504),
)
async def show_metrics(here: Here, machine: Name) -> Response:
    """What it uses now; it has to be live."""
    at_hypervisor = await here.machine(machine)
    return told(await at_hypervisor.metrics(timeout=ASK_SECONDS))


@router.get(
    "/machines/{machine}/console",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **documented(404, 502, 504),
    },
)
async def show_console(
    here: Here,
    machine: Name,
    console: Annotated[str, Query(alias="name", description="which one")] = "serial",
    tail: Annotated[int | None, Query(ge=0, description="only so many bytes of its end")] = None,
) -> Response:
    """What its console has printed since it was created, as it is."""
    at_hypervisor = await here.machine(machine)
    async with await at_hypervisor.console(console, timeout=ASK_SECONDS) as opened:
        printed = await (opened.log() if tail is None else opened.history(tail))
    return Response(printed, media_type="text/plain")


@router.get(
    "/machines/{machine}/screenshot",
    response_class=Response,
    responses=of_type("image/png", "The picture.") | documented(404, 409, 502, 504),
)
async def show_screen(here: Here, machine: Name) -> Response:
    """What its display shows."""
    at_hypervisor = await here.machine(machine)
    return Response(await at_hypervisor.screenshot(timeout=ASK_SECONDS), media_type="image/png")

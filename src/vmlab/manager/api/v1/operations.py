"""`/v1/operations`: every change, asked for in one place, followed, waited for and cancelled."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from vmlab.manager.api.changing import ANSWERS, LONGEST_WAIT, Asked, ended
from vmlab.manager.api.problems import documented
from vmlab.manager.api.service import Here, Paging, told
from vmlab.manager.documents import OperationDocument, OperationState, Page
from vmlab.manager.requests import Request as Wanted
from vmlab.manager.store import queries

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["operations"])

Operation = Annotated[str, Path(description="id of the operation, or how it begins")]


@router.get("/operations", response_model=Page[OperationDocument], responses=documented())
async def list_operations(
    here: Here,
    paging: Paging,
    state: Annotated[list[OperationState] | None, Query(description="in one of these")] = None,
    kind: Annotated[str | None, Query(description='such as "machine.*"')] = None,
    target: Annotated[str | None, Query(description="id or name of what it changes")] = None,
) -> Response:
    """Operations, the newest first."""
    return told(
        await here.manager.database.read(
            queries.list_operations, state=state, kind=kind, target=target, **paging.arguments()
        )
    )


@router.post("/operations", status_code=202, response_model=OperationDocument, responses=ANSWERS)
async def submit(change: Asked, body: Wanted) -> Response:
    """Ask for a change of any kind."""
    return await change.submit(body)


@router.get("/operations/{operation}", response_model=OperationDocument, responses=documented(404))
async def show_operation(
    here: Here,
    operation: Operation,
    wait: Annotated[
        float, Query(ge=0, le=LONGEST_WAIT, description="seconds to wait for its end")
    ] = 0.0,
) -> Response:
    """One operation: its steps, its progress, how it ended."""
    found = await here.manager.database.read(
        lambda s: queries.operation_document(s, queries.find_operation(s, operation))
    )
    return told(await ended(here, found, wait))


@router.post(
    "/operations/{operation}/cancel",
    status_code=202,
    response_model=OperationDocument,
    responses=documented(404, 409),
)
async def cancel_operation(here: Here, request: Request, operation: Operation) -> Response:
    """Have it undone and ended; it goes on until that is done."""
    found = await here.manager.database.read(lambda s: queries.find_operation(s, operation).id)
    request.state.operation = found
    return told(
        await here.manager.operator.cancel(found),
        status=202,
        headers={"Location": f"/v1/operations/{found}"},
    )

"""The pages of operations: those in progress with their steps, all of them, and one."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.manager.documents import UNDER_WAY, OperationDocument, OperationState, Page
from vmlab.manager.store import queries
from vmlab.manager.web.machines import PAGE
from vmlab.manager.web.visit import Pages, Visit

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["routes"]


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of these pages."""
    return [
        pages.get("/operations", operations),
        pages.get("/operations/{operation}", operation),
        pages.get("/operations/{operation}/said", said),
        pages.post("/operations/{operation}/cancel", cancel),
    ]


async def operations(visit: Visit) -> Response:
    """What is in progress, and what the filters leave of all."""
    filters = visit.filters("state", "kind", "target")
    under_way, page = await visit.read(_read, filters)
    return visit.page(
        "operations",
        under_way=under_way,
        page=page,
        filters=filters,
        states=get_args(OperationState),
        kinds=sorted(visit.manager.operator.kinds),
    )


def _read(
    session: Session, filters: dict[str, str | None]
) -> tuple[list[OperationDocument], Page[OperationDocument]]:
    under_way = queries.list_operations(session, state=UNDER_WAY, limit=PAGE).items
    page = queries.list_operations(session, **filters, limit=PAGE, count=True)
    return list(under_way), page


def _find(session: Session, key: str) -> OperationDocument:
    return queries.operation_document(session, queries.find_operation(session, key))


async def operation(visit: Visit) -> Response:
    """One operation, with its journal."""
    document = await visit.read(_find, visit.path("operation"))
    return visit.page("operation", operation=document)


async def said(visit: Visit) -> Response:
    """How far an operation is that was begun on some page, in a line for that page."""
    return visit.part(
        "said", operation=await visit.read(_find, visit.path("operation")), error=None
    )


async def cancel(visit: Visit) -> Response:
    """Have an operation cancelled."""
    document = await visit.manager.operator.cancel(visit.path("operation"))
    return visit.went_on(document, f"/ui/operations/{document.id}")

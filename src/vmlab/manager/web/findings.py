"""The page of findings: where store and world differ, the evidence, and what can be done."""

from __future__ import annotations

from typing import get_args

from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.manager import requests
from vmlab.manager.documents import Severity
from vmlab.manager.store import queries
from vmlab.manager.web.forms import made
from vmlab.manager.web.machines import PAGE
from vmlab.manager.web.visit import Pages, Visit

__all__ = ["routes"]


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of this page."""
    return [
        pages.get("/findings", findings),
        pages.post("/findings/{finding}/repair", repair),
    ]


async def findings(visit: Visit) -> Response:
    """The findings that the filters leave: the open ones, or those that are resolved."""
    filters = visit.filters("code", "severity", "resolved")
    page = await visit.read(
        queries.list_findings,
        code=filters["code"],
        severity=filters["severity"],
        resolved=filters["resolved"] is not None,
        cursor=filters["cursor"],
        limit=PAGE,
        count=True,
    )
    return visit.page(
        "findings",
        topics=("finding",),
        page=page,
        filters=filters,
        severities=get_args(Severity),
    )


async def repair(visit: Visit) -> Response:
    """Have something done about a finding; what would remove data needs its name."""
    operation = await visit.submit(
        made(
            requests.RepairFinding,
            finding=visit.path("finding"),
            action=visit.form.text("action"),
            name=visit.form.text("name"),
            undo=visit.form.flag("undo"),
        )
    )
    return visit.went_on(operation, "/ui/findings")

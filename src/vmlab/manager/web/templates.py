"""The page of templates: what machines are made of."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.manager import requests
from vmlab.manager.store import queries
from vmlab.manager.web.forms import made
from vmlab.manager.web.machines import PAGE, anywhere, image_names
from vmlab.manager.web.visit import Pages, Visit

__all__ = ["routes"]


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of this page."""
    return [
        pages.get("/templates", templates),
        pages.post("/templates", create_template),
        pages.post("/templates/{template}/delete", delete_template),
    ]


async def templates(visit: Visit) -> Response:
    """The templates of the store."""
    filters = visit.filters("name")
    page = await visit.read(
        queries.list_templates,
        name=anywhere(filters["name"]),
        cursor=filters["cursor"],
        limit=PAGE,
        count=True,
    )
    return visit.page(
        "templates",
        topics=("template", "machine"),
        page=page,
        filters=filters,
        images=await asyncio.to_thread(image_names),
    )


async def create_template(visit: Visit) -> Response:
    """Have a template kept."""
    form = visit.form
    operation = await visit.submit(
        made(
            requests.CreateTemplate,
            name=form.text("name"),
            image=form.text("image"),
            vcpus=form.whole("vcpus"),
            memory=form.text("memory"),
            labels=form.pairs("labels"),
        )
    )
    return visit.went_on(operation, "/ui/templates")


async def delete_template(visit: Visit) -> Response:
    """Have a template removed; refused while a machine was made of it."""
    operation = await visit.submit(requests.DeleteTemplate(template=visit.path("template")))
    return visit.went_on(operation, "/ui/templates")

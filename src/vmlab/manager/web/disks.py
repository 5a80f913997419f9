"""The page of disks: the list, a new one, and what is done with each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, get_args

from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.manager import requests
from vmlab.manager.documents import DiskDocument, DiskState, Page
from vmlab.manager.store import queries
from vmlab.manager.web.forms import made, names_itself
from vmlab.manager.web.machines import PAGE, anywhere
from vmlab.manager.web.visit import Pages, Visit

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["routes"]

_HERE: Final = "/ui/disks"
_SOURCES: Final = 200


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of this page."""
    return [
        pages.get("/disks", disks),
        pages.post("/disks", create_disk),
        pages.post("/disks/{disk}/actions", act),
    ]


async def disks(visit: Visit) -> Response:
    """The disks that the filters leave."""
    filters = visit.filters("name", "state")
    page, names = await visit.read(_read, filters)
    return visit.page(
        "disks",
        topics=("disk",),
        page=page,
        names=names,
        filters=filters,
        states=get_args(DiskState),
    )


def _read(session: Session, filters: dict[str, str | None]) -> tuple[Page[DiskDocument], list[str]]:
    page = queries.list_disks(
        session,
        name=anywhere(filters["name"]),
        state=filters["state"],
        cursor=filters["cursor"],
        limit=PAGE,
        count=True,
    )
    return page, [disk.name for disk in queries.list_disks(session, limit=_SOURCES).items]


async def create_disk(visit: Visit) -> Response:
    """Have a disk made."""
    form = visit.form
    operation = await visit.submit(
        made(
            requests.CreateDisk,
            name=form.text("name"),
            size=form.text("size"),
            source=form.text("source"),
            format=form.text("format"),
        )
    )
    return visit.went_on(operation, _HERE)


async def act(visit: Visit) -> Response:
    """Have something done with a disk: what the button that was pressed says."""
    form = visit.form
    disk = await visit.read(
        lambda session: queries.disk_document(
            session, queries.find_disk(session, visit.path("disk"))
        )
    )
    change: requests.Request
    match form.raw("action"):
        case "detach":
            change = requests.DetachDisk(disk=disk.id)
        case "resize":
            change = made(requests.ResizeDisk, disk=disk.id, size=form.text("size"))
        case "delete":
            names_itself(form, disk.name, "disk")
            change = requests.DeleteDisk(disk=disk.id)
        case other:
            raise InvalidSpec(
                [SpecProblem("action", other, "one of the page's buttons")], what="the form"
            )
    return visit.went_on(await visit.submit(change), _HERE)

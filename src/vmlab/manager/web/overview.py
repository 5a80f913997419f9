"""Pages about all of it: hosts, events, and the button that stops everything."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError
from vmlab.manager import requests
from vmlab.manager.store import queries
from vmlab.manager.web.forms import made
from vmlab.manager.web.machines import last_events
from vmlab.manager.web.visit import Pages, Visit, problems_of

__all__ = ["routes"]

NOUNS: Final = (
    "machine",
    "disk",
    "network",
    "address",
    "snapshot",
    "operation",
    "finding",
    "host",
    "template",
)
"""What events are of."""
_EVENTS: Final = 200


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of these pages."""
    return [
        pages.get("/hosts", hosts),
        pages.get("/events", events),
        pages.get("/emergency", emergency),
        pages.post("/emergency", stop),
    ]


async def hosts(visit: Visit) -> Response:
    """Where machines run, and what of it is taken."""
    page = await visit.read(queries.list_hosts)
    return visit.page("hosts", topics=("host", "machine"), hosts=page.items)


async def events(visit: Visit) -> Response:
    """What happened last."""
    filters = visit.filters("kind", "subject")
    kind = filters["kind"]
    found = await visit.read(
        last_events,
        _EVENTS,
        subject=filters["subject"],
        kind=None if kind is None else kind.removesuffix("*"),
    )
    return visit.page("events", topics=NOUNS, events=found, filters=filters, kinds=NOUNS)


async def emergency(visit: Visit, refusal: VmlabError | None = None, status: int = 200) -> Response:
    """What would be stopped, and a button that does it."""
    page = await visit.read(queries.list_hosts)
    return visit.page(
        "emergency",
        status=status,
        form=visit.form,
        error=refusal,
        problems=problems_of(refusal) if isinstance(refusal, InvalidSpec) else {},
        hosts=[host.name for host in page.items],
        counts={host.name: host.live for host in page.items if host.live},
    )


async def stop(visit: Visit) -> Response:
    """Kill what was chosen, and go on with what was done."""
    form = visit.form
    try:
        if not form.flag("sure"):
            problem = SpecProblem("sure", "", "a tick: that they are to be killed")
            raise InvalidSpec([problem], what="the form")
        operation = await visit.submit(
            made(requests.EmergencyStop, host=form.text("host"), label=form.text("label"))
        )
    except VmlabError as refusal:
        return await emergency(visit, refusal, visit.status_of(refusal))
    return visit.see(f"/ui/operations/{operation.id}")

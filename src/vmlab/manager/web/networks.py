"""The pages of networks: the list, a new one, and one with the addresses that are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.manager import requests
from vmlab.manager.documents import AddressDocument, NetworkDocument, Page
from vmlab.manager.store import queries
from vmlab.manager.web.forms import made, names_itself
from vmlab.manager.web.machines import PAGE, anywhere
from vmlab.manager.web.visit import Pages, Visit

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["routes"]

_TOPICS = ("network", "address")


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of these pages."""
    return [
        pages.get("/networks", networks),
        pages.post("/networks", create_network),
        pages.get("/networks/{network}", network),
        pages.post("/networks/{network}/delete", delete_network),
    ]


async def networks(visit: Visit) -> Response:
    """The networks of the store."""
    filters = visit.filters("name")
    page = await visit.read(
        queries.list_networks,
        name=anywhere(filters["name"]),
        cursor=filters["cursor"],
        limit=PAGE,
        count=True,
    )
    return visit.page("networks", topics=_TOPICS, page=page, filters=filters)


async def create_network(visit: Visit) -> Response:
    """Have a network made."""
    form = visit.form
    operation = await visit.submit(
        made(
            requests.CreateNetwork,
            name=form.text("name"),
            mode=form.text("mode"),
            vlan=form.whole("vlan"),
            bridge=form.text("bridge"),
            subnet=form.text("subnet"),
            subnet6=form.text("subnet6"),
            gateway=form.text("gateway"),
            dns=form.raw("dns").split(),
            ranges=form.raw("ranges").split(),
            reserved=form.raw("reserved").split(),
            dhcp=form.flag("dhcp"),
        )
    )
    return visit.went_on(operation, "/ui/networks")


async def network(visit: Visit) -> Response:
    """One network, with the addresses that are taken of it."""
    filters = visit.filters()
    document, page = await visit.read(_read, visit.path("network"), filters["cursor"])
    return visit.page("network", topics=_TOPICS, network=document, page=page, filters=filters)


def _read(
    session: Session, key: str, cursor: str | None
) -> tuple[NetworkDocument, Page[AddressDocument]]:
    row = queries.find_network(session, key)
    page = queries.list_addresses(session, network=row.id, cursor=cursor, limit=PAGE)
    return queries.network_document(session, row), page


async def delete_network(visit: Visit) -> Response:
    """Have a network removed whose name was typed."""
    document, _ = await visit.read(_read, visit.path("network"), None)
    names_itself(visit.form, document.name, "network")
    operation = await visit.submit(requests.DeleteNetwork(network=document.id))
    return visit.went_on(operation, "/ui/networks")

"""What all routes have in common: the manager they speak for, and how much they may be asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import Depends, Query
from pydantic import BaseModel
from starlette.requests import HTTPConnection
from starlette.responses import Response

from vmlab.machine.errors import InvalidState
from vmlab.machine.states import MachineState
from vmlab.manager.api.limits import Limits, Places
from vmlab.manager.api.meters import Meters
from vmlab.manager.api.security import Authenticator, Principal
from vmlab.manager.store.pages import LARGEST_PAGE
from vmlab.manager.store.queries import find_machine

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from vmlab.hypervisors.base import Machine
    from vmlab.manager.manager import Manager

__all__ = ["ASK_SECONDS", "Here", "Paging", "Service", "Who", "told", "version_of"]

ASK_SECONDS: Final = 30.0
"""Seconds that a hypervisor is given to answer a question that somebody waits for."""


@dataclass(slots=True)
class Service:
    """The service of one manager.

    Args:
        manager: Whose service it is.
        authenticator: Finds out whose a token is; None where nobody is asked for one.
        limits: How much is taken of one client.
        meters: What Prometheus is told.
        streams: Places for what stays open: event streams, consoles, commands.
        terminals: Ids of machines whose terminal is in use.
        closing: Set when the service ends, so that what stays open ends too.
    """

    manager: Manager
    authenticator: Authenticator | None
    limits: Limits
    meters: Meters
    streams: Places
    terminals: set[str] = field(default_factory=set)
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def machine_id(self, name_or_id: str) -> str:
        """The id of a machine.

        Raises:
            MachineNotFound: there is none of that name or id.
        """
        return await self.manager.database.read(lambda s: find_machine(s, name_or_id).id)

    async def running_machine(self, name_or_id: str, what: str) -> str:
        """The id of a machine that has to run for something.

        Args:
            name_or_id: Of the machine.
            what: What it has to run for: "copy files of".

        Raises:
            MachineNotFound: there is none of that name or id.
            InvalidState: it does not run.
        """

        def look(session: Session) -> tuple[str, str, str]:
            row = find_machine(session, name_or_id)
            return row.id, row.name, row.state

        id_, name, state = await self.manager.database.read(look)
        if state != MachineState.RUNNING:
            raise InvalidState(
                what,
                expected=(MachineState.RUNNING.value,),
                actual=state,
                machine=name,
                hint=f"`vmlab start {name}` starts it",
            )
        return id_

    async def machine(self, name_or_id: str) -> Machine:
        """A machine as its hypervisor has it.

        Raises:
            MachineNotFound: there is none of that name or id, or none at its hypervisor.
            HypervisorUnavailable: its host cannot be asked.
        """
        return await self.manager.machine(await self.machine_id(name_or_id))


async def _service(connection: HTTPConnection) -> Service:
    found: Service = connection.app.state.service
    return found


async def _principal(connection: HTTPConnection) -> Principal:
    found: Principal = connection.state.principal
    return found


Here = Annotated[Service, Depends(_service)]
"""The service, for a route."""
Who = Annotated[Principal, Depends(_principal)]
"""Who asks, for a route."""


@dataclass(frozen=True, slots=True)
class _Paging:
    limit: int
    cursor: str | None
    count: bool

    def arguments(self) -> dict[str, Any]:
        """As the functions of `store.queries` take them."""
        return {"limit": self.limit, "cursor": self.cursor, "count": self.count}


async def _paging(
    limit: Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="items at most")] = 100,
    cursor: Annotated[
        str | None, Query(max_length=4096, description="`next` of the page before")
    ] = None,
    count: Annotated[bool, Query(description="count all of them, too, in `total`")] = False,
) -> _Paging:
    return _Paging(limit, cursor, count)


Paging = Annotated[_Paging, Depends(_paging)]
"""Which part of a list is wanted, for a route."""


def told(
    document: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A document as a reply."""
    return Response(
        document.model_dump_json().encode(),
        status_code=status,
        headers=dict(headers) if headers else None,
        media_type="application/json",
    )


def version_of(document: Any) -> dict[str, str]:
    """The header that says which version of it a document is (RFC 9110, 8.8.3)."""
    return {"ETag": f'"{document.version}"'}

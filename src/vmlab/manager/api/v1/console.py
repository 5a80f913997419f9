"""`WS /v1/machines/{machine}/console`: a console both ways, bytes as they are.

What is typed may come as binary or text messages. The log of what was printed before is a GET of
the same path; `history` sends the end of it first, 512 KiB of it at most.
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Query
from starlette.websockets import WebSocket

from vmlab.hypervisors.base import Console
from vmlab.manager.api.service import ASK_SECONDS, Here
from vmlab.manager.api.sockets import Link, linked, until_first

__all__ = ["router"]

router = APIRouter(prefix="/v1")

_HISTORY: Final = 1 << 19
"""Bytes of what was printed before that are sent at most: many clients take 1 MiB at once."""


@router.websocket("/machines/{machine}/console")
async def use_console(
    socket: WebSocket,
    here: Here,
    machine: str,
    console: Annotated[str, Query(alias="name")] = "serial",
    history: Annotated[int, Query(ge=0)] = 0,
) -> None:
    """Follow a console and type on it."""
    at_hypervisor = await here.machine(machine)
    async with (
        await at_hypervisor.console(console, timeout=ASK_SECONDS) as opened,
        linked(here, socket) as link,
    ):
        if history:
            await link.send(await opened.history(min(history, _HISTORY)))
        await until_first(here, lambda: _print(opened, link), lambda: _type(opened, link))


async def _print(console: Console, link: Link) -> None:
    """What it prints, until it ends."""
    while data := await console.read():
        await link.send(data)


async def _type(console: Console, link: Link) -> None:
    """What is typed, until nobody is there who types."""
    while True:
        typed = await link.receive()
        data = typed.encode() if isinstance(typed, str) else typed
        if data:
            await console.write(data)

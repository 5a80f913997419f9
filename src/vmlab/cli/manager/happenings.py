"""``vmlab events``: what has happened, and what happens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli.manager.connecting import ask
from vmlab.cli.output import JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import EventDocument

__all__ = ["events"]

_PAGE = 1000
"""Events that are asked for at once."""


def events(
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")
    ] = False,
    after: Annotated[
        int | None, typer.Option("--after", min=0, help="Only after the event of this number.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help='Only of this kind, such as "machine.*".')
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="Only of this machine, disk, ... (name or id).")
    ] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", min=0, help="Only so many of the last.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Tell what has happened; with --follow what happens, without a gap in between.

    --json prints one object a line. What is older than what the manager keeps is gone.
    """

    async def asking(client: AsyncClient) -> None:
        seen = after
        past: list[EventDocument] = []
        while page := await client.past_events(seen, limit=_PAGE, kind=kind, subject=subject):
            past += page
            seen = page[-1].id
            if tail is None:
                _tell(past, as_json)
                past.clear()
        _tell(past[max(0, len(past) - tail) :] if tail is not None else past, as_json)
        if follow:
            async for event in client.events(seen or 0, kind=kind, subject=subject):
                _tell([event], as_json)

    ask(asking)


def _tell(happened: list[EventDocument], as_json: bool) -> None:
    for event in happened:
        if as_json:
            print(event.model_dump_json())
        else:
            print(_line(event))
    # Whoever reads this in a pipe waits for it.
    sys.stdout.flush()


def _line(event: EventDocument) -> str:
    """One event, for people."""
    details = _details(event)
    when = event.at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    what = event.name or event.subject or ""
    return f"{event.id:6} {when} {event.kind:<20} {what}{'  ' + details if details else ''}"


def _details(event: EventDocument) -> str:
    """What an event tells beside its kind, in a few words."""
    from vmlab.report import escape_controls

    words = [
        f"{key}={value}"
        for key, value in event.data.items()
        if isinstance(value, str | int | float) and value != ""
    ]
    return escape_controls(" ".join(words))

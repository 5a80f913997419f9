"""``vmlab events``: what has happened, and what happens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vmlab.cli.manager.connecting import ask
from vmlab.cli.output import JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import EventDocument

__all__ = ["events"]

_PAGE: Final = 1000
"""Events that are asked for at once."""
_TAIL: Final = 10
"""Events that stand before those that are followed, as tail(1) and journalctl(1) have it."""


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
        int | None,
        typer.Option(
            "--tail", "-n", min=0, help="Only so many of the last; with --follow 10 if left out."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Tell what has happened; with --follow what happens, without a gap in between.

    --follow begins with the last 10, with --tail 0 with what happens from now on, and with --after
    where somebody left off. --json prints one object a line. What is older than what the manager
    keeps is gone.
    """
    if tail is None and follow and after is None:
        tail = _TAIL

    async def asking(client: AsyncClient) -> None:
        if tail is None:
            seen = await _tell_all(client, after or 0, kind, subject, as_json)
        else:
            # What is followed is what comes after all that there is now, whatever its kind.
            newest = [event.id for event in await client.past_events(latest=True, limit=1)]
            last = await _last(client, tail, after, kind, subject)
            _tell(last, as_json)
            seen = max([after or 0, *newest, *(event.id for event in last[-1:])])
        if follow:
            async for event in client.events(seen, kind=kind, subject=subject):
                _tell([event], as_json)

    ask(asking)


async def _tell_all(
    client: AsyncClient, after: int, kind: str | None, subject: str | None, as_json: bool
) -> int:
    """Tell every event after one, page by page; returns the number of the last."""
    while page := await client.past_events(after, limit=_PAGE, kind=kind, subject=subject):
        _tell(page, as_json)
        after = page[-1].id
    return after


async def _last(
    client: AsyncClient, count: int, after: int | None, kind: str | None, subject: str | None
) -> list[EventDocument]:
    """The last so many events after one, from the newest page back."""
    found: list[EventDocument] = []
    while len(found) < count:
        page = await client.past_events(
            after,
            before=found[0].id if found else None,
            latest=True,
            limit=min(_PAGE, count - len(found)),
            kind=kind,
            subject=subject,
        )
        if not page:
            break
        found[:0] = page
    return found


def _tell(happened: Sequence[EventDocument], as_json: bool) -> None:
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

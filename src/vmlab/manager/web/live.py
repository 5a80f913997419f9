"""What tells an open page that something happened that concerns it (HTML, 9.2 Server-sent events).

One event, `news`, however much happened at once: the page then asks for its region anew. Each has
the number of the last event that it stands for, so that a page that lost its connection is told
what it missed, or that something may have been.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.manager.api.streaming import EVENT_STREAM, streamed
from vmlab.manager.store.failures import EventsGone
from vmlab.manager.web.rendering import headers
from vmlab.manager.web.visit import Pages, Visit

if TYPE_CHECKING:
    from vmlab.manager.api.service import Service
    from vmlab.manager.store.events import EventStream, Subscription

__all__ = ["routes"]

_GATHER_SECONDS: Final = 0.2
"""What happens within it is told at once."""
_STILL_SECONDS: Final = 15.0
"""A connection on which nothing is said for so long is given a comment, or is found dead."""


def routes(pages: Pages) -> list[BaseRoute]:
    """The route of it."""
    return [pages.get("/live", live)]


async def live(visit: Visit) -> Response:
    """The news for a page whose query says of what nouns, after which event."""
    topics = frozenset((visit.query("topics") or "").split(","))
    said = visit.request.headers.get("last-event-id") or visit.query("after") or ""
    after = int(said) if said.isdecimal() and said.isascii() and len(said) < 19 else None
    service: Service = visit.request.app.state.service
    return await streamed(
        visit.request,
        _told(visit.manager.database.events, topics, after, service),
        media_type=EVENT_STREAM,
        headers=headers(),
    )


@dataclass
class _News:
    """What a reader of events has for the page."""

    latest: int
    waiting: bool = False
    over: bool = False


async def _told(
    events: EventStream, topics: frozenset[str], after: int | None, service: Service
) -> AsyncGenerator[bytes]:
    """The lines of the stream; it ends with the service."""
    with service.streams.place():
        subscription, news = _subscribed(events, after)
        changed = asyncio.Event()
        reader = asyncio.ensure_future(_read(subscription, topics, news, changed))
        ending = asyncio.ensure_future(service.closing.wait())
        try:
            yield b"retry: 1000\n\n"
            while not (news.over or ending.done()):
                if news.waiting:
                    news.waiting = False
                    yield f"event: news\nid: {news.latest}\ndata: {news.latest}\n\n".encode()
                    await asyncio.wait({ending}, timeout=_GATHER_SECONDS)
                    continue
                changed.clear()
                waiter = asyncio.ensure_future(changed.wait())
                try:
                    done, _ = await asyncio.wait(
                        {waiter, ending},
                        timeout=_STILL_SECONDS,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    waiter.cancel()
                if not done:
                    yield b": still here\n\n"
        finally:
            subscription.close()
            for task in (reader, ending):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def _subscribed(events: EventStream, after: int | None) -> tuple[Subscription, _News]:
    """A subscription after an event; where that is not kept any more, there is news at once."""
    if after is not None:
        with suppress(EventsGone):
            return events.subscribe(after), _News(after)
    subscription = events.subscribe()
    return subscription, _News(subscription.position, waiting=True)


async def _read(
    subscription: Subscription, topics: frozenset[str], news: _News, changed: asyncio.Event
) -> None:
    """Note what happens that the page is to be told of."""
    try:
        async for event in subscription:
            if event.kind.partition(".")[0] in topics:
                news.latest, news.waiting = event.id, True
                changed.set()
    except EventsGone:
        # So much happened that some of it is gone: the page asks for everything anyway, and the
        # browser connects again.
        news.waiting = True
    news.over = not news.waiting
    changed.set()

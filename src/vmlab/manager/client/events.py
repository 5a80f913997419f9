"""Events as they happen: server-sent events (HTML, 9.2), read from where the last reader was.

A connection that breaks is made again and goes on after the last event that was read; events that
are kept no more are `EventsGone`, after which everything has to be read anew.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Final

import httpx

from vmlab.manager.client.replies import Unreachable, told
from vmlab.manager.client.sending import Sender, path_of
from vmlab.manager.documents import EventDocument
from vmlab.manager.store.failures import EventsGone

__all__ = ["follow", "messages"]

_PAUSE: Final = 0.5
"""Seconds before a connection that broke is made again."""
_ATTEMPTS: Final = 10
"""Connections that break before an event came over them, in a row, before it is given up."""


async def messages(response: httpx.Response) -> AsyncGenerator[tuple[str, str, str], None]:
    """The messages of a stream: its event, its id and its data; comments are left out.

    One without data only says where the stream is.
    """
    event, id_, data, said = "message", "", list[str](), False
    async for line in response.aiter_lines():
        if not line:
            if said:
                yield event, id_, "\n".join(data)
            event, data, said = "message", [], False
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                event = value
            case "id":
                id_, said = value, True
            case "data":
                data.append(value)
                said = True


async def follow(
    sender: Sender, after: int | None, query: Mapping[str, str | None]
) -> AsyncIterator[EventDocument]:
    """Every event after one, as it happens, without an end.

    Args:
        sender: The manager.
        after: Number of the last event that is known; None begins with the next one.
        query: What to leave out.

    Raises:
        EventsGone: there are events after that one which are kept no more.
        Unreachable: no manager answers.
    """
    failures = 0
    while True:
        headers = {"Accept": "text/event-stream"}
        if after is not None:
            headers["Last-Event-ID"] = str(after)
        try:
            async with (
                sender.stream(path_of("events"), query=query, headers=headers) as response,
                aclosing(messages(response)) as arriving,
            ):
                async for kind, id_, data in arriving:
                    if not data:
                        after = int(id_) if id_.isdecimal() else after
                        continue
                    failures = 0
                    if kind == "resync":
                        raise _gone(after, data)
                    event = told(EventDocument, data.encode(), sender.address)
                    after = event.id
                    yield event
        except Unreachable:
            failures += 1
            if failures >= _ATTEMPTS:
                raise
        await asyncio.sleep(_PAUSE)


def _gone(after: int | None, data: str) -> EventsGone:
    """What a `resync` says: the events between are gone."""
    try:
        said = json.loads(data)
    except ValueError:
        said = {}
    numbers = said if isinstance(said, dict) else {}
    return EventsGone(
        after or 0, oldest=int(numbers.get("oldest") or 0), latest=int(numbers.get("latest") or 0)
    )

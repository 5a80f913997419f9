"""`/v1/events`: what happened, as pages or as a stream of server-sent events (HTML, 9.2).

The id of a message is the number of its event, so a browser that reconnects goes on where it was
(`Last-Event-ID`). Whoever was away for too long is sent one `resync` with the numbers of the oldest
and the latest event, reads everything anew, and is told what comes after the latest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.fields import LARGEST
from vmlab.manager.api.problems import documented
from vmlab.manager.api.service import Here, Service, told
from vmlab.manager.api.streaming import EVENT_STREAM, streamed
from vmlab.manager.documents import EventDocument, Page
from vmlab.manager.store import queries
from vmlab.manager.store.failures import EventsGone
from vmlab.manager.store.pages import LARGEST_PAGE

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["events"])

_KEEP_ALIVE_SECONDS: Final = 15.0
"""After so long without an event a comment is sent, or proxies think that nobody is there."""


@router.get(
    "/events",
    response_model=Page[EventDocument],
    responses={
        200: {
            "description": "A page; or, to who accepts text/event-stream, a stream without an end.",
            "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
        },
        **documented(),
    },
)
async def list_events(
    *,
    request: Request,
    here: Here,
    after: Annotated[
        int | None, Query(ge=0, le=LARGEST, description="number of the event before the first")
    ] = None,
    before: Annotated[
        int | None, Query(ge=0, le=LARGEST, description="number of the event after the last")
    ] = None,
    latest: Annotated[
        bool, Query(description="the last ones if a page has no room for all; `next` goes before")
    ] = False,
    limit: Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="of a page")] = 100,
    kind: Annotated[str | None, Query(description='such as "machine.*"')] = None,
    subject: Annotated[str | None, Query(description="id or name of what it happened to")] = None,
    last: Annotated[
        str | None,
        Header(alias="Last-Event-ID", description="as `after`, of a stream that is read again"),
    ] = None,
) -> Response:
    """Events in their order; a stream of them goes on from `after`, or from now."""
    if EVENT_STREAM not in request.headers.get("accept", ""):
        page = await here.manager.database.read(
            queries.list_events,
            after=after or 0,
            before=before,
            latest=latest,
            limit=limit,
            kind=kind,
            subject=subject,
        )
        return told(page)
    if last:
        after = _number(last)
    return await streamed(
        request, _told_as_they_come(here, after, kind, subject), media_type=EVENT_STREAM
    )


def _number(last: str) -> int:
    if not (last.isascii() and last.isdigit() and len(last) < 20 and int(last) <= LARGEST):
        raise InvalidSpec(
            [SpecProblem("Last-Event-ID", last, "the number of an event")], what="the request"
        )
    return int(last)


def _message(event: str, number: int, data: str) -> bytes:
    """One message of a stream; `data` is a line."""
    return f"event: {event}\nid: {number}\ndata: {data}\n\n".encode()


async def _told_as_they_come(
    here: Service, after: int | None, kind: str | None, subject: str | None
) -> AsyncGenerator[bytes]:
    stream = here.manager.database.events
    # What happens while the first bytes are on their way is told, too.
    after = stream.latest() if after is None else after
    with here.streams.place(), here.meters.streams.track_inprogress():
        # Headers go out with the first bytes: who waits for them knows then that it listens. An id
        # without data is no message, and where who connects again goes on (HTML, 9.2.6).
        yield f": the manager's events\nid: {after}\n\n".encode()
        while not here.closing.is_set():
            try:
                async with aclosing(_pieces(here, after, kind, subject)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except EventsGone as gone:
                after = stream.latest()
                numbers = {"oldest": gone.oldest, "latest": after}
                yield _message("resync", after, json.dumps(numbers))


async def _pieces(
    here: Service, after: int | None, kind: str | None, subject: str | None
) -> AsyncGenerator[bytes]:
    """The messages of a stream until the service ends, with a comment wherever it is quiet."""
    closing = asyncio.ensure_future(here.closing.wait())
    coming: asyncio.Task[EventDocument] | None = None
    try:
        async with here.manager.database.events.subscribe(after) as events:
            while not closing.done():
                coming = coming or asyncio.ensure_future(events.__anext__())
                waiting: set[asyncio.Future[Any]] = {coming, closing}
                await asyncio.wait(
                    waiting,
                    timeout=_KEEP_ALIVE_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if coming.done():
                    try:
                        event = coming.result()
                    except StopAsyncIteration:
                        return
                    coming = None
                    if _meant(event, kind, subject):
                        yield _message(event.kind, event.id, event.model_dump_json())
                elif not closing.done():
                    yield b": still here\n\n"
    finally:
        for task in (closing, coming):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait({task})


def _meant(event: EventDocument, kind: str | None, subject: str | None) -> bool:
    if kind is not None and not fnmatchcase(event.kind, kind.replace("[", "[[]")):
        return False
    return subject is None or subject in (event.subject, event.name)

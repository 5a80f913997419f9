"""Replies that come piece by piece: what they hold is let go however they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from vmlab.manager.api.limits import Places
from vmlab.manager.api.meters import Meters
from vmlab.manager.api.problems import TooFast
from vmlab.manager.api.streaming import EVENT_STREAM, streamed
from vmlab.manager.api.v1.events import _told_as_they_come
from vmlab.manager.documents import EventDocument
from vmlab.manager.store.events import EventStream

Message = dict[str, Any]


def request() -> Request:
    return Request({"type": "http", "method": "GET", "headers": [], "state": {}})


async def pieces(places: Places) -> AsyncGenerator[bytes]:
    with places.place():
        for piece in (b"a", b"b", b"c"):
            yield piece


async def ask(places: Places, *, gone: bool) -> list[Message]:
    """What is sent to who asks for the pieces, who may have gone before the first of them."""
    sent: list[Message] = []
    asked = request()
    reply = await streamed(asked, pieces(places), media_type=EVENT_STREAM)
    assert places.taken == 1
    assert asked.state.streaming

    async def receive() -> Message:
        if not gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await reply({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    return sent


def test_all_pieces_come_and_what_they_held_is_free_again() -> None:
    places = Places(1, "streams")
    begun, *rest = asyncio.run(ask(places, gone=False))
    assert (b"x-accel-buffering", b"no") in begun["headers"]
    assert b"".join(message["body"] for message in rest) == b"abc"
    assert places.taken == 0


def test_who_has_gone_before_the_first_piece_keeps_no_place() -> None:
    places = Places(1, "streams")
    asyncio.run(ask(places, gone=True))
    assert places.taken == 0


def test_a_refusal_comes_before_the_reply_begins() -> None:
    async def refused() -> None:
        asked = request()
        with pytest.raises(TooFast):
            await streamed(asked, pieces(Places(0, "streams")), media_type=EVENT_STREAM)
        assert not hasattr(asked.state, "streaming")

    asyncio.run(refused())


def test_what_happens_while_the_first_bytes_are_sent_is_told_too() -> None:
    async def story() -> None:
        events = EventStream(lambda after, limit: asyncio.sleep(0, ()), oldest=1, latest=0)
        here: Any = SimpleNamespace(
            manager=SimpleNamespace(database=SimpleNamespace(events=events)),
            streams=Places(1, "streams"),
            meters=Meters(),
            closing=asyncio.Event(),
        )
        async with aclosing(_told_as_they_come(here, None, None, None)) as stream:
            assert (await anext(stream)).startswith(b":")
            happened = EventDocument(id=1, at=datetime.now(UTC), kind="machine.created")
            events.publish([happened], oldest=1)
            async with asyncio.timeout(60):
                assert b"id: 1" in await anext(stream)

    asyncio.run(story())

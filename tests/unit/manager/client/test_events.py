"""Events without a gap: over a stream, across connections that break, until they are gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import httpx
import pytest
from tests.unit.manager.client.conftest import Story

from vmlab.manager.client import AsyncClient, Unreachable
from vmlab.manager.client.address import Address
from vmlab.manager.client.events import follow, messages
from vmlab.manager.client.sending import Sender
from vmlab.manager.store.failures import EventsGone


def event(number: int) -> str:
    data = {"id": number, "at": "2026-11-21T12:00:00Z", "kind": "machine.state"}
    return f"event: machine.state\nid: {number}\ndata: {json.dumps(data)}\n\n"


class Stream(httpx.AsyncByteStream):
    """What a service sends, and how its connection ends."""

    def __init__(self, text: str, end: Exception | None) -> None:
        self._text = text
        self._end = end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._text.encode()
        if self._end is not None:
            raise self._end


def followed(
    monkeypatch: pytest.MonkeyPatch,
    *connections: tuple[str, Exception | None],
    count: int,
    after: int | None = 3,
) -> tuple[list[int], list[str | None]]:
    """The numbers of the first `count` events, and where each connection was begun."""
    monkeypatch.setattr("vmlab.manager.client.events._PAUSE", 0)
    begun: list[str | None] = []
    left = list(connections)

    def answer(request: httpx.Request) -> httpx.Response:
        begun.append(request.headers.get("Last-Event-ID"))
        assert request.headers["Accept"] == "text/event-stream"
        text, end = left.pop(0) if left else ("", httpx.ReadError("broken"))
        return httpx.Response(200, stream=Stream(text, end))

    async def following() -> list[int]:
        sender = Sender(Address("http://localhost"), transport=httpx.MockTransport(answer))
        seen: list[int] = []
        try:
            async with aclosing(follow(sender, after, {"kind": None})) as stream:  # type: ignore[type-var]
                async for each in stream:
                    seen.append(each.id)
                    if len(seen) == count:
                        break
        finally:
            await sender.close()
        return seen

    return asyncio.run(following()), begun


def test_a_broken_connection_goes_on_after_the_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, begun = followed(
        monkeypatch,
        (event(4) + event(5), httpx.ReadError("broken")),
        (": quiet\n\n", None),
        (event(6) + event(7), None),
        count=4,
    )
    assert seen == [4, 5, 6, 7]
    assert begun == ["3", "5", "5"]


def test_a_connection_that_broke_before_the_first_event_goes_on_where_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, begun = followed(
        monkeypatch,
        (": the manager's events\nid: 8\n\n", httpx.ReadError("broken")),
        (": the manager's events\nid: 8\n\n" + event(9), None),
        count=1,
        after=None,
    )
    assert seen == [9]
    assert begun == [None, "8"]


def test_half_an_event_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, begun = followed(
        monkeypatch,
        (event(4) + event(5)[:-2], httpx.ReadError("broken")),
        (event(5), None),
        count=2,
    )
    assert seen == [4, 5]
    assert begun == ["3", "4"]


def test_events_that_are_gone_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = 'event: resync\nid: 90\ndata: {"oldest": 50, "latest": 90}\n\n'
    with pytest.raises(EventsGone) as raised:
        followed(monkeypatch, (gone, None), count=1)
    assert (raised.value.oldest, raised.value.latest) == (50, 90)


def test_a_manager_that_is_gone_for_good_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unreachable):
        followed(monkeypatch, count=1)


def test_messages_of_many_lines_and_other_fields() -> None:
    text = "retry: 5\nid: 1\ndata: a\ndata:b\n\n: comment\n\ndata: c\n\n"

    async def read() -> list[tuple[str, str, str]]:
        response = httpx.Response(200, stream=Stream(text, None))
        return [each async for each in messages(response)]

    assert asyncio.run(read()) == [("message", "1", "a\nb"), ("message", "1", "c")]


def test_a_live_manager_tells_what_happens(tell_over_socket: Callable[[Story], None]) -> None:
    async def story(client: AsyncClient) -> None:
        seen: list[str] = []

        async def following() -> None:
            async for each in client.events(0, kind="disk.*"):
                seen.append(each.kind)
                if each.kind == "disk.deleted":
                    return

        task = asyncio.ensure_future(following())
        await client.disks.create("data", size="1M")
        await client.disks.delete("data")
        await asyncio.wait_for(task, 120)
        assert seen == ["disk.created", "disk.deleted"]

    tell_over_socket(story)

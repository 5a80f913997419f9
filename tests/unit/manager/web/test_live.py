"""What an open page is told: that something happened, once however much it was."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.manager.api.limits import Places
from vmlab.manager.api.problems import TooFast
from vmlab.manager.documents import EventDocument
from vmlab.manager.store.events import EventStream
from vmlab.manager.web import live

WAIT = 120.0


class Store:
    """Events as the store has them."""

    def __init__(self) -> None:
        self.kept: list[EventDocument] = []
        self.events = EventStream(self._load, oldest=1, latest=0)
        self.service: Any = SimpleNamespace(streams=Places(2, "streams"), closing=asyncio.Event())

    async def _load(self, after: int, limit: int) -> Sequence[EventDocument]:
        return [event for event in self.kept if event.id > after][:limit]

    def happen(self, *kinds: str, oldest: int = 1) -> None:
        """Have things happen."""
        first = self.events.latest() + 1
        new = [
            EventDocument(id=first + n, at=datetime.now(UTC), kind=kind)
            for n, kind in enumerate(kinds)
        ]
        self.kept += new
        self.events.publish(new, oldest=oldest)

    def told(self, after: int | None, *topics: str) -> Any:
        """The stream of a page that is interested in those nouns."""
        return aclosing(live._told(self.events, frozenset(topics), after, self.service))


async def news(stream: Any) -> str:
    """The next thing that is no comment."""
    async with asyncio.timeout(WAIT):
        async for piece in stream:
            if not piece.startswith((b":", b"retry")):
                return piece.decode()
    return "over"


def run(test: Any) -> None:
    async def whole() -> None:
        await test(Store())

    asyncio.run(whole())


def test_a_page_is_told_what_happened_since_it_was_made() -> None:
    async def test(store: Store) -> None:
        store.happen("machine.created", "machine.state")
        async with store.told(1, "machine") as stream:
            assert await news(stream) == "event: news\nid: 2\ndata: 2\n\n"
            store.happen("disk.created", "machine.state", "machine.state", "disk.created")
            assert "id: 5" in await news(stream), "what happens at once is told at once"

    run(test)


def test_a_page_is_not_told_what_does_not_concern_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_STILL_SECONDS", 0.001)

    async def test(store: Store) -> None:
        async with store.told(0, "machine") as stream:
            assert await anext(stream) == b"retry: 1000\n\n"
            store.happen("disk.created")
            for _ in range(20):
                assert await anext(stream) == b": still here\n\n"

    run(test)


@pytest.mark.parametrize("after", [None, 1, 99])
def test_a_page_that_is_too_old_is_told_to_look(after: int | None) -> None:
    async def test(store: Store) -> None:
        store.happen("disk.created", "disk.created", "disk.created", oldest=3)
        async with store.told(after, "machine") as stream:
            assert "id: 3" in await news(stream)

    run(test)


def test_the_stream_ends_with_the_service_and_gives_its_place_back() -> None:
    async def test(store: Store) -> None:
        async with store.told(0, "machine") as first, store.told(0, "machine") as second:
            await anext(first)
            await anext(second)
            assert store.service.streams.taken == 2
            async with store.told(0) as third:
                with pytest.raises(TooFast):
                    await anext(third)
            store.service.closing.set()
            assert await news(first) == "over"
        assert store.service.streams.taken == 0

    run(test)


def test_the_stream_ends_with_the_store_after_what_there_was() -> None:
    async def test(store: Store) -> None:
        async with store.told(0, "machine") as stream:
            await anext(stream)
            store.happen("machine.created")
            assert "id: 1" in await news(stream)
            store.events.close()
            assert await news(stream) == "over"

    run(test)


def test_events_that_are_gone_before_they_were_read_are_news() -> None:
    class Gone:
        position = 0

        def __aiter__(self) -> Gone:
            return self

        async def __anext__(self) -> EventDocument:
            raise live.EventsGone(0, oldest=5, latest=9)

    async def test(_: Store) -> None:
        told = live._News(4)
        await live._read(Gone(), frozenset({"machine"}), told, changed := asyncio.Event())  # type: ignore[arg-type]
        assert changed.is_set()
        assert told.waiting

    run(test)

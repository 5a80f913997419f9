"""The stream of events: in order, without a gap, from any place on, or said to be gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import from_record
from vmlab.manager.documents import EventDocument
from vmlab.manager.settings import Settings
from vmlab.manager.store import events as module
from vmlab.manager.store import queries
from vmlab.manager.store.changes import EventsGone, add_event
from vmlab.manager.store.database import Database
from vmlab.manager.store.events import Subscription


def write_events(s: Session, *names: str) -> None:
    for name in names:
        add_event(s, "test.happened", name=name, data={"of": name})


async def take(subscription: Subscription, count: int) -> list[EventDocument]:
    async with asyncio.timeout(120):
        return [await anext(subscription) for _ in range(count)]


def test_subscriber_is_told_what_is_committed_after_it_subscribed(database: Database) -> None:
    async def story() -> None:
        await database.write(write_events, "before")
        async with database.events.subscribe() as subscription:
            waiting = asyncio.ensure_future(take(subscription, 3))
            await database.write(write_events, "a", "b")
            await database.write(write_events, "c")
            told = await waiting
        assert [(event.id, event.name) for event in told] == [(2, "a"), (3, "b"), (4, "c")]
        assert told[0].data == {"of": "a"} and told[0].at.tzinfo is not None
        assert database.events.latest() == 4

    asyncio.run(story())


def test_events_of_a_transaction_that_fails_are_never_told_and_leave_no_gap(
    database: Database,
) -> None:
    def fail(s: Session) -> None:
        write_events(s, "never")
        raise RuntimeError("on purpose")

    async def story() -> None:
        await database.write(write_events, "a")
        with pytest.raises(RuntimeError, match="on purpose"):
            await database.write(fail)
        await database.write(write_events, "b")
        told = await take(database.events.subscribe(0), 2)
        assert [(event.id, event.name) for event in told] == [(1, "a"), (2, "b")]

    asyncio.run(story())


@pytest.mark.parametrize("in_memory", [1, 3, 2_000])
def test_replay_joins_the_live_stream_wherever_it_begins(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(module, "_IN_MEMORY", in_memory)
    monkeypatch.setattr(Subscription, "_BATCH", 2)
    database = Database.open(settings)

    async def story() -> None:
        for number in range(1, 8):
            await database.write(write_events, str(number))
        subscriptions = [database.events.subscribe(after) for after in range(8)]
        readers = [
            asyncio.ensure_future(take(subscription, 10 - after))
            for after, subscription in enumerate(subscriptions)
        ]
        await database.write(write_events, "8", "9", "10")
        for after, reader in enumerate(readers):
            assert [event.id for event in await reader] == list(range(after + 1, 11))

    asyncio.run(story())
    database.close()


def test_numbers_go_on_after_the_store_was_closed(settings: Settings) -> None:
    database = Database.open(settings)
    database.write_now(write_events, "a", "b")
    database.close()
    database = Database.open(settings)
    assert database.events.latest() == 2

    async def story() -> None:
        subscription = database.events.subscribe(1)
        await database.write(write_events, "c")
        assert [event.name for event in await take(subscription, 2)] == ["b", "c"]

    asyncio.run(story())
    database.close()


def test_old_events_are_removed_and_who_asks_for_them_is_told(tmp_path: Path) -> None:
    settings = Settings(home=Home.open(tmp_path), events_kept=10)
    database = Database.open(settings)
    for number in range(1, 31):
        database.write_now(write_events, str(number))
    oldest = database.events.oldest()
    assert 30 - 10 - 1 <= oldest <= 21
    kept = database.read_now(queries.list_events)
    assert [event.id for event in kept.items] == list(range(oldest, 31))
    with pytest.raises(EventsGone) as gone:
        database.events.subscribe(oldest - 2)
    assert (gone.value.oldest, gone.value.latest) == (oldest, 30)
    again = from_record(gone.value.to_record())
    assert isinstance(again, EventsGone) and again.oldest == oldest
    assert "read everything anew" in (gone.value.hint or "")
    database.close()
    # The next process knows as much.
    database = Database.open(settings)
    assert database.events.oldest() == oldest
    with pytest.raises(EventsGone):
        database.events.subscribe(oldest - 2)

    async def story() -> None:
        told = await take(database.events.subscribe(oldest - 1), 30 - oldest + 1)
        assert told[-1].id == 30

    asyncio.run(story())
    database.close()


def test_events_that_never_were_are_as_gone_as_old_ones(database: Database) -> None:
    database.write_now(write_events, "a")
    with pytest.raises(EventsGone, match="events after 2 "):
        database.events.subscribe(2)


def test_subscriber_that_is_too_slow_is_told_so(tmp_path: Path) -> None:
    database = Database.open(Settings(home=Home.open(tmp_path), events_kept=5))

    async def story() -> None:
        subscription = database.events.subscribe()
        for number in range(20):
            await database.write(write_events, str(number))
        with pytest.raises(EventsGone):
            await take(subscription, 1)

    asyncio.run(story())
    database.close()


def test_subscription_ends_with_the_store_once_everything_is_told(settings: Settings) -> None:
    database = Database.open(settings)

    async def story() -> None:
        subscription = database.events.subscribe()
        idle = asyncio.ensure_future(anext(database.events.subscribe(), None))
        await asyncio.sleep(0)
        database.write_now(write_events, "last")
        database.events.close()
        assert [event.name async for event in subscription] == ["last"]
        assert (await idle).name == "last"
        assert [event async for event in database.events.subscribe()] == []
        await subscription.aclose()

    asyncio.run(story())
    database.close()


def test_what_another_process_wrote_is_told_with_the_next_event(settings: Settings) -> None:
    ours, theirs = Database.open(settings), Database.open(settings)

    async def story() -> None:
        subscription = ours.events.subscribe()
        await ours.write(write_events, "ours")
        await theirs.write(write_events, "theirs", "theirs too")
        await ours.write(write_events, "ours again")
        told = await take(subscription, 4)
        assert [event.name for event in told] == ["ours", "theirs", "theirs too", "ours again"]
        assert [event.id for event in told] == [1, 2, 3, 4]

    asyncio.run(story())
    ours.close()
    theirs.close()


def test_cancelled_caller_does_not_undo_its_write(database: Database) -> None:
    import threading

    began, go_on = threading.Event(), threading.Event()

    def slow(s: Session) -> None:
        began.set()
        assert go_on.wait(120)
        write_events(s, "written")

    async def story() -> None:
        subscription = database.events.subscribe()
        writing = asyncio.ensure_future(database.write(slow))
        await asyncio.to_thread(began.wait, 120)
        writing.cancel()
        go_on.set()
        assert [event.name for event in await take(subscription, 1)] == ["written"]
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(story())

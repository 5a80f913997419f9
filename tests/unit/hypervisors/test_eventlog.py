"""The event log: numbered without gaps, kept for a while, followed by many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.hypervisors.toy import in_loop

from vmlab.hypervisors.eventlog import EventLog
from vmlab.machine.errors import ResourceNotFound
from vmlab.machine.events import Event, EventType


def log(*, keep: int = 100, events: int = 0) -> EventLog:
    made = EventLog("h", lambda: 7.5, keep=keep)
    for _ in range(events):
        made.emit(EventType.STATE)
    return made


def numbers(events: list[Event]) -> list[int]:
    return [event.sequence for event in events]


async def take(events: AsyncIterator[Event], count: int) -> list[int]:
    return [(await anext(events)).sequence for _ in range(count)]


def test_an_event_has_number_time_and_data_and_is_a_valid_one() -> None:
    event = log(events=2).emit(
        EventType.CRASHED, machine="i", name="a", operation="start-1", reason="panic"
    )
    assert (event.sequence, event.time, event.hypervisor) == (3, 7.5, "h")
    assert event.data == {"reason": "panic"}
    assert Event.model_validate(event.model_dump()) == event


def test_no_event_is_older_than_the_one_before_when_the_clock_is_set_back() -> None:
    clock = iter([10.0, 7.5, 10.5])
    made = EventLog("h", lambda: next(clock))
    assert [made.emit(EventType.STATE).time for _ in range(3)] == [10.0, 10.0, 10.5]


@given(st.integers(0, 30), st.integers(1, 30), st.integers(-5, 40))
def test_events_since_a_number_are_all_of_them_or_a_refusal(
    events: int, keep: int, since: int
) -> None:
    kept = log(keep=keep, events=events)
    assert kept.last == events
    wanted = list(range(max(0, since) + 1, events + 1))
    if len(wanted) > keep:
        with pytest.raises(ResourceNotFound) as caught:
            kept.since(since)
        assert f"events {wanted[0]} to {events - keep} of 'h'" in caught.value.message
        assert caught.value.hint
    else:
        assert numbers(kept.since(since)) == wanted


@in_loop
async def test_now_is_when_following_is_asked_for() -> None:
    events = log(events=3)
    follower = events.follow()
    events.emit(EventType.STATE)
    assert await take(follower, 1) == [4]


@in_loop
async def test_a_follower_reads_what_was_and_what_comes() -> None:
    events = log(events=3)
    follower = events.follow(1)
    assert await take(follower, 2) == [2, 3]
    task = asyncio.create_task(take(follower, 2))
    await asyncio.sleep(0)
    assert not task.done()
    events.emit(EventType.STATE)
    await asyncio.sleep(0)
    events.emit(EventType.STATE)
    assert await task == [4, 5]


@in_loop
async def test_a_follower_may_wait_for_a_number_to_come() -> None:
    events = log(events=1)
    task = asyncio.create_task(take(events.follow(3), 1))
    for _ in range(3):
        await asyncio.sleep(0)
        events.emit(EventType.STATE)
    assert await task == [4]


@in_loop
async def test_every_follower_gets_every_event() -> None:
    events = log()
    tasks = [asyncio.create_task(take(events.follow(0), 50)) for _ in range(5)]
    for number in range(50):
        events.emit(EventType.STATE)
        if number % 7 == 0:
            await asyncio.sleep(0)
    assert [await task for task in tasks] == [list(range(1, 51))] * 5


@in_loop
async def test_a_follower_that_is_cancelled_leaves_the_others_alone() -> None:
    events = log()
    gone, other = (asyncio.create_task(take(events.follow(0), 1)) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait((gone,))
    assert len(events._waiting) == 1
    events.emit(EventType.STATE)
    assert await other == [1]
    assert not events._waiting


@in_loop
async def test_waking_one_that_is_just_being_cancelled_does_no_harm() -> None:
    events = log()
    task = asyncio.create_task(take(events.follow(0), 1))
    await asyncio.sleep(0)
    task.cancel()
    events.emit(EventType.STATE)
    with pytest.raises(asyncio.CancelledError):
        await task


@in_loop
async def test_closing_ends_followers_after_they_have_read_all() -> None:
    events = log(events=2)

    async def read() -> list[int]:
        return numbers([event async for event in events.follow(0)])

    waiting, late = asyncio.create_task(read()), events.follow(1)
    await asyncio.sleep(0)
    events.emit(EventType.STATE)
    events.close()
    assert await waiting == [1, 2, 3]
    assert numbers([event async for event in late]) == [2, 3]
    events.close()


@in_loop
async def test_a_follower_that_is_too_slow_is_told_what_it_missed() -> None:
    events = log(keep=3, events=2)
    follower = events.follow(0)
    assert await take(follower, 1) == [1]
    for _ in range(4):
        events.emit(EventType.STATE)
    assert await take(follower, 1) == [2]
    with pytest.raises(ResourceNotFound, match="events 3 to 3"):
        await anext(follower)


@in_loop
async def test_what_happens_while_events_are_read_is_read_as_well() -> None:
    events = log(events=1)
    seen = []
    async for event in events.follow(0):
        seen.append(event.sequence)
        if event.sequence == 3:
            events.close()
        if event.sequence < 3:
            events.emit(EventType.STATE)
    assert seen == [1, 2, 3]

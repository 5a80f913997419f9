"""A clock of retired instructions: what it shows, and whom it calls when."""

from __future__ import annotations

import pytest

from vmlab.engine.instruction_clock import InstructionClock


def test_it_shows_what_was_counted() -> None:
    clock = InstructionClock(10, epoch=1_000_000)
    clock.run()
    assert (clock.ticks(), clock.nanoseconds()) == (0, 0)
    clock.instructions = 25
    assert (clock.ticks(), clock.nanoseconds()) == (2, 250)
    assert clock.wall_nanoseconds() == 1_000_000 * 10**9 + 250
    clock.halt()
    assert clock.ticks() == 2
    assert clock.at_tick(2) == 20


def test_calls_are_made_when_they_are_due_in_the_order_of_their_moments() -> None:
    clock = InstructionClock(10)
    told: list[str] = []
    arranged: list[None] = []
    clock.arranged = lambda: arranged.append(None)
    clock.call_at(300, lambda: told.append("third"))
    clock.call_at(101, lambda: told.append("first"))
    clock.call_at(101, lambda: told.append("second"))
    never = clock.call_at(50, lambda: told.append("never"))
    assert len(arranged) == 4
    assert clock.next_event() == 5
    never.cancel()
    assert clock.next_event() == 11, "a moment between two instructions is the later one's"
    clock.make_calls()
    clock.instructions = 10
    clock.make_calls()
    assert told == []
    clock.instructions = 11
    clock.make_calls()
    assert told == ["first", "second"]
    clock.instructions = 1000
    clock.make_calls()
    assert told == ["first", "second", "third"]
    assert clock.next_event() is None


def test_what_a_call_arranges_for_now_is_done_before_time_goes_on() -> None:
    clock = InstructionClock(1)
    told: list[str] = []

    def again() -> None:
        told.append("once")
        clock.call_at(0, lambda: told.append("again"))

    clock.call_at(0, again)
    clock.make_calls()
    assert told == ["once", "again"]


@pytest.mark.parametrize("per_tick", [1, 3, 10, 1000])
def test_a_moment_is_reached_no_earlier_than_asked(per_tick: int) -> None:
    clock = InstructionClock(per_tick)
    for nanoseconds in (1, 99, 100, 101, 12_345):
        clock.call_at(nanoseconds, lambda: None)
        clock.instructions = clock.next_event() or 0
        assert clock.nanoseconds() >= nanoseconds
        clock.instructions -= 1
        assert clock.nanoseconds() < nanoseconds
        clock.instructions += 1
        clock.make_calls()

"""The breaker of a host: left alone after failures, tried once after a while."""

from __future__ import annotations

from vmlab.manager.operator.breaker import LONGEST_PAUSE_S, Breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(failures=2, pause=10, clock=clock)
    for _ in range(2):
        assert breaker.admit()
        breaker.failed("no answer")
    return breaker


def test_failures_one_after_the_other_open_it_and_others_do_not() -> None:
    breaker = Breaker(failures=2, pause=10, clock=Clock())
    for _ in range(5):
        assert breaker.admit()
        breaker.failed("no answer")
        assert breaker.admit()
        breaker.succeeded()
    assert breaker.state == "closed"
    assert opened(Clock()).state == "open"


def test_an_open_one_lets_nothing_through_until_its_time_is_over_and_one_try_then() -> None:
    clock = Clock()
    breaker = opened(clock)
    assert not breaker.admit()
    assert breaker.seconds_left == 10
    clock.now = 10
    assert breaker.state == "half-open"
    assert breaker.admit()
    assert not breaker.admit()
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.failures == 0
    assert breaker.admit()
    assert breaker.admit()


def test_a_try_that_fails_opens_it_for_twice_as_long_but_not_for_ever() -> None:
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(8):
        clock.now += breaker.seconds_left
        assert breaker.admit()
        breaker.failed("still no answer")
        pauses.append(breaker.seconds_left)
    assert pauses[:3] == [20, 40, 80]
    assert max(pauses) == LONGEST_PAUSE_S
    assert breaker.reason == "still no answer"


def test_a_try_that_says_nothing_leaves_it_to_the_next_one() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now = 10
    assert breaker.admit()
    breaker.withdrawn()
    assert breaker.state == "half-open"
    assert breaker.admit()

"""How much one client may ask for at once."""

from __future__ import annotations

import pytest

from vmlab.manager.api.limits import Places, TokenBucket
from vmlab.manager.api.problems import TooFast


def test_twice_the_rate_at_once_and_then_as_fast_as_the_rate() -> None:
    now = 0.0
    bucket = TokenBucket(2, clock=lambda: now)
    for _ in range(4):
        bucket.take("a")
    with pytest.raises(TooFast) as late:
        bucket.take("a")
    assert late.value.seconds == pytest.approx(0.5)
    bucket.take("b")
    now = 0.5
    bucket.take("a")
    with pytest.raises(TooFast):
        bucket.take("a")
    now = 100.0
    for _ in range(4):
        bucket.take("a")
    with pytest.raises(TooFast):
        bucket.take("a")


def test_a_slow_rate_still_allows_one() -> None:
    bucket = TokenBucket(0.1, clock=lambda: 0.0)
    bucket.take("a")
    with pytest.raises(TooFast) as late:
        bucket.take("a")
    assert late.value.seconds == pytest.approx(10)


def test_clients_that_were_not_seen_for_long_are_forgotten() -> None:
    bucket = TokenBucket(0.1, clock=lambda: 0.0)
    for number in range(5000):
        bucket.take(str(number))
    bucket.take("0")
    with pytest.raises(TooFast):
        bucket.take("4999")


def test_places_are_given_back() -> None:
    places = Places(1, "streams")
    with places.place():
        message = "there are 1 streams already; 1 are possible"
        with pytest.raises(TooFast, match=message), places.place():
            raise AssertionError("there is none left")
        assert places.taken == 1
    with places.place():
        pass
    assert places.taken == 0

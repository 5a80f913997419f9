"""What a guest's shell is told to do with its devices: what comes of it is in the suite itself."""

from __future__ import annotations

import re
import struct

from hypothesis import given
from hypothesis import strategies as st

from vmlab.conformance.agent_devices import address_of, chords, drawing


def events(*given_: tuple[int, int, int]) -> bytes:
    """Input events, each a microsecond after the one before, and what ends each (EV_SYN)."""
    return b"".join(
        struct.pack("<qqHHi", 7, 2 * number, kind, code, value)
        + struct.pack("<qqHHi", 7, 2 * number, 0, 0, 0)
        for number, (kind, code, value) in enumerate(given_)
    )


def test_keys_that_are_held_together_are_one_chord() -> None:
    b, shift, c, enter = 48, 42, 46, 28
    stream = events(
        *((1, b, 1), (1, b, 2), (1, b, 0)),
        *((1, shift, 1), (1, c, 1), (1, c, 0), (1, shift, 0)),
        *((1, enter, 1), (1, enter, 0), (1, 240, 1), (1, 240, 0), (1, 11, 1), (1, 11, 0)),
    )
    assert chords(stream) == ("b", "shift-c", "ret", "key-240", "0")


def test_key_that_is_held_or_was_pressed_before_is_no_chord() -> None:
    assert chords(b"") == ()
    assert chords(events((1, 30, 0), (1, 30, 1))) == ()
    assert chords(events((1, 30, 0), (1, 44, 1), (1, 44, 0))) == ("z",)


def test_events_of_several_keyboards_are_told_in_the_order_of_their_time() -> None:
    stream = events((1, 30, 1), (1, 30, 0), (1, 48, 1), (1, 48, 0))
    half = len(stream) // 2
    assert chords(stream[half:] + stream[:half]) == ("a", "b")


@given(st.binary(min_size=6, max_size=6), st.binary(min_size=6, max_size=6))
def test_nics_with_different_addresses_have_different_addresses(one: bytes, other: bytes) -> None:
    first, second = address_of(one.hex(":")), address_of(other.hex(":"))
    assert re.fullmatch(r"10(\.\d{1,3}){3}", first)
    assert (first == second) == (one[3:] == other[3:])


def test_each_text_is_drawn_in_its_own_way_and_always_so() -> None:
    assert drawing("one") == drawing("one")
    assert drawing("one") != drawing("another")

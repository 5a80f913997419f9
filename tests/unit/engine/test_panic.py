"""A kernel's panic is read off what it prints, and nothing else is."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.engine.panic import PanicWatch

PANIC = b"[    1.234567][  T1] Kernel panic - not syncing: Attempted to kill init!\r\n"
END = b"[    1.3] ---[ end Kernel panic - not syncing: Attempted to kill init! ]---\n"


@given(st.lists(st.integers(1, len(PANIC + END) - 1), max_size=8))
def test_it_is_seen_however_it_comes_in_pieces(cuts: list[int]) -> None:
    watch, text = PanicWatch(), b"before\n" + PANIC + b"Rebooting in 1 seconds..\n" + END
    places = sorted({0, *cuts, len(text)})
    for start, stop in pairwise(places):
        watch.feed(text[start:stop])
    assert (watch.reason, watch.stands) == ("Attempted to kill init!", True)
    watch.reset()
    assert (watch.reason, watch.stands) == ("", False)


@pytest.mark.parametrize(
    "text",
    [
        b"Kernel panic - not syncing: the line has no end",
        b"log: Kernel panic - not syncing: quoted\n",
        b"[x] Kernel panic - not syncing: no time\n",
        b"x" * 5000 + b"\n",
    ],
)
def test_what_is_none_is_not_taken_for_one(text: bytes) -> None:
    watch = PanicWatch()
    watch.feed(text)
    assert watch.reason == ""


def test_the_end_of_a_panic_that_never_began_is_nothing() -> None:
    watch = PanicWatch()
    watch.feed(END)
    assert not watch.stands

"""Marks in a stream: found in whatever pieces it arrives, and nothing but them is taken away."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from vmlab.guests.marks import MarkedStream

# Few letters, so that marks repeat themselves and the output begins like them.
LETTERS = st.sampled_from([b"a", b"b", b"\n"])
TEXTS = st.lists(LETTERS, max_size=20).map(b"".join)
MARKS = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=8).map(b"".join)


@given(
    before=TEXTS,
    rest=st.lists(st.sampled_from([b"a", b"b"]), max_size=5).map(b"".join),
    after=TEXTS,
    mark=MARKS,
    sizes=st.lists(st.integers(1, 5), max_size=60),
    cancel=st.booleans(),
)
def test_a_mark_is_found_in_any_pieces(
    before: bytes, rest: bytes, after: bytes, mark: bytes, sizes: list[int], cancel: bool
) -> None:
    whole = before + mark + rest + b"\n" + after
    place = whole.find(mark)
    end = whole.index(b"\n", place)
    pieces: list[bytes] = []
    left = whole
    for size in sizes:
        pieces.append(left[:size])
        left = left[size:]
    pieces = [piece for piece in [*pieces, left] if piece]

    async def main() -> None:
        source: asyncio.Queue[bytes] = asyncio.Queue()
        shown = bytearray()

        async def take(data: bytes) -> None:
            shown.extend(data)

        stream = MarkedStream(source.get)
        if cancel:
            # What was read by a wait that was given up is not lost to the next.
            for piece in pieces[: len(pieces) // 2]:
                source.put_nowait(piece)
            waiting = asyncio.ensure_future(stream.until(mark, take))
            for _ in range(200):
                await asyncio.sleep(0)
            if waiting.done():
                return
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            pieces[: len(pieces) // 2] = []
        for piece in [*pieces, b""]:
            source.put_nowait(piece)
        assert await stream.until(mark, take) == whole[place + len(mark) : end].strip()
        assert bytes(shown) == whole[:place]
        shown.clear()
        assert await stream.until(b"\x01", take) is None
        assert bytes(shown) == whole[end + 1 :]

    asyncio.run(main())

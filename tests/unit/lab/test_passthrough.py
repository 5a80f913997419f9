"""What is typed here goes to the guest while somebody there reads it, and to nobody else's loss."""

from __future__ import annotations

import asyncio
import os
import threading

from vmlab.lab.passthrough import from_file


def test_input_that_came_after_its_reader_had_gone_is_the_next_readers() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"first")

    async def one_piece() -> bytes:
        pieces = from_file(reading)
        try:
            return await anext(pieces)
        finally:
            await pieces.aclose()

    before = set(threading.enumerate())
    assert asyncio.run(one_piece()) == b"first"
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    os.write(writing, b"second")
    assert os.read(reading, 100) == b"second"
    os.close(reading)
    os.close(writing)


def test_input_ends_with_its_file() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"all of it")
    os.close(writing)

    async def everything() -> bytes:
        return b"".join([piece async for piece in from_file(reading)])

    assert asyncio.run(everything()) == b"all of it"
    os.close(reading)

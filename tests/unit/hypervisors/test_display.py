"""Pictures as files, the names of keys, and what a machine with a display and one without does."""

from __future__ import annotations

import asyncio
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.hypervisors.toy import RUNNING, ToyHypervisor

from vmlab.conformance.checks.display import pixels_of
from vmlab.hypervisors.operated_machine import check_keys
from vmlab.hypervisors.picture import Picture
from vmlab.hypervisors.simulated.display import picture_of
from vmlab.machine.errors import InvalidSpec, UnsupportedOperation

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
pictures = sizes.flatmap(
    lambda size: st.builds(
        Picture,
        st.just(size[0]),
        st.just(size[1]),
        st.binary(min_size=3 * size[0] * size[1], max_size=3 * size[0] * size[1]),
    )
)


@given(pictures)
def test_png_has_the_pixels_of_the_picture(picture: Picture) -> None:
    width, height, lines = pixels_of(picture.png())
    assert (width, height) == (picture.width, picture.height)
    stride = 1 + 3 * width
    rows = [lines[start : start + stride] for start in range(0, len(lines), stride)]
    assert {row[:1] for row in rows} == {b"\0"}
    assert b"".join(row[1:] for row in rows) == picture.pixels


@given(pictures)
def test_ppm_is_read_with_its_pixels(picture: Picture) -> None:
    head = f"P6\n{picture.width} {picture.height}\n255\n".encode()
    assert Picture.of_ppm(head + picture.pixels) == picture


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P6 1 1",
        b"P5\n1 1\n255\nabc",
        b"P6\n1 1\n65535\nabcdef",
        b"P6\n2 1\n255\nabc",
        b"P6\n0 1\n255\n",
        b"P6\n1 99999999\n255\n",
        b"P6\nx 1\n255\nabc",
    ],
)
def test_what_is_no_ppm_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Picture.of_ppm(data)


@given(st.data())
def test_damaged_images_are_seen(data: st.DataObject) -> None:
    image = Picture(2, 2, bytes(range(12))).png()
    where = data.draw(st.integers(0, len(image) - 1))
    broken = bytearray(image)
    broken[where] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(broken), image[:where]):
        with pytest.raises((ValueError, KeyError, struct.error, zlib.error)):
            pixels_of(damaged)


def test_different_texts_are_different_pictures() -> None:
    texts = ["", "a", "b", "ab", "ba", "\n\nlow", "x" * 80]
    assert len({picture_of(text).pixels for text in texts}) == len(texts)
    assert picture_of("x" * 80) == picture_of("x" * 300 + "\n" * 30 + "below")


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        (["a", "Ctrl-c"], "keys.1"),
        (["A"], "keys.0"),
        (["ctrl-"], "keys.0"),
        ([""], "keys.0"),
        ("abc", "keys"),
    ],
)
def test_keys_that_there_are_not_are_named(keys: list[str], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        check_keys(keys)
    assert caught.value.problems[0].field == field
    assert check_keys(["a", "ctrl-alt-f2"]) == [("a",), ("ctrl", "alt", "f2")]


def test_only_a_machine_with_a_display_is_looked_at() -> None:
    async def test() -> None:
        toy = ToyHypervisor()
        machine = await toy.machine(RUNNING, display=True)
        image = await machine.screenshot()
        assert pixels_of(image) == (1, 1, b"\0toy")
        await machine.send_keys(["a", "shift-b"])
        assert machine.pressed == [("a",), ("shift", "b")]
        with pytest.raises(InvalidSpec):
            await machine.send_keys(["a", "nonsense"])
        assert len(machine.pressed) == 2
        blind = await ToyHypervisor().machine(RUNNING)
        for call in (blind.screenshot(), blind.send_keys(["a"])):
            with pytest.raises(UnsupportedOperation, match="display") as caught:
                await call
            assert "display = true" in str(caught.value.hint)

    asyncio.run(test())

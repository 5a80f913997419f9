"""Sizes: text at the edges, whole bytes inside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from vmlab.machine.sizes import GIB, KIB, LARGEST_SIZE, MIB, TIB, Size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * MIB),
        ("512MiB", 512 * MIB),
        ("512mb", 512 * MIB),
        (" 2 GiB ", 2 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("0.5K", 512),
        ("4T", 4 * TIB),
        ("1P", 1024 * TIB),
        ("1536", 1536),
        ("7B", 7),
        ("7b", 7),
        (KIB, KIB),
        (0, 0),
        (LARGEST_SIZE, LARGEST_SIZE),
    ],
)
def test_sizes_are_read_as_qemu_reads_them(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("5X", "number with K, M, G, T or P"),
        ("", "number with K, M, G, T or P"),
        ("-1M", "number with K, M, G, T or P"),
        ("1e3", "number with K, M, G, T or P"),
        ("١M", "number with K, M, G, T or P"),
        ("9" * 5000, "number with K, M, G, T or P"),
        (-1, "cannot be negative"),
        ("0.3", "whole number of bytes"),
        ("8192P", "at most"),
        (1 << 63, "at most"),
        (10**400, "at most"),
        (True, "number of bytes or text"),
        (1.5, "number of bytes or text"),
        (None, "number of bytes or text"),
        ([1], "number of bytes or text"),
    ],
)
def test_what_is_no_size_is_refused_with_what_would_be_right(value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_size(value)


@given(st.integers(0, LARGEST_SIZE))
def test_every_size_is_read_back_from_its_text(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(1, 1023), st.sampled_from("KMGTP"))
def test_text_of_a_round_size_is_the_short_one(number: int, suffix: str) -> None:
    assert format_size(parse_size(f"{number}{suffix}")) == f"{number}{suffix}"


@given(st.text())
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert 0 <= parse_size(text) <= LARGEST_SIZE
    except ValueError as error:
        assert "size" in str(error)


def test_a_size_is_bytes_in_python_and_text_in_json() -> None:
    class Thing(BaseModel):
        size: Size

    thing = Thing.model_validate({"size": "2G"})
    assert thing.size == 2 * GIB
    assert thing.model_dump() == {"size": 2 * GIB}
    assert thing.model_dump_json() == '{"size":"2G"}'

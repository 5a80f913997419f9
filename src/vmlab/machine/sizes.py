"""Sizes: bytes inside, "512M" at the edges.

K, M, G, T and P are powers of 1024, as in QEMU's `-m 512M`, and may be written KiB or KB as well;
a bare number is bytes. Nothing here rounds: a size that is not a whole number of bytes is
refused.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

LARGEST_SIZE = (1 << 63) - 1
"""Bytes of the largest size: files and memory are counted in signed 64-bit numbers."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

SIZE_PATTERN = r"^\s*[0-9]{1,40}(\.[0-9]{1,40})?\s*([kKmMgGtTpP]([iI]?[bB])?|[bB])?\s*$"
# ASCII: \s and IGNORECASE know more spaces and letters than a person would write.
_SIZE = re.compile(
    r"\s*([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*(?:([kmgtp])(?:i?b)?|b)?\s*",
    re.IGNORECASE | re.ASCII,
)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_size(value: object) -> int:
    """Bytes of a size such as 536870912, "512M", "512MiB" or "1.5G".

    Raises:
        ValueError: what would be right.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('a size is a number of bytes or text such as "512M" or "2GiB"')
    if isinstance(value, int):
        size = Fraction(value)
    else:
        match = _SIZE.fullmatch(value)
        if match is None:
            raise ValueError('a size is a number with K, M, G, T or P, such as "512M" or "2GiB"')
        size = Fraction(match[1]) * 1024 ** _POWER[(match[2] or "").lower()]
    if size < 0:
        raise ValueError("a size cannot be negative")
    if size > LARGEST_SIZE:
        raise ValueError(f'a size is at most {LARGEST_SIZE} bytes, a little less than "8192P"')
    if size.denominator != 1:
        raise ValueError("a size is a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """The shortest exact text of `size` bytes that `parse_size` reads back: "512M", "1536"."""
    for power, suffix in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{suffix}"
    return str(size)


def rounded_size(size: float) -> str:
    """Bytes as people read them, rounded: "512 MiB", "1.5 GiB"; `parse_size` may read another."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount >= 1024:
            amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"


SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": LARGEST_SIZE},
        {"type": "string", "pattern": SIZE_PATTERN},
    ],
    "description": 'bytes, or text such as "512M" or "2GiB" (powers of 1024)',
}

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    WithJsonSchema(SIZE_SCHEMA),
]
"""A size in bytes; text such as "512M" is read, and JSON is written as such text."""

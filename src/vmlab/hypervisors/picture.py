"""A picture of pixels, and how it is written as PNG (ISO/IEC 15948:2004)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final, Self

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_TRUECOLOUR: Final = 2
_MOST: Final = 1 << 15
"""Pixels on a side that are believed."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Pixels from the top left on, three bytes each: red, green, blue."""

    width: int
    height: int
    pixels: bytes

    def __post_init__(self) -> None:
        if len(self.pixels) != 3 * self.width * self.height:
            raise ValueError(
                f"{self.width} x {self.height} pixels are not {len(self.pixels)} bytes"
            )

    @classmethod
    def of_ppm(cls, data: bytes) -> Self:
        """The picture in a binary PPM file (netpbm's ppm(5)), as QEMU writes it.

        Raises:
            ValueError: it is none.
        """
        words: list[bytes] = []
        position = 0
        while len(words) < 4:
            end = position
            while end < len(data) and not data[end : end + 1].isspace():
                end += 1
            if end == len(data):
                raise ValueError("it is no PPM file")
            if end > position:
                words.append(data[position:end])
            position = end + 1
        if words[0] != b"P6" or words[3] != b"255":
            raise ValueError("it is no PPM file of one byte for each colour")
        width, height = int(words[1]), int(words[2])
        if not (0 < width <= _MOST and 0 < height <= _MOST):
            raise ValueError(f"no picture has {width} x {height} pixels")
        return cls(width, height, data[position:])

    def png(self) -> bytes:
        """The picture as a PNG file."""
        stride = 3 * self.width
        # Each line begins with the number of its filter, none here.
        lines = b"".join(
            b"\0" + self.pixels[start : start + stride]
            for start in range(0, len(self.pixels), stride)
        )
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, _TRUECOLOUR, 0, 0, 0)
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
        return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

"""What a simulated display shows: text, each character as a pattern of its own and not its glyph.

So a test sees that the picture changes with what the guest shows, and cannot read it.
"""

from __future__ import annotations

from typing import Final

from vmlab.hypervisors.picture import Picture

COLUMNS: Final = 80
ROWS: Final = 25
_WIDE, _HIGH = 4, 8
"""Pixels of a character."""
_SPREAD: Final = 2654435761
"""Knuth's multiplier for hashing (The Art of Computer Programming 3, 6.4)."""


def picture_of(text: str) -> Picture:
    """The picture of a screen of text; what does not fit on it is not shown."""
    lines = text.splitlines()[:ROWS]
    rows = []
    for row in range(ROWS):
        line = (lines[row] if row < len(lines) else "").ljust(COLUMNS)[:COLUMNS]
        patterns = [0 if character == " " else ord(character) * _SPREAD for character in line]
        for height in range(_HIGH):
            rows.append(
                b"".join(
                    b"\xff\xff\xff" if pattern >> (height * _WIDE + bit) & 1 else b"\0\0\0"
                    for pattern in patterns
                    for bit in range(_WIDE)
                )
            )
    return Picture(COLUMNS * _WIDE, ROWS * _HIGH, b"".join(rows))

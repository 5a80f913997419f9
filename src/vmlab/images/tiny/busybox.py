"""Which applets a busybox binary has, read from the binary: it may be of another architecture.

The names stand in the read-only data as one sorted row of NUL-terminated strings that begins
with "[" and "[[" and ends with an empty one (`applet_names` in include/applet_tables.h).
"""

from __future__ import annotations

import re

from vmlab.images.errors import FormatError

_START = b"[\0[[\0"
_NAME = re.compile(rb"[a-z0-9_\[][a-z0-9_.\[-]*")
_ROW_BYTES_AT_MOST = 16 << 10


def applets(binary: bytes, *, source: str) -> list[str]:
    """The names of the binary's applets.

    Raises:
        FormatError: it has no table of applets, so it is no busybox.
    """
    position = binary.find(_START)
    while position >= 0:
        row = binary[position : position + _ROW_BYTES_AT_MOST]
        names = row.split(b"\0\0", 1)[0].split(b"\0")
        if len(names) > 10 and b"sh" in names and all(_NAME.fullmatch(name) for name in names):
            return [name.decode("ascii") for name in names]
        position = binary.find(_START, position + 1)
    raise FormatError(f"{source} is not a busybox: it has no table of applets")

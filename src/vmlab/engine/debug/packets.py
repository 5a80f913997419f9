"""Packets of the GDB remote serial protocol (GDB manual, appendix E.1 and E.2).

A packet is `$data#checksum`; in binary data, `}` stands before a byte that is sent with bit 5
flipped. Between packets there are acknowledgements and the byte of Ctrl-C.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

LIMIT: Final = 0x4000
"""Bytes of a packet, either way."""


class Mark(Enum):
    """What stands between packets."""

    INTERRUPT = "interrupt"
    RECEIVED = "received"
    """Our packet arrived."""
    REPEAT = "repeat"
    """Our packet arrived broken."""
    BROKEN = "broken"
    """A packet of theirs did."""


def packet(data: bytes) -> bytes:
    """Data as it is sent."""
    return b"$%s#%02x" % (data, sum(data) & 0xFF)


def escaped(data: bytes) -> bytes:
    """Binary data as it stands in a packet."""
    for byte in b"}#$*":  # the escape itself first
        data = data.replace(bytes((byte,)), bytes((ord("}"), byte ^ 0x20)))
    return data


def unescaped(data: bytes) -> bytes:
    """Binary data out of a packet."""
    out = bytearray()
    flip = False
    for byte in data:
        if flip:
            out.append(byte ^ 0x20)
            flip = False
        elif byte == ord("}"):
            flip = True
        else:
            out.append(byte)
    return bytes(out)


class PacketReader:
    """Takes a stream apart."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes | Mark]:
        """The packets' data, and the marks between them, that are complete now."""
        self._rest += data
        found: list[bytes | Mark] = []
        while self._rest:
            if self._rest[0] == ord("$"):
                end = self._rest.find(b"#")
                if end < 0 and len(self._rest) > LIMIT + 4:
                    del self._rest[:1]  # no packet is so long: look for the next beginning
                    found.append(Mark.BROKEN)
                    continue
                if end < 0 or len(self._rest) < end + 3:
                    break
                content = bytes(self._rest[1:end])
                whole = _checksum(self._rest[end + 1 : end + 3]) == sum(content) & 0xFF
                del self._rest[: end + 3]
                found.append(content if whole else Mark.BROKEN)
                continue
            mark = _MARKS.get(self._rest[0])
            del self._rest[:1]
            if mark is not None:
                found.append(mark)
        return found


_MARKS: Final = {3: Mark.INTERRUPT, ord("+"): Mark.RECEIVED, ord("-"): Mark.REPEAT}


def _checksum(digits: bytes | bytearray) -> int:
    try:
        return int(digits, 16)
    except ValueError:
        return -1

"""What tests of network protocols compute by the RFCs, and not by the code that is tested."""

from __future__ import annotations

import struct

__all__ = ["checksum"]


def checksum(data: bytes) -> int:
    """Of the internet (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF

"""Text from guests, made fit for a report without hiding what was there.

A guest may print any bytes. JSON can hold every character but a lone surrogate; XML 1.0 (section
2.2, "Char") holds fewer; a terminal would obey some. What cannot be held is written out visibly,
as Python would write it in a string (`\\x1b`, `\\ufffe`), and never dropped or replaced by "?".
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["escape_controls", "escape_surrogates", "escape_xml"]

_SURROGATES: Final = re.compile("[\ud800-\udfff]")
# C0 without tab and newline, DEL, C1, and the bidirectional overrides that reorder a line.
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Outside XML's Char, and the characters XML discourages (C1, DEL). A carriage return is legal,
# but a parser turns it into a newline (section 2.11), so it is written out as well.
_NOT_XML: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# `surrogateescape` (PEP 383) smuggles the undecodable byte b as U+DC00 + b.
_SMUGGLED: Final = range(0xDC80, 0xDD00)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code in _SMUGGLED:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def escape_surrogates(value: object) -> object:
    """`value` as text that UTF-8 can encode; what is neither text nor bytes comes back as it is.

    Bytes are decoded as UTF-8; bytes that are not UTF-8, whether given as bytes or smuggled into
    a string by `surrogateescape`, become `\\xNN`.
    """
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, str) and not value.isascii():
        return _SURROGATES.sub(_written_out, value)
    return value


def escape_controls(text: str) -> str:
    """`text` safe to print on a terminal: every control but tab and newline is written out."""
    return _CONTROLS.sub(_written_out, text)


def escape_xml(text: str) -> str:
    """`text` as XML 1.0 can hold it; markup (`<`, `&`) is the XML writer's own business.

    A serial line's CR LF becomes LF, as any XML parser would make it.
    """
    return _NOT_XML.sub(_written_out, text.replace("\r\n", "\n"))

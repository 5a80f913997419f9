"""QMP's messages: JSON objects in a stream of bytes, with or without anything between them.

A client need not end a message with a newline, and may send half of one (QMP specification,
2.1). What is not JSON is told where it becomes plain, and reading goes on after it: at the next
line, or after a byte 0xFF, with which a client brings both sides back to the start of a message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

LONGEST: Final = 1 << 20
"""Bytes of the longest message that is read."""
DEEPEST: Final = 64
"""How deeply objects and arrays may be nested."""
RESET: Final = 0xFF
"""The byte that begins a message anew; no UTF-8 text has it."""

_OPEN: Final = b"{["
_CLOSE: Final = b"}]"
_QUOTE: Final = ord('"')
_ESCAPE: Final = ord("\\")
_NEWLINE: Final = ord("\n")


@dataclass(frozen=True)
class Malformed:
    """What came was no message; `reason` says why."""

    reason: str


class MessageReader:
    """Takes bytes as they come, and gives the messages that are whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._depth = 0
        self._quoted = False
        self._escaped = False
        # Whether a bad message is being passed over, up to the end of its line.
        self._skipping = False

    def feed(self, data: bytes) -> list[dict[str, Any] | Malformed]:
        """The messages that end within `data`, in order."""
        found: list[dict[str, Any] | Malformed] = []
        for byte in data:
            if byte == RESET:
                self._restart()
            elif self._skipping:
                self._skipping = byte != _NEWLINE
            elif (message := self._take(byte)) is not None:
                found.append(message)
        return found

    def _restart(self) -> None:
        self._buffer.clear()
        self._depth = 0
        self._quoted = self._escaped = self._skipping = False

    def _refuse(self, reason: str, *, byte: int) -> Malformed:
        self._restart()
        self._skipping = byte != _NEWLINE
        return Malformed(f"JSON parse error, {reason}")

    def _take(self, byte: int) -> dict[str, Any] | Malformed | None:
        if not self._depth and byte not in _OPEN:
            # Between messages: blanks, which say nothing.
            return None if byte in b" \t\r\n" else self._refuse("expecting value", byte=byte)
        self._buffer.append(byte)
        if len(self._buffer) > LONGEST:
            return self._refuse(f"a message longer than {LONGEST} bytes", byte=byte)
        if self._quoted:
            self._quoted = self._escaped or byte != _QUOTE
            self._escaped = byte == _ESCAPE and not self._escaped
        elif byte == _QUOTE:
            self._quoted = True
        elif byte in _OPEN:
            self._depth += 1
            if self._depth > DEEPEST:
                return self._refuse(f"nested more than {DEEPEST} deep", byte=byte)
        elif byte in _CLOSE:
            self._depth -= 1
            if not self._depth:
                return self._whole()
        return None

    def _whole(self) -> dict[str, Any] | Malformed:
        text = bytes(self._buffer)
        self._buffer.clear()
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Malformed(f"JSON parse error, {error}")
        if not isinstance(message, dict):
            return Malformed("QMP input must be a JSON object")
        return message


def written(message: dict[str, Any]) -> bytes:
    """A message as it goes over the wire: one line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"

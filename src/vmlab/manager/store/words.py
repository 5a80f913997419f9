"""Texts as the store compares them: what can be an id, what can be stored, what * and ? match."""

from __future__ import annotations

__all__ = [
    "is_id",
    "is_text",
    "pattern",
]


def is_id(text: str) -> bool:
    """Whether it looks like an id: 32 hexadecimal digits."""
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)


def is_text(text: str) -> bool:
    """Whether a database can have such text at all: PostgreSQL's has no NUL, UTF-8 no surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def pattern(text: str, *, whole: bool = True) -> str:
    r"""LIKE's pattern, with the escape "\", of a text in which * and ? stand for any."""
    for special in ("\\", "%", "_"):
        text = text.replace(special, "\\" + special)
    if not whole:
        return text + "%"
    return text.replace("*", "%").replace("?", "_")

"""Comparing Debian version numbers, deb-version(7)."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"[0-9]+")


def key(version: str) -> tuple[int, list[tuple[int, ...]], list[tuple[int, ...]]]:
    """A key that sorts versions as dpkg does."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "0")
    return (int(epoch) if epoch.isdecimal() else 0, _part(upstream), _part(revision))


def _part(text: str) -> list[tuple[int, ...]]:
    """Alternating non-digits and digits; each run of non-digits ends with the order's zero."""
    result: list[tuple[int, ...]] = []
    position = 0
    while position < len(text):
        match = _DIGITS.search(text, position)
        end = match.start() if match else len(text)
        result.append((*(_order(character) for character in text[position:end]), 0))
        result.append((int(match[0]) if match else 0,))
        position = match.end() if match else len(text)
    result.append((0,))  # the end, which sorts after a tilde and before all else
    return result


def _order(character: str) -> int:
    """A tilde sorts before the end of a part, letters before everything else."""
    if character == "~":
        return -1
    return ord(character) if character.isalpha() else ord(character) + 256

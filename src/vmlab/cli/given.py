"""What is given on the command line: how it is read, and the error where it is not right."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

from vmlab.machine.errors import InvalidSpec, SpecProblem

__all__ = ["duration", "wrong"]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION_RULE: Final = 'a number with s, m, h, d or w, such as "30m" or "7d"'


def wrong(option: str, value: object, expected: str, *, command: str) -> InvalidSpec:
    """The error for an option or argument of a command that is not what it has to be."""
    return InvalidSpec(
        [SpecProblem(option, value, expected)],
        what="command line",
        hint=f"`vmlab {command} --help` shows what it takes",
    )


def duration(option: str, text: str | None, *, command: str) -> timedelta | None:
    """The time that "30m" or "7d" is.

    Raises:
        InvalidSpec: it is none.
    """
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise wrong(option, text, _DURATION_RULE, command=command)
    try:
        return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
    except OverflowError:
        expected = "a time of less than some million years"
        raise wrong(option, text, expected, command=command) from None

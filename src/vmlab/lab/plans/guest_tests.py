"""Tests that ran in a guest, read from the file that they left there: JUnit XML or TAP.

The guest is not trusted: what it wrote is bounded, and whatever it is, nothing but results or
`NoResults` comes out of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from vmlab.report import Outcome

LARGEST_RESULTS: Final = 16 << 20
"""Bytes of the largest file of results that is read."""

MOST_TESTS: Final = 20_000
"""Tests of one file."""

MOST_TEXT: Final = 64 << 10
"""Characters that are kept of one text of one test."""

MOST_NAME: Final = 500
"""Characters that are kept of a name."""


class NoResults(ValueError):
    """A file that holds no results, and why, in words."""


@dataclass(frozen=True, slots=True)
class GuestTest:
    """A test that ran in the guest.

    `name` is unique in its file; `message` says why it ended so, `details` more of it;
    `duration_s` is in seconds, None where the file does not say.
    """

    name: str
    outcome: Outcome
    duration_s: float | None = None
    message: str = ""
    details: str = ""
    output: str = ""


def read_results(data: bytes) -> tuple[GuestTest, ...]:
    """The tests in a file of results, in its order.

    Args:
        data: What the guest wrote: JUnit XML, or TAP 13 or 14 (the kernel's KTAP too).

    Raises:
        NoResults: it is neither, or too large.
    """
    if len(data) > LARGEST_RESULTS:
        raise NoResults(f"it is larger than {LARGEST_RESULTS >> 20} MiB")
    if _is_xml(data):
        from vmlab.lab.plans.junit_results import parse_junit

        found = parse_junit(data)
    else:
        from vmlab.lab.plans.tap_results import parse_tap

        found = parse_tap(data)
    return tuple(_apart(found))


def _is_xml(data: bytes) -> bool:
    # UTF-16 with its byte order mark is XML as well (XML 1.0, F.1).
    text = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    return text.startswith((b"<", b"\xff\xfe<", b"\xfe\xff\0<"))


def _apart(tests: Iterable[GuestTest]) -> Iterable[GuestTest]:
    """The same, with a number after names that others have had already."""
    taken: set[str] = set()
    times: Counter[str] = Counter()
    for test in tests:
        name = test.name
        while name in taken:
            times[test.name] += 1
            name = f"{test.name} #{times[test.name] + 1}"
        taken.add(name)
        yield test if name == test.name else replace(test, name=name)


def cut(text: str, limit: int = MOST_TEXT) -> str:
    """The text, or its beginning and a word on what is missing."""
    return text if len(text) <= limit else f"{text[:limit]}\n[... {len(text) - limit} more]"


def named(*parts: str) -> str:
    """A name of several parts, in one line and not too long."""
    name = " / ".join(" ".join(part.split()) for part in parts if part.strip())
    return name[:MOST_NAME] or "unnamed"

"""JUnit XML as test runners write it: suites, cases, and why they failed.

There is no standard; what is read is what the common writers agree on (Ant's junit report task,
Maven's surefire, pytest, gtest). A document type is refused, and with it every entity of its own:
nothing is expanded, nothing is fetched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final
from xml.parsers import expat

from vmlab.lab.plans.guest_tests import (
    MOST_TESTS,
    MOST_TEXT,
    GuestTest,
    NoResults,
    cut,
    named,
)
from vmlab.report import Outcome

_DEEPEST: Final = 100
_ENDINGS: Final = {"failure": Outcome.FAIL, "error": Outcome.ERROR, "skipped": Outcome.SKIP}
_TEXTS: Final = frozenset({*_ENDINGS, "system-out", "system-err"})


@dataclass
class _Case:
    """A testcase while it is being read."""

    name: str
    duration_s: float | None
    outcomes: list[Outcome] = field(default_factory=list)
    message: str = ""
    details: str = ""
    output: str = ""

    def finished(self) -> GuestTest:
        # Written by hand or by merging, a case may have several; the worst of them counts.
        outcome = Outcome.worst(self.outcomes) if self.outcomes else Outcome.PASS
        return GuestTest(
            self.name,
            outcome,
            self.duration_s,
            cut(self.message or self.details.strip().partition("\n")[0]),
            cut(self.details),
            cut(self.output),
        )


class _Reader:
    """Takes expat's events."""

    def __init__(self) -> None:
        self.tests: list[GuestTest] = []
        self._path: list[str] = []
        self._suites: list[str] = []
        self._case: _Case | None = None
        self._text: list[str] = []
        self._length = 0

    def doctype(self, *_: object) -> None:
        raise NoResults("it has a document type, which results do not need")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        tag = _local(tag)
        if not self._path and tag not in {"testsuites", "testsuite"}:
            raise NoResults(f"its root is {tag[:60]!r}, not 'testsuites' or 'testsuite'")
        self._path.append(tag)
        if len(self._path) > _DEEPEST:
            raise NoResults(f"its elements are nested more than {_DEEPEST} deep")
        if tag in {"testsuites", "testsuite"}:
            self._suites.append(attributes.get("name", "") if tag == "testsuite" else "")
        elif tag == "testcase" and self._case is None:
            if len(self.tests) >= MOST_TESTS:
                raise NoResults(f"it has more than {MOST_TESTS} tests")
            own = ".".join(
                filter(None, (attributes.get("classname", ""), attributes.get("name", "")))
            )
            self._case = _Case(named(*self._suites, own), _seconds(attributes.get("time", "")))
        elif tag in _ENDINGS and self._case is not None:
            self._case.outcomes.append(_ENDINGS[tag])
            self._case.message = self._case.message or attributes.get("message", "")
        if tag in _TEXTS:
            self._text, self._length = [], 0

    def data(self, text: str) -> None:
        if self._path and self._path[-1] in _TEXTS and self._length <= MOST_TEXT:
            self._text.append(text)
            self._length += len(text)

    def end(self, tag: str) -> None:
        tag = _local(tag)
        self._path.pop()
        if tag in _TEXTS:
            text = "".join(self._text)
            if self._case is not None and tag in _ENDINGS:
                self._case.details += text
            elif self._case is not None:
                self._case.output += text
        elif tag == "testcase" and "testcase" not in self._path and self._case is not None:
            self.tests.append(self._case.finished())
            self._case = None
        elif tag in {"testsuites", "testsuite"}:
            self._suites.pop()


def parse_junit(data: bytes) -> list[GuestTest]:
    """The tests of a JUnit XML document, in its order.

    Raises:
        NoResults: it is none.
    """
    reader = _Reader()
    parser: Any = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = reader.doctype
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.data
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code) or "unknown"
        raise NoResults(f"it is no well-formed XML: {reason} in line {error.lineno}") from error
    except (LookupError, UnicodeError, ValueError) as error:
        if isinstance(error, NoResults):
            raise
        # An encoding that Python does not know, or that is none of characters.
        raise NoResults(f"it cannot be decoded: {error}") from error
    return reader.tests


def _local(tag: str) -> str:
    """A tag without its namespace's prefix."""
    return tag.rpartition(":")[2]


def _seconds(text: str) -> float | None:
    """A duration; writers of some locales have commas between thousands."""
    try:
        seconds = float(text.replace(",", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None

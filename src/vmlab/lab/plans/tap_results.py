"""TAP, the Test Anything Protocol: versions 12, 13 and 14, and the kernel's KTAP.

https://testanything.org/tap-version-14-specification.html;
Linux's Documentation/dev-tools/ktap.rst. A stream is its test points; the point of a subtest
stands for the indented stream before it, whose points are what is reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final

from vmlab.lab.plans.guest_tests import MOST_TESTS, GuestTest, NoResults, cut, named
from vmlab.report import Outcome

_VERSION: Final = re.compile(r"K?TAP version \d{1,3}\s*", re.IGNORECASE)
_PLAN: Final = re.compile(r"1\.\.(\d{1,9})(?:\s*#\s*(.*))?\s*")
_POINT: Final = re.compile(r"(ok|not ok)\b(?:[ \t]+(\d{1,9})\b)?[ \t]*(.*)", re.DOTALL)
_DIRECTIVE: Final = re.compile(
    r"(?<!\\)(?:^|[ \t])#[ \t]*(skip\S*|todo)\b[ \t]*(.*)", re.IGNORECASE
)
_XFAIL: Final = re.compile(
    r"(?<!\\)(?:^|[ \t])#[ \t]*(xfail|timeout|error)\b[ \t]*(.*)", re.IGNORECASE
)
_DEEPEST: Final = 50
_LONGEST_LINE: Final = 64 << 10
_MOST_LINES: Final = 1_000_000


@dataclass
class _Stream:
    """One level of indentation while it is being read."""

    indent: int
    planned: int | None = None
    skipped: str | None = None
    seen: int = 0
    disorder: str = ""
    tests: list[GuestTest] = field(default_factory=list)
    inner: list[GuestTest] = field(default_factory=list)
    """What subtests have reported whose point has not come yet."""

    def finished(self, bailed: str | None) -> list[GuestTest]:
        """Its tests, and an error where they are not those that it had planned."""
        found = [*self.tests, *self.inner]
        wrong = ""
        if bailed is not None:
            wrong = f"bailed out: {bailed}" if bailed else "bailed out"
        elif self.planned is None:
            wrong = "it ends without a plan: whoever wrote it may have died"
        elif self.seen != self.planned:
            wrong = f"{self.planned} tests were planned, and {self.seen} ran"
        elif self.disorder:
            wrong = self.disorder
        if wrong:
            found.append(GuestTest("plan", Outcome.ERROR, message=wrong))
        elif self.skipped is not None and not found:
            reason = self.skipped or "no reason given"
            found.append(GuestTest("all tests", Outcome.SKIP, message=reason))
        return found


class _Reader:
    def __init__(self) -> None:
        self.streams = [_Stream(0)]
        self.bailed: str | None = None
        self.known = False
        self._yaml: tuple[int, list[str]] | None = None
        self._count = 0

    def line(self, line: str) -> None:
        """Take one line without its end."""
        bare = line.lstrip(" ")
        indent = len(line) - len(bare)
        if self._yaml is not None and self._in_yaml(indent, bare):
            return
        if self.bailed is not None:
            return
        if bare.startswith("#"):
            return
        if bare.startswith("Bail out!"):
            self.known = True
            self.bailed = bare.removeprefix("Bail out!").strip()
            return
        if bare.rstrip() == "---" and indent > self.streams[-1].indent:
            self._yaml = (indent, [])
            return
        if _VERSION.fullmatch(bare):
            self.known = True
            self._at(indent)
        elif found := _PLAN.fullmatch(bare):
            self._plan(self._at(indent), int(found[1]), found[2])
        elif found := _POINT.fullmatch(bare):
            self._point(self._at(indent), found[1] == "ok", found[2], found[3].rstrip())
        # Anything else is what the tests printed, and is no part of the stream.

    def _at(self, indent: int) -> _Stream:
        """The stream of a line that has `indent`; deeper ones end, one that is not there begins."""
        ended = self._end_deeper(indent)
        if indent > self.streams[-1].indent:
            if len(self.streams) >= _DEEPEST:
                raise NoResults(f"its subtests are nested more than {_DEEPEST} deep")
            self.streams.append(_Stream(indent))
        self.streams[-1].inner += ended
        return self.streams[-1]

    def _end_deeper(self, indent: int) -> list[GuestTest]:
        """End the streams that are deeper than `indent`; what they have reported."""
        ended: list[GuestTest] = []
        while indent < self.streams[-1].indent:
            self.streams[-1].inner += ended
            ended = self.streams.pop().finished(self.bailed)
        return ended

    def _plan(self, stream: _Stream, planned: int, rest: str | None) -> None:
        self.known = True
        stream.planned = planned
        told = re.fullmatch(r"(?i:skip\S*)\s*(.*)", rest or "")
        if planned == 0:
            stream.skipped = told[1].strip() if told else (rest or "").strip()

    def _point(self, stream: _Stream, ok: bool, number: str | None, rest: str) -> None:
        self.known = True
        self._count += 1
        if self._count > MOST_TESTS:
            raise NoResults(f"it has more than {MOST_TESTS} tests")
        stream.seen += 1
        if number is not None and int(number) != stream.seen and not stream.disorder:
            stream.disorder = f"test {stream.seen} has the number {number}"
        outcome = Outcome.PASS if ok else Outcome.FAIL
        message = ""
        if directive := _DIRECTIVE.search(rest):
            rest, message = rest[: directive.start()], directive[2].strip()
            if directive[1].lower().startswith("skip"):
                outcome = Outcome.SKIP
            elif not ok:
                outcome = Outcome.XFAIL
            message = message or ("no reason given" if outcome is Outcome.SKIP else "to be done")
        elif directive := _XFAIL.search(rest):
            rest, message = rest[: directive.start()], directive[0].strip(" \t#")
            if directive[1].lower() == "xfail" and not ok:
                outcome = Outcome.XFAIL
        described = re.sub(r"\\([#\\])", r"\1", rest.removeprefix("- ").strip())
        name = described or f"test {stream.seen}"
        inner, stream.inner = stream.inner, []
        # A subtest's own points say what its point sums up; what they do not say, it does.
        if inner:
            stream.tests += [replace(test, name=named(name, test.name)) for test in inner]
            if outcome is not Outcome.FAIL or not all(test.outcome.ok for test in inner):
                return
        stream.tests.append(GuestTest(named(name), outcome, message=cut(message)))

    def _in_yaml(self, indent: int, bare: str) -> bool:
        """Whether a line belongs to the block that details the last point."""
        assert self._yaml is not None
        opened, lines = self._yaml
        if indent >= opened and bare.rstrip() != "...":
            lines.append(bare if indent == opened else " " * (indent - opened) + bare)
            return True
        if not bare:
            lines.append("")
            return True
        self._yaml = None
        tests = self.streams[-1].tests
        if tests:
            details = "\n".join(lines)
            told = re.search(r"^message:[ \t]*(.*)$", details, re.MULTILINE)
            duration = re.search(r"^duration_ms:[ \t]*([0-9.]{1,20})\s*$", details, re.MULTILINE)
            tests[-1] = replace(
                tests[-1],
                details=cut(details),
                message=tests[-1].message or cut(told[1].strip(" \"'") if told else ""),
                duration_s=_milliseconds(duration[1]) if duration else None,
            )
        return bare.rstrip() == "..."

    def finished(self) -> list[GuestTest]:
        """All tests, now that there are no more lines."""
        if self._yaml is not None:
            self._in_yaml(-1, "...")
        self._at(0)
        return self.streams[0].finished(self.bailed)


def parse_tap(data: bytes) -> list[GuestTest]:
    """The tests of a TAP stream, in its order.

    Raises:
        NoResults: it is none.
    """
    reader = _Reader()
    text = data.decode("utf-8", "backslashreplace").removeprefix("\ufeff")
    if text.count("\n") + text.count("\r") > _MOST_LINES:
        raise NoResults(f"it has more than {_MOST_LINES} lines")
    for line in re.split(r"\r\n|\n|\r", text):
        reader.line(line[:_LONGEST_LINE].expandtabs(4))
    if not reader.known:
        raise NoResults("it is neither JUnit XML nor TAP")
    return reader.finished()


def _milliseconds(text: str) -> float | None:
    try:
        return float(text) / 1000
    except ValueError:
        return None

"""Finds the kernel's reports of panics and faults in what a console prints, as it comes.

The bytes may be cut anywhere and be anything. What comes out depends on the bytes alone, but for
`flush`, by which a report that has no last line ends when the console has been quiet.

A line is the kernel's if its message stands behind printk's time ("[   12.345678] ", kernel/printk/
printk.c: print_time and print_caller), also in the middle of a line: user space may have left one
unfinished. Where the kernel prints no times, its messages are looked for at the beginning of lines,
and nothing tells them from a user's. A line that was there before, time and all, is of a log that
somebody prints.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vmlab.lab.console_rules import DEFAULT, OwnRule, Rules, Text, text_of
from vmlab.lab.incident import IncidentKind

LONGEST_LINE: Final = 4096
"""Bytes of a line that are looked at; printk's longest has 1024 (PRINTKRB_RECORD_MAX)."""
MOST_LINES: Final = 400
"""Lines of a report that are kept; of a longer one the first and the last."""
_UNMARKED_LINES: Final = 150
"""Lines after which a report that nothing marks the end of is over."""
_LONGEST_REPORT: Final = 20_000
"""Lines after which every report is over."""
_TAIL: Final = 100
"""How many of these are its last ones."""
_HEADERS_KEPT: Final = 4096

_STAMP: Final = re.compile(r"(?:<\d{1,3}>)?\[ *(\d{1,10})\.(\d{6})\](?:\[ *[TC]\d+\])? ?")
_LEVEL: Final = re.compile(r"<\d{1,3}>")
_ESCAPES: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
)
"""CSI and OSC sequences and two-byte escapes (ECMA-48, 5.4 and 8.3.89)."""
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]")
_BANNER: Final = re.compile(r"Linux version \d")
_CUT: Final = re.compile(r"-{12}\[ cut here \]-{12}$|8<--- cut here ---$")
"""CUT_HERE of include/asm-generic/bug.h; WARN's own words follow (__warn_printk)."""
_RULER: Final = re.compile(r"={16,}$")
_MOST_BEFORE: Final = 12
"""Lines from there to the one that tells what it is about."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A report on a console.

    Attributes:
        kind: What it tells of.
        message: Its first line that tells something, without its time.
        excerpt: All of it, lines with their times.
        rule: Name of the user's own rule, if it was one.
    """

    kind: IncidentKind
    message: str
    excerpt: str
    rule: str = ""


@dataclass(slots=True)
class _Report:
    """A report under way."""

    text: Text
    message: str
    head: list[str] = field(default_factory=list)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL))
    count: int = 0

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.head) < MOST_LINES - _TAIL:
            self.head.append(line)
        else:
            self.tail.append(line)

    def ends_with(self, message: str) -> bool:
        """Whether that is its last line."""
        end = self.text.end
        if end is None:
            return self.count >= _UNMARKED_LINES
        return end.search(message) is not None or self.count >= _LONGEST_REPORT

    def finding(self) -> Finding:
        left_out = self.count - len(self.head) - len(self.tail)
        gap = [f"[... {left_out} lines left out ...]"] if left_out else []
        return Finding(self.text.kind, self.message, "\n".join([*self.head, *gap, *self.tail]))


@dataclass(slots=True)
class _OwnReport:
    """Lines of a finding of the user's own, until there are as many as wanted."""

    rule: OwnRule
    message: str
    lines: list[str] = field(default_factory=list)

    def finding(self) -> Finding:
        return Finding(IncidentKind.PATTERN, self.message, "\n".join(self.lines), self.rule.name)


class ConsoleScanner:
    """Reads along what a console prints.

    Args:
        rules: What is looked for, and what of it counts.
        stamped: Whether the kernel's lines begin with a time; None is found out: as long as there
            was no such line, both kinds are looked for.

    Attributes:
        stamped: The same, as far as it is known.
    """

    def __init__(self, rules: Rules = DEFAULT, *, stamped: bool | None = None) -> None:
        self.rules = rules
        self.stamped = rules.printk_time if stamped is None else stamped
        self._line = bytearray()
        self._before: list[str] = []
        self._report: _Report | None = None
        self._own: list[_OwnReport] = []
        self._headers: dict[str, None] = {}

    @property
    def under_way(self) -> IncidentKind | None:
        """What the report tells of that has begun and not ended, if there is one."""
        return self._report.text.kind if self._report is not None else None

    @property
    def awaits_end(self) -> bool:
        """Whether a report is under way whose last line will be known as such."""
        return self._report is not None and self._report.text.end is not None

    @property
    def busy(self) -> bool:
        """Whether a report is under way that more lines may belong to."""
        return self._report is not None or bool(self._own)

    def feed(self, data: bytes) -> list[Finding]:
        """The next bytes; returns the reports that are complete now."""
        found: list[Finding] = []
        head, *rest = re.split(rb"[\r\n]", data)
        self._add(head)
        for part in rest:
            found += self._take()
            self._add(part)
        return found

    def settle(self) -> list[Finding]:
        """The console is quiet; returns the reports that were not complete."""
        found = self._end_report()
        found += [own.finding() for own in self._own]
        self._own.clear()
        return found

    def flush(self) -> list[Finding]:
        """Nothing more comes; returns what was not complete, the last line included."""
        return self._take() + self.settle()

    def restarted(self) -> list[Finding]:
        """The guest begins anew, and its times at 0; what was under way is over."""
        found = self.flush()
        self._headers.clear()
        return found

    def _add(self, part: bytes) -> None:
        self._line += part[: LONGEST_LINE - len(self._line)]

    def _take(self) -> list[Finding]:
        """The line is whole."""
        if not self._line:
            return []
        line = self._line.decode("utf-8", "replace")
        self._line.clear()
        line = _CONTROL.sub("", _ESCAPES.sub("", line)).rstrip()
        return list(self._look(line)) if line else []

    def _look(self, line: str) -> Iterator[Finding]:
        message, kernel = self._message(line)
        yield from self._own_rules(line, kernel=kernel)
        if not kernel:
            return
        text = text_of(message)
        if text is not None and self._was_there(line, message):
            # Somebody prints a log.
            yield from self._end_report()
            self._before.clear()
            return
        if _BANNER.match(message):
            yield from self._end_report()
        report = self._report
        if text is not None and (report is None or report.text.kind not in text.continues):
            yield from self._end_report()
            self._report = report = _Report(text, message)
            for earlier in self._before:
                report.add(earlier)
        if report is not None:
            report.add(line)
            if text is not None and text.kind is IncidentKind.OOM_KILL:
                # Who was killed says more than who had asked for memory.
                report.message = message
            if report.ends_with(message):
                yield from self._end_report()
        self._remember(line, message)

    def _remember(self, line: str, message: str) -> None:
        """Keep what stands before the first line that tells something."""
        if _CUT.match(message) or _RULER.match(message):
            self._before = [line]
        elif self._report is not None or not 0 < len(self._before) < _MOST_BEFORE:
            self._before.clear()
        elif _RULER.search(self._before[0]):
            # What it rules off begins right below.
            self._before.clear()
        else:
            self._before.append(line)

    def _message(self, line: str) -> tuple[str, bool]:
        """What the kernel says in a line, and whether it is one of the kernel's."""
        if self.stamped is not False:
            messages = [line[stamp.end() :] for stamp in _STAMP.finditer(line)]
            if messages:
                self.stamped = True
                told = (message for message in messages if text_of(message) is not None)
                return next(told, messages[0]), True
        level = _LEVEL.match(line)
        return line[level.end() :] if level else line, not self.stamped

    def _was_there(self, line: str, message: str) -> bool:
        """Whether the kernel's line was there before, with the same time."""
        if not self.stamped:
            return False
        *_, stamp = _STAMP.finditer(line[: len(line) - len(message)])
        header = f"{stamp[1]}.{stamp[2]} {message}"
        if header in self._headers:
            return True
        self._headers[header] = None
        if len(self._headers) > _HEADERS_KEPT:
            del self._headers[next(iter(self._headers))]
        return False

    def _own_rules(self, line: str, *, kernel: bool) -> Iterator[Finding]:
        self._own += [_OwnReport(rule, line) for rule in self.rules.own(line, kernel=kernel)]
        for own in list(self._own):
            own.lines.append(line)
            if len(own.lines) >= own.rule.lines:
                self._own.remove(own)
                yield own.finding()

    def _end_report(self) -> list[Finding]:
        report, self._report = self._report, None
        if report is None:
            return []
        finding = report.finding()
        return [] if self.rules.ignores(finding.message, finding.excerpt) else [finding]

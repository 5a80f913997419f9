"""Finds in a console what a test died of, so that a reader need not look for it.

A line that a message of the attempt quotes counts most; then those with which Linux says that
something is wrong with it (kernel/panic.c, lib/bug.c, mm/oom_kill.c, kernel/hung_task.c,
kernel/watchdog.c); then a line that a message repeats among other words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmlab.report.escape import escape_controls
from vmlab.report.model import Attempt, Severity

__all__ = ["Line", "console_lines", "quoted"]

_SHORTEST_QUOTE: Final = 12
"""Characters of a quoted line: a shorter one ("---", "done") says little about where it is from."""

_SAID_BY_LINUX: Final = re.compile(
    r"Kernel panic - not syncing"
    r"|\bOops(?::|\s-\s)"
    r"|\bBUG: "
    r"|\bkernel BUG at "
    r"|\bWARNING: CPU: \d+ PID: \d+"
    r"|Unable to handle kernel "
    r"|general protection fault"
    r"|Out of memory: Killed process"
    r"|oom-kill:"
    r"|INFO: task .* blocked for more than"
    r"|watchdog: BUG: soft lockup"
    r"|rcu: INFO: rcu_\w+ (?:self-)?detected stall"
)


@dataclass(frozen=True)
class Line:
    """One line of a console; `cause` where it tells what went wrong."""

    text: str
    cause: bool = False


def quoted(attempt: Attempt) -> frozenset[str]:
    """The lines that the attempt's error messages quote, as `console_lines` compares them."""
    texts = [
        text
        for message in attempt.messages
        if message.severity is Severity.ERROR
        for text in (message.text, message.details)
    ]
    lines = (_bare(line) for text in texts for line in text.splitlines())
    return frozenset(line for line in lines if len(line) >= _SHORTEST_QUOTE)


def console_lines(text: str, quotes: Iterable[str] = ()) -> list[Line]:
    """The lines of what a console printed, with the causes marked.

    Controls are written out, and CR LF, as a serial line sends it, is one end of a line.

    Args:
        text: As it was printed.
        quotes: What `quoted` found.
    """
    plain = escape_controls(text.replace("\r\n", "\n").replace("\r\r\n", "\n"))
    lines = plain.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    known = [quote for quote in quotes if quote]
    bare = [_bare(line) for line in lines]
    found = {n for n, line in enumerate(bare) if any(quote in line for quote in known)}
    if not found:
        found = {n for n, line in enumerate(lines) if _SAID_BY_LINUX.search(line)}
    if not found:  # a message may say more than the line it is about
        long = [(n, line) for n, line in enumerate(bare) if len(line) >= _SHORTEST_QUOTE]
        found = {n for n, line in long if any(line in quote for quote in known)}
    return [Line(line, position in found) for position, line in enumerate(lines)]


def _bare(line: str) -> str:
    """A line without what differs between a console and a quotation of it."""
    return " ".join(escape_controls(line.strip()).split())

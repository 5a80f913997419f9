"""What ends a test that did not end by itself: the death of its machine, or of its time."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

# What pytest.fail.Exception is, by the name that a type checker knows.
from _pytest.outcomes import Failed

from vmlab.machine.errors import VmlabError


class TestEnded(Failed):
    """Raised inside a test from outside; no `except Exception` of the test's holds it up.

    One of pytest's own outcomes: fixtures that it ends are remembered as failed.
    """

    # As pytest's own: its short summary has room for what happened, not for where this stands.
    __module__ = "builtins"

    __test__ = False  # not a class of tests, whatever pytest thinks of its name

    fatal = False
    """Whether the test could not do its work."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MachineDied(TestEnded):
    """A machine of the test's died or fell ill.

    Args:
        machine: Its name.
        kind: What happened, as "panic".
        message: The same in a sentence.
        excerpt: What was seen of it on the console.
        fatal: Whether the machine cannot go on.
    """

    __module__ = "builtins"

    def __init__(
        self, machine: str, kind: str, message: str, excerpt: str = "", *, fatal: bool = True
    ) -> None:
        shown = "".join(f"\n  {line}" for line in excerpt.splitlines())
        super().__init__(f"machine {machine!r}: {message}{shown}")
        self.machine = machine
        self.kind = kind
        self.excerpt = excerpt
        self.fatal = fatal


class OutOfTime(TestEnded):
    """A test with machines took longer than its time."""

    __module__ = "builtins"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"the test did not end within {seconds:g} s\n"
            "hint: timeout= of its mark, or --vm-timeout, gives it more"
        )


def shown(error: BaseException) -> str:
    """An error as the user is told of it: its message and its hint."""
    if isinstance(error, TestEnded):
        return error.message
    if isinstance(error, VmlabError):
        hint = [f"hint: {error.hint}"] if error.hint else []
        return "\n".join(dict.fromkeys([str(error), *getattr(error, "__notes__", ()), *hint]))
    return f"{type(error).__name__}: {error}"


def passes_through(error: BaseException, test: Path) -> bool:
    """Whether an error was raised by the code of a test, or by what that called."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(test):
            return True
        trace = trace.tb_next
    return False


def without_inner_frames(
    trace: TracebackType | None, test: Path, inside: Path
) -> TracebackType | None:
    """A traceback that ends where the code of a test called into files below `inside`.

    Args:
        trace: The whole of it, or None.
        test: The file of the test.
        inside: The directory whose code is of no interest.
    """
    entries: list[TracebackType] = []
    while trace is not None:
        entries.append(trace)
        trace = trace.tb_next
    files = [entry.tb_frame.f_code.co_filename for entry in entries]
    if str(test) not in files:
        return entries[0] if entries else None
    begin = files.index(str(test))
    inner = f"{inside}{os.sep}"
    end = next((n for n in range(begin, len(files)) if files[n].startswith(inner)), len(files))
    kept: TracebackType | None = None
    for entry in reversed(entries[:end]):
        kept = TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return kept

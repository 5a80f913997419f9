"""Into the background: a process of its own session, without a terminal, that logs to a file.

Whoever starts it waits until it answers, and is told what went wrong if it does not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vmlab.machine.errors import OperationFailed, VmlabError, from_record

__all__ = ["detached"]

_LARGEST_LOG: Final = 16 << 20
"""Bytes from which on a log is put aside, in the place of the one that was before."""

_EXCERPT: Final = 4096
_LINES: Final = 3
"""Bytes and lines of its log that the error of one that ended quotes."""

Ready = Callable[[Mapping[str, Any]], None]


def detached(log: Path, life: Callable[[Ready], None]) -> dict[str, Any]:
    """Fork, and have the child live `life`; returns what it says when it is ready.

    The child never returns: it ends with `life`. There must be no other thread.

    Args:
        log: What the child's stdout and stderr are appended to.
        life: What it does; it calls its argument with facts when it is ready.

    Raises:
        VmlabError: what `life` raised before it was ready.
        OperationFailed: it ended without a word.
    """
    reading, writing = os.pipe()
    before = log.stat().st_size if log.exists() else 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if os.fork() == 0:
        os.close(reading)
        raise SystemExit(_child(log, life, writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    if not said:
        error = OperationFailed(
            "the manager ended before it answered", hint=f"{log} tells why, at its end"
        )
        for line in _last_words(log, before):
            error.add_note(line)
        raise error
    facts: dict[str, Any] = json.loads(said)
    if "error" in facts:
        raise from_record(facts["error"])
    return facts


def _child(log: Path, life: Callable[[Ready], None], writing: int) -> int:
    """Live in the background; returns the exit status."""
    os.setsid()
    _redirect(log)
    # No directory is kept from being unmounted.
    os.chdir("/")
    told = False

    def tell(facts: Mapping[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            # Whoever started it may be gone by now.
            with suppress(BrokenPipeError):
                os.write(writing, json.dumps(facts).encode())
            os.close(writing)

    try:
        life(tell)
    except VmlabError as error:
        print(f"error: {error}", file=sys.stderr)
        tell({"error": error.to_record()})
        return error.exit_code
    return 0


def _last_words(log: Path, before: int) -> list[str]:
    """The last lines of a log that were not there before; all may be new, if it was put aside."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(before if before <= size else 0, size - _EXCERPT))
        return file.read().decode("utf-8", "replace").strip().splitlines()[-_LINES:]
    return []


def _redirect(log: Path) -> None:
    with suppress(FileNotFoundError):
        if log.stat().st_size > _LARGEST_LOG:
            log.replace(log.with_name(f"{log.name}.1"))
    into = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for source, target in ((null, 0), (into, 1), (into, 2)):
        os.dup2(source, target)
    os.close(into)
    os.close(null)

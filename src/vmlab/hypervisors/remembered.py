"""What a probe found, kept for the next process while what it looked at has not changed.

A cache, never a record: a file that is damaged, or cannot be written, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

__all__ = ["facts_of", "remembered"]


def remembered(
    question: str, about: Sequence[int | str], ask: Callable[[], Any | None]
) -> Any | None:
    """The answer to a question, from an earlier process or by asking now.

    Args:
        question: What is asked; one answer is kept for each.
        about: Facts about what is looked at; the answer holds while they are the same.
        ask: Gives the answer, as JSON has it; None is not kept.
    """
    name = hashlib.sha256(question.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = platformdirs.user_cache_path("vmlab", appauthor=False) / "probes" / f"{name}.json"
    facts = list(about)
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads(path.read_bytes())
        if kept["question"] == question and kept["about"] == facts:
            return kept["answer"]
    answer = ask()
    if answer is not None:
        data = {"question": question, "about": facts, "answer": answer}
        with suppress(OSError):
            _replace(path, json.dumps(data).encode("utf-8", "surrogateescape"))
    return answer


def _replace(path: Path, data: bytes) -> None:
    """Make `data` the contents of a file; whoever reads it meanwhile sees the old or the new."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def facts_of(path: str) -> tuple[int, ...]:
    """What changes when a file is replaced or changed: size, times in ns, inode, device, mode.

    Raises:
        OSError: there is no such file.
    """
    found = os.stat(path)  # noqa: PTH116 (a device's path is as good as a file's)
    return (
        found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_rdev,
        found.st_mode, found.st_uid, found.st_gid,
    )  # fmt: skip

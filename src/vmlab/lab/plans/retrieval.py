"""Files out of a guest by patterns: what a phase leaves, kept or read.

The guest is not trusted: how many files, how many bytes and how long is decided here, and no name
of the guest's becomes a path of the host's by itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmlab.guests.command import CommandResult, quote
from vmlab.guests.guest import Guest
from vmlab.machine.errors import VmlabError

MOST_FILES: Final = 2000
"""Files that one phase's patterns may match."""

MOST_BYTES: Final = 2 << 30
"""Bytes that are kept of all of them together."""

_LIST_TIMEOUT: Final = 120.0
_FILE_TIMEOUT: Final = 600.0
_LONGEST_LIST: Final = 8 << 20
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")

# Without a field separator an unquoted variable is a pattern, and never two words.
_EXPAND: Final = """IFS=
for pattern in {patterns}; do
    for found in $pattern; do
        if [ -d "$found" ]; then find "$found/" -type f -print0
        elif [ -f "$found" ]; then printf '%s\\0' "$found"
        fi
    done
done
"""


@dataclass(slots=True)
class Retrieved:
    """What came out: files of the guest with where they are now, and what is to be told."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


async def find_files(guest: Guest, patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The regular files that patterns match, those in directories too, and remarks on them.

    Raises:
        VmlabError: the guest does not answer.
    """
    held = bytearray()

    async def take(data: bytes) -> None:
        held.extend(data[: max(0, _LONGEST_LIST - len(held))])

    script = _EXPAND.format(patterns=" ".join(quote(pattern) for pattern in patterns))
    await guest.execute(script, stdout=take, timeout=_LIST_TIMEOUT)
    names = [part.decode("utf-8", "surrogateescape") for part in bytes(held).split(b"\0")[:-1]]
    found = sorted({re.sub("/{2,}", "/", name) for name in names})
    remarks = []
    if len(found) > MOST_FILES:
        remarks.append(f"{len(found)} files match, of which {MOST_FILES} are taken")
        del found[MOST_FILES:]
    return found, remarks


async def read_file(guest: Guest, path: str, limit: int) -> bytes:
    """The first `limit` bytes of a file, and one more if there are more.

    Raises:
        VmlabError: it cannot be read, or the guest does not answer.
    """
    held = bytearray()

    async def take(data: bytes) -> None:
        held.extend(data[: max(0, limit + 1 - len(held))])

    result = await guest.execute(
        f"head -c {limit + 1} < {quote(path)}", stdout=take, timeout=_FILE_TIMEOUT
    )
    if not result.ok:
        raise VmlabError(f"cannot read {path!r} in the guest: {result.stderr.strip()}")
    return bytes(held)


async def retrieve(guest: Guest, patterns: Sequence[str], directory: Path) -> Retrieved:
    """Copy the files that patterns match to `directory`, which is made.

    Raises:
        VmlabError: the guest does not answer.
        OSError: they cannot be written here.
    """
    retrieved = Retrieved()
    found, retrieved.remarks = await find_files(guest, patterns)
    if not found:
        retrieved.remarks.append(f"no file matches {', '.join(patterns)}")
    left = MOST_BYTES
    for path in found:
        if left <= 0:
            retrieved.remarks.append(f"files after {MOST_BYTES >> 30} GiB are left out: {path}")
            break
        target = _target(directory, path)
        result, size = await _fetch(guest, path, target, left)
        if not result.ok:
            retrieved.remarks.append(f"cannot read {path}: {result.stderr.strip()[:500]}")
        if size > left:
            retrieved.remarks.append(f"{path} is cut: more than {MOST_BYTES >> 30} GiB in all")
        left -= size
        if result.ok or size:
            retrieved.files.append((path, target))
    return retrieved


async def _fetch(guest: Guest, path: str, target: Path, limit: int) -> tuple[CommandResult, int]:
    """Copy at most `limit` bytes of a file; how that went, and the bytes that came."""
    size = 0
    # In pieces as they come: a file may be larger than this host's memory.
    with target.open("wb") as file:

        async def keep(data: bytes) -> None:
            nonlocal size
            file.write(data[: max(0, limit - size)])
            size += len(data)

        result = await guest.execute(
            f"head -c {limit + 1} < {quote(path)}", stdout=keep, timeout=_FILE_TIMEOUT
        )
    return result, size


def _target(directory: Path, path: str) -> Path:
    """A place of its own for a guest's file, in one directory of the host's."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = path.encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(raw).hexdigest()[:12]
    return directory / f"{digest}-{_UNSAFE.sub('_', path).strip('._')[-80:]}"

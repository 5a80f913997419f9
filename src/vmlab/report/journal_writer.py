"""The writing side of a journal (`journal.py` is the reading side): one process's lines and files.

Shared by the recorder of a run and those of its attempts. Not for callers outside the package.
"""

from __future__ import annotations

import hashlib
import io
import json
import mimetypes
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from pydantic import BaseModel, ValidationError

from vmlab.machine.errors import VmlabError
from vmlab.report.durable import AppendFile, cannot_write
from vmlab.report.escape import escape_surrogates
from vmlab.report.host import clock_identity
from vmlab.report.journal import ARTIFACTS, VERSION
from vmlab.report.parts import PARTS, Artifact, Part

__all__ = ["Clock", "JournalWriter", "made", "plain"]

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")
_COPY_BYTES: Final = 1 << 20

_KINDS: Final[dict[type[BaseModel], str]] = {kind: name for name, kind in PARTS.items()}


@dataclass(frozen=True)
class Clock:
    """Where times come from: `now` for people, `monotonic` (seconds) for durations and order."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    monotonic: Callable[[], float] = time.monotonic


_Made = TypeVar("_Made", bound=BaseModel)


def made(kind: type[_Made], /, **values: Any) -> _Made:
    """A record of `kind`, or a VmlabError that names the field, its value and what is right."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        name = _KINDS.get(kind, kind.__name__.lower())
        raise VmlabError(
            f"{name} cannot be recorded: {where} = {first['input']!r}: {first['msg']}",
            hint="correct the call that records it",
        ) from error


def plain(record: BaseModel) -> dict[str, Any]:
    """`record` as JSON data, without what is not stated."""
    return record.model_dump(mode="json", exclude_defaults=True)


class JournalWriter:
    """One process's journal and the files that it keeps as evidence; safe for any threads."""

    def __init__(
        self,
        directory: Path,
        file: AppendFile,
        *,
        worker: str,
        clock: Clock,
        run: Mapping[str, Any] | None,
    ) -> None:
        self.directory = directory
        self.worker = worker
        self.clock = clock
        self._file = file
        self._lock = threading.Lock()
        self._serials = 0
        self._opened = clock.monotonic()
        facts = {
            "journal": VERSION,
            "worker": worker,
            "clock": clock_identity(),
            "at": clock.now(),
            "run": run,
        }
        try:
            self.write("open", facts, durable=True)
        except VmlabError:
            file.abandon()
            raise

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def write(self, event: str, facts: Mapping[str, Any], *, durable: bool = False) -> None:
        """Append one event; `durable` ones are on the disk afterwards, as the policy allows."""
        line = json.dumps({"event": event, **facts}, default=_as_json, separators=(",", ":"))
        self._file.append(line.encode("ascii"), durable=durable)

    def part(self, number: int | None, part: Part) -> None:
        """Append a part of attempt `number`, or of the run."""
        kind = _KINDS[type(part)]
        self.write(kind, {"n": number, kind: plain(part)})

    def serial(self) -> int:
        """A number that this journal has not used yet, from 1."""
        with self._lock:
            self._serials += 1
            return self._serials

    def since(self, monotonic: float) -> float:
        """Seconds since the clock's `monotonic` reading, never negative."""
        return max(0.0, self.clock.monotonic() - monotonic)

    def attach(
        self,
        number: int | None,
        name: str,
        content: bytes | bytearray | str | Path,
        media_type: str | None,
    ) -> Artifact:
        """Store `content` in the run's directory and append it as an artifact."""
        shown = str(escape_surrogates(name))
        safe = _UNSAFE.sub("_", shown).strip(".")[-80:] or "artifact"
        relative = f"{ARTIFACTS}/{self.worker}-{self.serial()}-{safe}"
        sha256, size = _keep(content, self.directory / relative)
        artifact = made(
            Artifact,
            name=shown,
            path=relative,
            media_type=media_type or _guessed_media_type(shown),
            sha256=sha256,
            size=size,
        )
        self.part(number, artifact)
        return artifact

    def close(self) -> None:
        """Append the journal's end and close it."""
        try:
            facts = {"at": self.clock.now(), "duration_s": self.since(self._opened)}
            self.write("close", facts, durable=True)
        finally:
            self._file.close()


def _as_json(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()


def _guessed_media_type(name: str) -> str:
    if name.endswith((".log", ".dmesg")):
        return "text/plain"
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def _keep(content: bytes | bytearray | str | Path, target: Path) -> tuple[str, int]:
    """Store `content` as `target`; returns its SHA-256 and its size in bytes."""
    if isinstance(content, Path):
        try:
            source: BinaryIO = content.open("rb")
        except OSError as error:
            raise VmlabError(
                f"cannot keep {content} as evidence: {error.strerror or error}",
                hint="attach a file that exists, or its contents as bytes or text",
            ) from error
    else:
        data = str(escape_surrogates(content)).encode() if isinstance(content, str) else content
        source = io.BytesIO(data)
    digest = hashlib.sha256()
    size = 0
    try:
        with source:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                while piece := source.read(_COPY_BYTES):
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise cannot_write(target, error) from error
    return digest.hexdigest(), size

"""A suite's Release file: who it is, when it was made, and the SHA-256 of every index.

Follows Debian's repository format (DebianRepository/Format in its wiki) and apt-secure(8).
The signature is verified before anything is read.
"""

from __future__ import annotations

import email.utils
import hashlib
import time
from dataclasses import dataclass, field

from vmlab.images.debian.openpgp import verify
from vmlab.images.errors import FormatError, UntrustedArchive
from vmlab.images.formats.control import paragraph

# apt's default for Acquire::Max-FutureTime is 10 s; a minute forgives a virtual machine's clock.
_SECONDS_IN_FUTURE = 60


@dataclass(frozen=True)
class IndexFile:
    """An index's path below dists/SUITE, its size in bytes, and its SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Release:
    """A verified Release file. Times are seconds since 1970; `digest` is of the whole InRelease."""

    suite: str
    codename: str
    date: int
    valid_until: int | None
    by_hash: bool
    signers: tuple[str, ...]
    digest: str
    files: dict[str, IndexFile] = field(repr=False)
    origin: str = ""
    version: str = ""

    def find(self, path: str) -> IndexFile | None:
        """The index of that path below dists/SUITE, if the suite has it."""
        return self.files.get(path)


def read(
    message: bytes,
    *,
    suite: str,
    keys: tuple[bytes, ...],
    source: str,
    check_date: bool = True,
    check_valid_until: bool = True,
    now: float | None = None,
) -> Release:
    """The Release file in a clear-signed `InRelease`.

    Args:
        message: The file's bytes.
        suite: The suite or codename that was asked for.
        keys: The keyrings to trust.
        source: The file's name, for errors.
        check_date: Refuse a file from the future.
        check_valid_until: Refuse a file that has expired.
        now: The present time, seconds since 1970.

    Raises:
        UntrustedArchive: the signature, the suite's name or a date is not what it has to be.
        FormatError: it is signed, but not a Release file.
    """
    verified = verify(message, keys, source=source)
    fields = paragraph(verified.text.decode("utf-8", "replace"), source=source)
    release = Release(
        suite=fields.get("Suite", ""),
        codename=fields.get("Codename", ""),
        date=_time(fields, "Date", source) or 0,
        valid_until=_time(fields, "Valid-Until", source),
        by_hash=fields.get("Acquire-By-Hash", "no").lower() == "yes",
        signers=verified.signers,
        digest=hashlib.sha256(message).hexdigest(),
        files=_files(fields.get("SHA256", ""), source),
        origin=fields.get("Origin", ""),
        version=fields.get("Version", ""),
    )
    _check_name(release, suite, source)
    if not release.date:
        raise FormatError(f"{source} has no Date")
    now = time.time() if now is None else now
    if check_date and release.date > now + _SECONDS_IN_FUTURE:
        raise UntrustedArchive(
            f"{source} was made in the future: {fields['Date']}",
            hint="set this host's clock; apt's Acquire::Check-Date \"false\" turns the check off",
        )
    if check_valid_until and release.valid_until is not None and release.valid_until < now:
        raise UntrustedArchive(
            f"{source} has expired: Valid-Until is {fields['Valid-Until']}",
            hint="use a mirror that is up to date; for a snapshot of the past, set apt's "
            'Acquire::Check-Valid-Until "false" or images.check_valid_until = false',
        )
    return release


def _check_name(release: Release, suite: str, source: str) -> None:
    """A mirror must not pass one suite off as another; both are signed by the same keys."""
    if suite not in (release.suite, release.codename):
        raise UntrustedArchive(
            f"{source} is of the suite {release.suite!r} (codename {release.codename!r}), "
            f"not of {suite!r}",
            hint="the mirror serves another suite under this name; try another mirror",
        )


def _time(fields: dict[str, str], name: str, source: str) -> int | None:
    text = fields.get(name)
    if text is None:
        return None
    try:
        return int(email.utils.parsedate_to_datetime(text.replace("UTC", "+0000")).timestamp())
    except (ValueError, OverflowError):
        raise FormatError(f"{source} has {name}: {text!r}, which is no date") from None


def _files(table: str, source: str) -> dict[str, IndexFile]:
    files = {}
    for line in table.splitlines():
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or len(words[0]) != 64 or not words[1].isdecimal():
            raise FormatError(f"{source} has the broken SHA256 line {line[:100]!r}")
        files[words[2]] = IndexFile(words[2], int(words[1]), words[0].lower())
    return files

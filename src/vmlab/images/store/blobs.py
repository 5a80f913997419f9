"""Files that the store has fetched, each under its SHA-256: indexes and packages.

Whoever wants one says what it hashes to; a file that does not is refused, named and fetched again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.debian.download import Downloader
from vmlab.images.debian.mirrors import without_password
from vmlab.images.errors import MirrorError, OutOfStep, PackageGone, TamperedFile
from vmlab.images.progress import Progress, silent
from vmlab.images.store.disk import lock, sha256, storing


@dataclass(frozen=True)
class Wanted:
    """A file to fetch: what it is called, and what it has to be. Sizes in bytes."""

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class BlobCache:
    """The files below `root`, one directory level of two hexadecimal digits."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the file with this SHA-256 is, or would be."""
        return self.root / "sha256" / digest[:2] / digest

    def get(self, wanted: Wanted, *, progress: Progress = silent) -> Path | None:
        """The file, if it is here and sound. One that is not sound is removed."""
        path = self.path(wanted.sha256)
        try:
            if path.stat().st_size == wanted.size and sha256(path) == wanted.sha256:
                os.utime(path)  # the last use, which pruning goes by
                return path
        except FileNotFoundError:
            return None
        with storing(path):
            path.unlink(missing_ok=True)
        return None

    def fetch(self, wanted: Wanted, downloader: Downloader, *, progress: Progress = silent) -> Path:
        """The file, from here or from the first of its URLs that has it.

        An interrupted download is resumed; several processes that want the same file fetch it
        once.

        Raises:
            PackageGone: no mirror has it any more.
            MirrorError: no mirror can be reached.
            TamperedFile: every mirror's file is another than the one that was promised.
            StoreError: it cannot be written.
        """
        guard = self.root / "locks" / f"{wanted.sha256}.lock"
        with lock(guard, what=f"fetching {wanted.name}", progress=progress):
            return self.get(wanted) or self._download(wanted, downloader, progress)

    def _download(self, wanted: Wanted, downloader: Downloader, progress: Progress) -> Path:
        partial = self.root / "partial" / wanted.sha256
        with storing(partial):
            partial.parent.mkdir(parents=True, exist_ok=True)
        failures: list[MirrorError | TamperedFile] = []
        for url in wanted.urls:
            resumed = partial.exists()
            try:
                return self._from(url, wanted, partial, downloader, progress)
            except TamperedFile as error:
                failures.append(error)
            except MirrorError as error:
                failures.append(error)
                continue
            if not resumed:
                continue
            try:  # the bytes from before may have been the wrong ones
                return self._from(url, wanted, partial, downloader, progress)
            except (MirrorError, TamperedFile) as error:
                failures.append(error)
        raise _worst(failures, wanted)

    def _from(
        self, url: str, wanted: Wanted, partial: Path, downloader: Downloader, progress: Progress
    ) -> Path:
        try:
            downloader.fetch(
                url, partial, size=wanted.size, step=f"fetching {wanted.name}", progress=progress
            )
        except OSError as error:
            raise MirrorError(f"{without_password(url)} could not be fetched: {error}") from error
        found = sha256(partial)
        if found != wanted.sha256:
            partial.unlink()
            raise TamperedFile(
                f"{wanted.name} from {without_password(url)} is not the file that the signed "
                f"index promises: its SHA-256 is {found}, not {wanted.sha256}",
                hint="the mirror, or something on the way to it, serves a changed file; nothing "
                "of it was used. Try another mirror (VMLAB_DEBIAN_MIRROR)",
            )
        path = self.path(wanted.sha256)
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(path)
        return path

    def sizes(self) -> list[tuple[Path, int, float]]:
        """Every file with its size in bytes and the time of its last use."""
        found = []
        for folder in ("sha256", "partial"):
            for path in (self.root / folder).rglob("*"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.is_file():
                    found.append((path, status.st_size, status.st_mtime))
        return found


def _worst(
    failures: Sequence[MirrorError | TamperedFile], wanted: Wanted
) -> MirrorError | TamperedFile:
    """The failure to report: tampering, an unreachable mirror, another file, a missing file."""

    def weight(error: MirrorError | TamperedFile) -> int:
        if not isinstance(error, PackageGone):
            return 3 if isinstance(error, TamperedFile) else 2
        return int(isinstance(error, OutOfStep))

    if not failures:
        return MirrorError(
            f"{wanted.name} is not in the store and there is no mirror to fetch it from"
        )
    return max(failures, key=weight)

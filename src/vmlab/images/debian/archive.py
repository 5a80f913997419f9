"""A Debian archive seen from a store: snapshots of its index, and the packages in them.

A snapshot is an `InRelease` that was verified once and kept, so that a warm store needs no
network and the same snapshot gives the same packages. It is verified again whenever it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.debian.download import Downloader
from vmlab.images.debian.index import Package, PackageIndex
from vmlab.images.debian.mirrors import Mirror
from vmlab.images.debian.openpgp import archive_keys
from vmlab.images.debian.release import IndexFile, Release
from vmlab.images.debian.release import read as read_release
from vmlab.images.errors import (
    ImageNotFound,
    MirrorError,
    PackageGone,
    TamperedFile,
    UntrustedArchive,
)
from vmlab.images.formats.compression import decompressed
from vmlab.images.progress import Progress, ProgressEvent, silent
from vmlab.images.store.blobs import BlobCache, Wanted
from vmlab.images.store.disk import lock, replacing

_INRELEASE_BYTES_AT_MOST = 16 << 20
_INDEX_BYTES_AT_MOST = 1 << 30
_COMPRESSIONS = (".xz", ".gz", "")


@dataclass(frozen=True)
class DateChecks:
    """Which dates of a fetched index are checked; apt's Check-Date and Check-Valid-Until."""

    date: bool = True
    valid_until: bool = True


class Archive:
    """One suite of an archive.

    Args:
        distribution: For naming: "debian".
        suite: The suite or codename.
        root: The directory in which snapshots are kept.
        blobs: Where fetched files are kept.
        downloader: How they are fetched.
        mirrors: Told when the network is needed; the mirrors to try, the best first.
        keys: The keyrings whose signature counts; None for Debian's own.
        date_checks: Told when an index was fetched; what to check of it.
    """

    def __init__(
        self,
        distribution: str,
        suite: str,
        *,
        root: Path,
        blobs: BlobCache,
        downloader: Downloader,
        mirrors: Callable[[str], Sequence[Mirror]],
        keys: tuple[bytes, ...] | None = None,
        date_checks: Callable[[], DateChecks] = DateChecks,
    ) -> None:
        self.suite = suite
        self._root = root / f"{distribution}-{suite}"
        self._blobs = blobs
        self._downloader = downloader
        self._mirrors = mirrors
        self.keys = keys
        self._date_checks = date_checks

    def pinned(self) -> str | None:
        """The digest of the snapshot that is in use, or None before the first one."""
        try:
            digest = (self._root / "current").read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return digest if self._file(digest).is_file() else None

    def snapshots(self) -> list[str]:
        """The digests of all snapshots that are kept."""
        return sorted(path.name for path in self._root.glob("*.InRelease"))

    def snapshot(
        self, digest: str | None = None, *, refresh: bool = False, progress: Progress = silent
    ) -> Release:
        """A snapshot of the suite's index.

        Args:
            digest: The snapshot wanted; None for the one in use, or a new one where there is none.
            refresh: Ask the mirror for a newer one first, and use that from now on.
            progress: Told what is fetched.

        Raises:
            MirrorError: the mirror cannot be reached.
            UntrustedArchive: what it serves is not to be believed.
            ImageNotFound: there is no snapshot of that digest.
        """
        if digest is not None:
            return self._kept(digest)
        with lock(self._root / "lock", what=f"the index of {self.suite}", progress=progress):
            current = self.pinned()
            if current is not None and not refresh:
                try:
                    return self._kept(current)
                except (TamperedFile, UntrustedArchive):
                    self._file(current).unlink(missing_ok=True)
                    current = None
            return self._fetch(current, progress)

    def _file(self, digest: str) -> Path:
        return self._root / f"{digest}.InRelease"

    def _kept(self, digest: str) -> Release:
        path = self._file(digest)
        try:
            message = path.read_bytes()
        except OSError:
            raise ImageNotFound(
                f"there is no snapshot {digest!r} of {self.suite} in the store",
                hint="there are " + (", ".join(self.snapshots()) or "none"),
            ) from None
        if hashlib.sha256(message).hexdigest() != digest:
            raise TamperedFile(
                f"{path} was changed since it was fetched",
                hint="remove it, or fetch the index again with `vmlab image build --update`",
            )
        # Its dates were checked when it was fetched: a pin is meant to grow old.
        return self._read(message, str(path), fresh=False)

    def _read(self, message: bytes, source: str, *, fresh: bool) -> Release:
        checks = self._date_checks() if fresh else DateChecks(date=False, valid_until=False)
        return read_release(
            message,
            suite=self.suite,
            keys=archive_keys() if self.keys is None else self.keys,
            source=source,
            check_date=checks.date,
            check_valid_until=checks.valid_until,
        )

    def _fetch(self, current: str | None, progress: Progress) -> Release:
        failures: list[MirrorError | UntrustedArchive] = []
        mirrors = self._mirrors(self.suite)
        for mirror in mirrors:
            step = f"fetching the index of {self.suite}"
            progress(ProgressEvent(step))
            url = f"{mirror.url}/dists/{self.suite}/InRelease"
            try:
                message = self._downloader.read(url, limit=_INRELEASE_BYTES_AT_MOST)
                release = self._read(
                    message, f"{mirror.shown}/dists/{self.suite}/InRelease", fresh=True
                )
            except PackageGone:
                failures.append(
                    MirrorError(
                        f"the mirror {mirror.shown} has no suite {self.suite!r}",
                        hint=f"it was found in: {mirror.origin}; try another mirror "
                        "(VMLAB_DEBIAN_MIRROR)",
                    )
                )
                continue
            except (MirrorError, UntrustedArchive) as error:
                failures.append(error)
                continue
            finally:
                progress(ProgressEvent(step, finished=True))
            return self._keep(message, release, current)
        first = next(
            (error for error in failures if isinstance(error, UntrustedArchive)), failures[0]
        )
        if len(failures) > 1:
            first.message += f" (and {len(failures) - 1} more of {len(mirrors)} mirrors failed)"
        raise first

    def _keep(self, message: bytes, release: Release, current: str | None) -> Release:
        if current is not None and current != release.digest:
            previous = self._kept(current)
            if previous.date > release.date:
                return previous  # a mirror that lags, or replays the past: apt ignores it as well
        with replacing(self._file(release.digest)) as file:
            file.write(message)
        with replacing(self._root / "current") as file:
            file.write(release.digest.encode("ascii") + b"\n")
        return release

    def index(
        self,
        release: Release,
        *,
        component: str,
        architecture: str,
        progress: Progress = silent,
    ) -> PackageIndex:
        """The packages of one component and (Debian) architecture.

        Raises:
            ImageNotFound: the suite has no such component or architecture.
            MirrorError, TamperedFile: as in `BlobCache.fetch`.
        """
        found = self.index_file(release, component=component, architecture=architecture)
        path = self.fetch_index(release, found, progress=progress)
        with path.open("rb") as stream:
            name = f"{self.suite} {found.path}"
            text = decompressed(stream, source=name).read(_INDEX_BYTES_AT_MOST)
        return PackageIndex(text, source=name)

    def file_of(self, release: Release) -> Path:
        """The `InRelease` of a snapshot."""
        return self._file(release.digest)

    def index_file(self, release: Release, *, component: str, architecture: str) -> IndexFile:
        """Which file of the suite lists these packages, in the best of its compressions.

        Raises:
            ImageNotFound: the suite has no such component or architecture.
        """
        base = f"{component}/binary-{architecture}/Packages"
        for end in _COMPRESSIONS:
            found = release.find(base + end)
            if found is not None:
                return found
        raise ImageNotFound(
            f"the suite {self.suite!r} has no packages of {architecture!r} in {component!r}",
            hint="check the recipe's suite, architecture and components",
        )

    def fetch_index(
        self, release: Release, file: IndexFile, *, progress: Progress = silent
    ) -> Path:
        """One of the suite's index files, fetched and checked; compressed as it is."""
        wanted = self._wanted(release, file)
        path = self._blobs.get(wanted)
        if path is not None:
            return path
        urls = tuple(
            url
            for mirror in self._mirrors(self.suite)
            for url in self._index_urls(mirror, release, file)
        )
        wanted = Wanted(wanted.name, wanted.size, wanted.sha256, urls)
        return self._blobs.fetch(wanted, self._downloader, progress=progress)

    def _wanted(self, release: Release, file: IndexFile) -> Wanted:
        return Wanted(f"{self.suite}/{file.path}", file.size, file.sha256, ())

    def _index_urls(self, mirror: Mirror, release: Release, file: IndexFile) -> list[str]:
        base = f"{mirror.url}/dists/{self.suite}"
        urls = [f"{base}/{file.path}"]
        if release.by_hash:
            folder = file.path.rpartition("/")[0]
            urls.insert(0, f"{base}/{folder}/by-hash/SHA256/{file.sha256}")
        return urls

    def package(self, package: Package, *, progress: Progress = silent) -> Path:
        """The .deb of a package, fetched and checked.

        Raises:
            PackageGone: the snapshot is older than the mirror, which has dropped the package.
            MirrorError, TamperedFile, StoreError: as in `BlobCache.fetch`.
        """
        name = package.filename.rpartition("/")[2]
        wanted = Wanted(name, package.size, package.sha256, ())
        path = self._blobs.get(wanted)
        if path is not None:
            return path
        urls = tuple(f"{mirror.url}/{package.filename}" for mirror in self._mirrors(self.suite))
        wanted = Wanted(name, package.size, package.sha256, urls)
        return self._blobs.fetch(wanted, self._downloader, progress=progress)

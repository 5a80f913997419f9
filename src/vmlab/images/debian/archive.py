"""One suite of a Debian archive seen from a store: its Release files, and the packages in it.

An `InRelease` that was verified once is kept, so that a warm store needs no network and the same
index gives the same packages. It is verified again whenever it is read. Which one is in use, and
which suites belong together, is for `vmlab.images.debian.suite` to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
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
    SuiteMissing,
    TamperedFile,
    UntrustedArchive,
)
from vmlab.images.formats.compression import decompressed
from vmlab.images.progress import Progress, ProgressEvent, reading, silent, watched
from vmlab.images.store.blobs import BlobCache, Wanted
from vmlab.images.store.disk import replacing

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
        root: The directory in which the suites' Release files are kept.
        blobs: Where fetched files are kept.
        downloader: How they are fetched.
        mirrors: Called when the network is needed; the mirrors to try, the best first.
        keys: The keyrings whose signature counts; None for Debian's own.
        date_checks: Called when an index was fetched; what to check of it.
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
        self.root = root / f"{distribution}-{suite}"
        self._blobs = blobs
        self._downloader = downloader
        self._mirrors = mirrors
        self.keys = keys
        self._date_checks = date_checks

    def _file(self, digest: str) -> Path:
        return self.root / f"{digest}.InRelease"

    def kept(self, digest: str) -> Release:
        """The Release file of that digest, verified again.

        Raises:
            ImageNotFound: it was never fetched.
            TamperedFile, UntrustedArchive: it is not what it was.
        """
        path = self._file(digest)
        try:
            message = path.read_bytes()
        except OSError:
            raise ImageNotFound(
                f"there is no index {digest!r} of {self.suite} in the store",
                hint="fetch the index again with `vmlab image build --update`",
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

    def fetch(self, previous: Release | None, *, progress: Progress = silent) -> Release:
        """What the first of the mirrors that can be believed has now; it is kept.

        Args:
            previous: The one in use, which stays if the mirror's is older (a mirror that lags, or
                replays the past: apt ignores it as well).
            progress: Told what is fetched.

        Raises:
            SuiteMissing: the mirrors do not have the suite.
            MirrorError: none can be reached.
            UntrustedArchive: what they serve is not to be believed.
        """
        failures: list[MirrorError | UntrustedArchive] = []
        mirrors = self._mirrors(self.suite)
        for mirror in mirrors:
            try:
                return self._from(mirror, previous, progress)
            except PackageGone:
                failures.append(
                    SuiteMissing(
                        f"the mirror {mirror.shown} has no suite {self.suite!r}",
                        hint=f"it was found in: {mirror.origin}; try another mirror "
                        "(VMLAB_DEBIAN_MIRROR)",
                    )
                )
            except (MirrorError, UntrustedArchive) as error:
                failures.append(error)
        # What is not to be believed tells more than who cannot be reached, and that more than
        # who does not have it.
        first = max(
            failures,
            key=lambda error: (
                2 * isinstance(error, UntrustedArchive) + (not isinstance(error, SuiteMissing))
            ),
        )
        if len(failures) > 1:
            first.message += f" (and {len(failures) - 1} more of {len(mirrors)} mirrors failed)"
        raise first

    def _from(self, mirror: Mirror, previous: Release | None, progress: Progress) -> Release:
        step = f"fetching the index of {self.suite}"
        progress(ProgressEvent(step))
        try:
            message = self._downloader.read(
                f"{mirror.url}/dists/{self.suite}/InRelease", limit=_INRELEASE_BYTES_AT_MOST
            )
            release = self._read(
                message, f"{mirror.shown}/dists/{self.suite}/InRelease", fresh=True
            )
        finally:
            progress(ProgressEvent(step, finished=True))
        if previous is not None and previous.date > release.date:
            return previous
        with replacing(self._file(release.digest)) as file:
            file.write(message)
        return release

    def index(
        self,
        release: Release,
        *,
        components: Iterable[str],
        architecture: str,
        progress: Progress = silent,
    ) -> PackageIndex:
        """The packages of some components for one (Debian) architecture.

        Raises:
            ImageNotFound: the suite has no such component or architecture.
            MirrorError, TamperedFile: as in `BlobCache.fetch`.
        """
        indexes = []
        for component in components:
            found = self.index_file(release, component=component, architecture=architecture)
            path = self.fetch_index(release, found, progress=progress)
            name = f"{self.suite} {found.path}"
            step = f"reading {name}"
            with path.open("rb") as stream, watched(step, progress, reading(stream)):
                text = decompressed(stream, source=name).read(_INDEX_BYTES_AT_MOST)
            indexes.append(PackageIndex(text, source=name, suite=self.suite))
        return PackageIndex.merged(indexes)

    def file_of(self, release: Release) -> Path:
        """Where the `InRelease` that was kept is."""
        return self._file(release.digest)

    def index_file(self, release: Release, *, component: str, architecture: str) -> IndexFile:
        """Which file of the suite lists these packages, in the best of its compressions.

        Raises:
            ImageNotFound: the suite has no such component or architecture.
        """
        found = _index_file(release, component, architecture)
        if found is not None:
            return found
        raise ImageNotFound(
            f"the suite {self.suite!r} has no packages of {architecture!r} in {component!r}",
            hint="check the recipe's suite, architecture and components",
        )

    def has_index(self, release: Release, *, component: str, architecture: str) -> bool:
        """Whether the suite has packages of a component for a (Debian) architecture."""
        return _index_file(release, component, architecture) is not None

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


def _index_file(release: Release, component: str, architecture: str) -> IndexFile | None:
    base = f"{component}/binary-{architecture}/Packages"
    found = (release.find(base + end) for end in _COMPRESSIONS)
    return next((file for file in found if file is not None), None)

"""A suite with its pockets, updates and security: what apt sees when it installs from a release.

A snapshot of it is the Release files of one moment under one digest, so that the same snapshot
gives the same packages. Not how one Release file is fetched and verified: that is `Archive`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmlab.images.debian.archive import Archive
from vmlab.images.debian.index import Package, PackageIndex
from vmlab.images.debian.release import Release
from vmlab.images.errors import (
    ImageNotFound,
    PackageGone,
    SuiteMissing,
    TamperedFile,
    UntrustedArchive,
)
from vmlab.images.progress import Progress, ProgressEvent, silent
from vmlab.images.store.disk import lock, replacing


@dataclass(frozen=True)
class Snapshot:
    """The Release files of a suite and of its pockets, by the suites' names.

    `digest` names all of them together: that of the suite's own `InRelease` if it is alone.
    """

    main: Release
    pockets: Mapping[str, Release] = field(default_factory=dict)
    digest: str = ""

    @property
    def date(self) -> int:
        """When the newest of them was made, seconds since 1970."""
        return max(self.main.date, *(release.date for release in self.pockets.values()), 0)


@dataclass(frozen=True)
class Readable:
    """What is going to be read of a snapshot: components, and Debian's name of an architecture."""

    components: tuple[str, ...]
    architecture: str


class Suite:
    """A suite of an archive with its pockets.

    Args:
        name: The suite or codename.
        archive: Returns the archive of a suite or pocket by its name.
        pockets: Called when an index is fetched; the names of the pockets to read besides. One
            that its mirrors do not have is left out.
    """

    def __init__(
        self,
        name: str,
        archive: Callable[[str], Archive],
        pockets: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.name = name
        self._archives: dict[str, Archive] = {}
        self._make = archive
        self._pockets = pockets
        self._root = self.archive(name).root

    @property
    def keys(self) -> tuple[bytes, ...] | None:
        """The keyrings whose signature counts; None for Debian's own."""
        return self.archive(self.name).keys

    def archive(self, name: str) -> Archive:
        """The archive of the suite itself, or of one of its pockets."""
        if name not in self._archives:
            self._archives[name] = self._make(name)
        return self._archives[name]

    def pinned(self) -> str | None:
        """The digest of the snapshot that is in use, or None before the first one."""
        try:
            digest = (self._root / "current").read_text(encoding="ascii").strip()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return digest if digest in self.snapshots() else None

    def snapshots(self) -> list[str]:
        """The digests of all snapshots that are kept."""
        return sorted(
            path.stem for end in ("InRelease", "snapshot") for path in self._root.glob(f"*.{end}")
        )

    def snapshot(
        self,
        digest: str | None = None,
        *,
        refresh: bool = False,
        readable: Readable | None = None,
        progress: Progress = silent,
    ) -> Snapshot:
        """A snapshot of the suite's index.

        Args:
            digest: The snapshot wanted; None for the one in use, or a new one where there is none.
            refresh: Ask the mirrors for a newer one first, and use that from now on.
            readable: What will be read of it. A pocket whose mirror is out of step with its own
                index there is left out of a snapshot that is fetched, and that is told.
            progress: Told what is fetched.

        Raises:
            MirrorError: a mirror cannot be reached, or does not have the suite.
            UntrustedArchive: what it serves is not to be believed.
            ImageNotFound: there is no snapshot of that digest.
            TamperedFile: the snapshot of that digest was changed on disk.
        """
        if digest is not None:
            return self._kept(digest)
        with lock(self._root / "lock", what=f"the index of {self.name}", progress=progress):
            pinned = self.pinned()
            current = None
            if pinned is not None:
                try:
                    current = self._kept(pinned)
                except (ImageNotFound, TamperedFile, UntrustedArchive):
                    pinned = None  # what cannot be believed any more is fetched again
            if current is not None and not refresh:
                return current
            return self._fetch(current, readable, progress)

    def _kept(self, digest: str) -> Snapshot:
        path = self._root / f"{digest}.snapshot"
        if not path.is_file():
            if digest not in self.snapshots():
                raise ImageNotFound(
                    f"there is no snapshot {digest!r} of {self.name} in the store",
                    hint="there are " + (", ".join(self.snapshots()) or "none"),
                )
            return Snapshot(self.archive(self.name).kept(digest), digest=digest)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise TamperedFile(
                f"{path} was changed since it was written",
                hint="remove it, or fetch the index again with `vmlab image build --update`",
            )
        rows = [line.split() for line in data.decode("ascii").splitlines()]
        releases = {name: self.archive(name).kept(release) for name, release in rows}
        return Snapshot(releases.pop(self.name), releases, digest)

    def _fetch(
        self, current: Snapshot | None, readable: Readable | None, progress: Progress
    ) -> Snapshot:
        before = {} if current is None else {self.name: current.main, **current.pockets}
        main = self.archive(self.name).fetch(before.get(self.name), progress=progress)
        pockets = {}
        for name in self._pockets():
            archive = self.archive(name)
            try:
                release = archive.fetch(before.get(name), progress=progress)
                if readable is not None:
                    self._files(archive, release, readable, progress)
            except SuiteMissing:
                continue
            except PackageGone as error:
                step = f"leaving out {name}: {error.message}"
                progress(ProgressEvent(step, finished=True))
                continue
            pockets[name] = release
        digest = main.digest
        if pockets:
            rows = [(self.name, main.digest), *sorted((n, r.digest) for n, r in pockets.items())]
            data = "".join(f"{name} {release}\n" for name, release in rows).encode("ascii")
            digest = hashlib.sha256(data).hexdigest()
            with replacing(self._root / f"{digest}.snapshot") as file:
                file.write(data)
        with replacing(self._root / "current") as file:
            file.write(digest.encode("ascii") + b"\n")
        return Snapshot(main, pockets, digest)

    def _files(
        self, archive: Archive, release: Release, readable: Readable, progress: Progress
    ) -> None:
        """Fetch the index files of a pocket."""
        for component in readable.components:
            if archive.has_index(release, component=component, architecture=readable.architecture):
                found = archive.index_file(
                    release, component=component, architecture=readable.architecture
                )
                archive.fetch_index(release, found, progress=progress)

    def indexes(
        self,
        snapshot: Snapshot,
        *,
        components: Iterable[str],
        architecture: str,
        progress: Progress = silent,
    ) -> dict[str, PackageIndex]:
        """The packages of some components for one (Debian) architecture, by suite and pocket.

        Raises:
            ImageNotFound: the suite has no such component or architecture; a pocket need not.
            MirrorError, TamperedFile: as in `BlobCache.fetch`.
        """
        components = tuple(components)
        found = {
            self.name: self.archive(self.name).index(
                snapshot.main, components=components, architecture=architecture, progress=progress
            )
        }
        for name, release in snapshot.pockets.items():
            archive = self.archive(name)
            has = [
                component
                for component in components
                if archive.has_index(release, component=component, architecture=architecture)
            ]
            if has:
                found[name] = archive.index(
                    release, components=has, architecture=architecture, progress=progress
                )
        return found

    def index(
        self,
        snapshot: Snapshot,
        *,
        components: Iterable[str],
        architecture: str,
        progress: Progress = silent,
    ) -> PackageIndex:
        """All packages as one index, in which the newest version of each is found."""
        return PackageIndex.merged(
            list(
                self.indexes(
                    snapshot, components=components, architecture=architecture, progress=progress
                ).values()
            )
        )

    def package(self, package: Package, *, progress: Progress = silent) -> Path:
        """The .deb of a package, from the archive that has it. See `Archive.package`."""
        return self.archive(package.suite or self.name).package(package, progress=progress)

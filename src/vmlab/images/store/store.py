"""ImageStore: the one way to get an image.

    store = ImageStore()
    image = store.ensure("debian-13-riscv64-tiny")
    image.kernel, image.initrd

Layout of its directory: images/DIGEST (manifest.json and files), names/NAME (imported images),
index/ (snapshots), cache/ (fetched files), work/ (builds that are going on), locks/.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vmlab.images import image as manifests
from vmlab.images import recipe as recipes
from vmlab.images import settings as configuration
from vmlab.images.builder import (
    Inputs,
    build,
    check_host,
    guest_agent,
    image_digest,
    inputs,
    readable,
)
from vmlab.images.debian.apt import AptConfiguration, host_configuration
from vmlab.images.debian.archive import Archive, DateChecks
from vmlab.images.debian.download import Downloader
from vmlab.images.debian.mirrors import Given, Mirror, mirrors, pockets
from vmlab.images.debian.suite import Suite
from vmlab.images.errors import (
    ImageError,
    ImageNotFound,
    PackageGone,
    StoreError,
    TamperedFile,
)
from vmlab.images.image import MANIFEST, Image, StoredFile
from vmlab.images.progress import Progress, ProgressEvent, silent
from vmlab.images.recipe import Recipe
from vmlab.images.settings import ImageSettings
from vmlab.images.store.blobs import BlobCache
from vmlab.images.store.disk import (
    lock,
    remove_tree,
    replacing,
    sha256,
    storing,
    working_directory,
)
from vmlab.images.store.usage import Freed, clear_leftovers, prune, remove_image

_STAMP = ".verified"
_DIGITS = frozenset("0123456789abcdef")
_SHORTEST_PREFIX = 6


@dataclass(frozen=True)
class Problem:
    """A file of an image that is not what its manifest says; `role` as in `Image.files`."""

    image: Image
    role: str
    what: str


class ImageStore:
    """A store of images.

    Args:
        root: Its directory; None for the one that settings and environment name.
        settings: None for those of this user.
        apt: The host's apt configuration; None to ask it.
        environment: None for this process's.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        settings: ImageSettings | None = None,
        apt: AptConfiguration | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = os.environ if environment is None else environment
        self.settings = configuration.load(self._environment) if settings is None else settings
        self.root = (root or self.settings.directory).absolute()
        self.blobs = BlobCache(self.root / "cache")
        self._given_apt = apt

    # ------------------------------------------------------------------ getting images

    def ensure(
        self,
        reference: str | Path,
        *,
        refresh: bool = False,
        index: str | None = None,
        progress: Progress = silent,
    ) -> Image:
        """The image called `reference`, built first if it is not there.

        A store that has it needs no network. Several processes that want the same image build it
        once. An image that was changed on disk is built again.

        Args:
            reference: A built-in recipe's name, a recipe file's path, an imported image's name,
                or a digest or the beginning of one.
            refresh: Look for a newer package index first.
            index: The digest of the index snapshot to build from; None for the one in use.
            progress: Told what is done; called from this thread.

        Raises:
            ImageNotFound: nothing is called that.
            ImageError: of the kind that says why it cannot be built.
        """
        with storing(self.root):
            with suppress(StoreError):  # a store that may only be read is good enough
                clear_leftovers(self.root)
            recipe = self.recipe(reference)
            if recipe is None:
                return self._sound(self._stored(str(reference)), progress)
            return self.build(recipe, refresh=refresh, index=index, progress=progress)

    def recipe(self, reference: str | Path) -> Recipe | None:
        """The recipe that `reference` names, or None if it can only be a stored image.

        Raises:
            RecipeError: it is a recipe file, but not a valid one.
        """
        text = str(reference)
        if isinstance(reference, Path) or "/" in text or text.endswith(".toml"):
            return recipes.read(Path(reference))
        if text in recipes.builtin_names() and not self._named(text).is_file():
            return recipes.builtin(text)
        return None

    def build(
        self,
        recipe: Recipe,
        *,
        refresh: bool = False,
        index: str | None = None,
        agent: Callable[[], bytes | None] = guest_agent,
        progress: Progress = silent,
    ) -> Image:
        """The image of a recipe, from the store or built now. See `ensure`."""
        suite = self.suite(recipe.distribution, recipe.suite)
        given = inputs(recipe, agent())
        pinned = index or self.settings.pins.get(recipe.suite)
        snapshot = pinned or (None if refresh else suite.pinned())
        if snapshot is not None:
            image = self.ready(image_digest(recipe, snapshot, given), progress=progress)
            if image is not None:
                return image
        check_host(recipe)
        try:
            return self._build(
                recipe, suite, given, index=pinned, refresh=refresh, progress=progress
            )
        except PackageGone:
            if pinned or refresh:
                raise
            # The index is older than the mirror, which dropped a package in a point release.
            return self._build(recipe, suite, given, index=None, refresh=True, progress=progress)

    def suite(self, distribution: str, name: str) -> Suite:
        """A suite of a distribution with its pockets, as this store sees it."""
        return Suite(
            name,
            functools.partial(self._archive, distribution),
            lambda: pockets(
                name,
                wanted=self.settings.pockets,
                setting=self._given_mirrors,
                environment=self._environment,
                apt=self.apt,
            ),
        )

    def _archive(self, distribution: str, suite: str) -> Archive:
        settings = self.settings
        keys = None
        if settings.debian_keyring is not None:
            try:
                keys = (settings.debian_keyring.read_bytes(),)
            except OSError as error:
                raise ImageError(
                    f"the keyring {settings.debian_keyring} cannot be read: {error.strerror}",
                    hint="correct images.debian_keyring or VMLAB_DEBIAN_KEYRING",
                ) from error
        return Archive(
            distribution,
            suite,
            root=self.root / "index",
            blobs=self.blobs,
            downloader=Downloader(
                apt=lambda: self.apt,
                timeout_seconds=settings.timeout_seconds,
                pause_seconds=settings.retry_seconds,
            ),
            mirrors=self._mirrors,
            keys=keys,
            date_checks=self._date_checks,
        )

    @functools.cached_property
    def apt(self) -> AptConfiguration:
        """The host's apt configuration; asked for only when something has to be fetched."""
        return host_configuration() if self._given_apt is None else self._given_apt

    def _mirrors(self, suite: str) -> list[Mirror]:
        return mirrors(
            suite,
            setting=self._given_mirrors,
            environment=self._environment,
            apt=self.apt,
        )

    @property
    def _given_mirrors(self) -> Given:
        return Given(self.settings.debian_mirror, self.settings.debian_security_mirror)

    def _date_checks(self) -> DateChecks:
        """What settings say, else what apt does on this host."""
        date, valid_until = self.settings.check_date, self.settings.check_valid_until
        return DateChecks(
            date=self.apt.flag("Acquire::Check-Date", True) if date is None else date,
            valid_until=(
                self.apt.flag("Acquire::Check-Valid-Until", True)
                if valid_until is None
                else valid_until
            ),
        )

    def ready(self, digest: str, *, progress: Progress = silent) -> Image | None:
        """The image of that digest, if it is here and sound; one that is not is removed."""
        try:
            image = manifests.read(self.directory_of(digest))
            return self._sound(image, progress)
        except FileNotFoundError:
            return None
        except TamperedFile as error:
            step = f"{error.message}; building it again"
            progress(ProgressEvent(step, finished=True))
            self._discard(digest)
            return None

    def _build(
        self,
        recipe: Recipe,
        suite: Suite,
        given: Inputs,
        *,
        index: str | None,
        refresh: bool,
        progress: Progress,
    ) -> Image:
        snapshot = suite.snapshot(
            index, refresh=refresh, readable=readable(recipe), progress=progress
        )
        digest = image_digest(recipe, snapshot.digest, given)
        guard = self.root / "locks" / f"{digest}.lock"
        with lock(guard, what=f"building {recipe.name}", progress=progress):
            ready = self.ready(
                digest, progress=progress
            )  # another process may have built it meanwhile
            if ready is not None:
                return ready
            with self.working(recipe.name) as directory:
                built = build(
                    recipe, suite, snapshot, given, directory,
                    lend_root=self._lend_root, progress=progress,
                )  # fmt: skip
                image = Image(
                    digest=digest,
                    name=recipe.name,
                    architecture=recipe.architecture,
                    directory=self.directory_of(digest),
                    files={},
                    disk_format=built.disk_format,
                    cmdline=f"{built.cmdline} {recipe.cmdline}".strip(),
                    channels=_channels(recipe, given),
                    kernel_release=built.kernel_release,
                    source={
                        "distribution": recipe.distribution,
                        "suite": recipe.suite,
                        "version": snapshot.main.version,
                        "index": snapshot.digest,
                        "index_date": snapshot.date,
                        "suites": [recipe.suite, *snapshot.pockets],
                        "packages": dict(sorted(built.packages.items())),
                        **({} if built.root is None else {"root": built.root}),
                        "inputs": given.digests(),
                    },
                )
                image = self.add(image, built.files, progress=progress)
        self._make_room(digest)
        return image

    def _lend_root(self, digest: str, place: Path) -> Mapping[str, str] | None:
        """The disk of an image whose root is made of the same, under another name as well."""
        for image in self.images():
            if image.source.get("root") == digest and image.disk is not None:
                with suppress(StoreError, TamperedFile, OSError), image.hold():
                    self._sound(image, silent)
                    os.link(image.disk, place)
                    self._stamp(image)  # the link changed the time of change, and nothing else
                    return dict(image.source["packages"])
        return None

    def build_twice(
        self, recipe: Recipe, *, progress: Progress = silent
    ) -> tuple[Image, dict[str, tuple[str, str]]]:
        """Build an image once more, beside the one in the store, and compare.

        Returns:
            The stored image, and for each file that differs its two SHA-256s (stored, new).
        """
        image = self.build(recipe, progress=progress)
        suite = self.suite(recipe.distribution, recipe.suite)
        snapshot = suite.snapshot(str(image.source["index"]), progress=progress)
        given = inputs(recipe, guest_agent())
        with self.working(recipe.name) as directory:
            built = build(recipe, suite, snapshot, given, directory, progress=progress)
            differences = {
                role: (image.files[role].sha256, found)
                for role, path in built.files.items()
                if (found := sha256(path)) != image.files[role].sha256
            }
        return image, differences

    # ------------------------------------------------------------------ files

    def directory_of(self, digest: str) -> Path:
        """Where the image of that digest is, or would be."""
        return self.root / "images" / digest

    def _named(self, name: str) -> Path:
        return self.root / "names" / name

    def working(self, name: str) -> AbstractContextManager[Path]:
        """A directory on the store's disk for a build; gone when the block ends."""
        clear_leftovers(self.root)
        return working_directory(self.root / "work", name)

    def add(self, image: Image, files: Mapping[str, Path], *, progress: Progress = silent) -> Image:
        """Put the files of an image, which lie in one working directory, into the store.

        Args:
            image: What it is; its `files` are filled in.
            files: The files by role; they are moved.
            progress: Told of the hashing.

        Returns:
            The image as it is in the store.
        """
        stored = {}
        staging = next(iter(files.values())).parent / "staging"
        staging.mkdir()
        for role, path in sorted(files.items()):
            path.chmod(0o444)  # a guest gets an overlay or a copy, never the file
            size = path.stat().st_size
            digest = sha256(path, step=f"hashing {role}", progress=progress)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.rename(staging / path.name)
            stored[role] = StoredFile(path.name, size, digest)
        image = replace(image, files=stored)
        (staging / MANIFEST).write_bytes(manifests.encode(image))
        target = image.directory
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(target)  # what a killed process, or someone else, left under this name
        staging.rename(target)
        self._stamp(image)
        return image

    def _sound(self, image: Image, progress: Progress) -> Image:
        """The image, once its files are known to be what the manifest says.

        A file whose size, times and inode are those of its last check is not read again; the
        time of change cannot be set by a program, so a changed file is always noticed.

        Raises:
            TamperedFile: naming the file that is not.
        """
        if self._read_stamp(image) != _facts(image):
            for problem in self._problems(image, progress):
                raise TamperedFile(
                    f"image {image.name!r}: {problem.what}",
                    hint=f"`vmlab image remove {image.name}`, then build or import it again",
                )
            self._stamp(image)
        with suppress(OSError):  # a store that may only be read is good enough
            os.utime(image.directory / MANIFEST)
        return image

    def _problems(self, image: Image, progress: Progress) -> Iterator[Problem]:
        for role, file in image.files.items():
            path = image.directory / file.name
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                yield Problem(image, role, f"{path} is missing")
                continue
            if size != file.size:
                yield Problem(image, role, f"{path} has {size} bytes instead of {file.size}")
            elif sha256(path, step=f"checking {role}", progress=progress) != file.sha256:
                yield Problem(image, role, f"{path} was changed: its SHA-256 is not {file.sha256}")

    def _read_stamp(self, image: Image) -> object:
        try:
            return json.loads((image.directory / _STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _stamp(self, image: Image) -> None:
        with suppress(StoreError), replacing(image.directory / _STAMP) as file:
            file.write(json.dumps(_facts(image)).encode())

    def _discard(self, digest: str) -> None:
        directory = self.directory_of(digest)
        with storing(directory):
            remove_tree(directory)

    def _make_room(self, newest: str) -> None:
        prune(
            self.root,
            self.blobs,
            limit=self.settings.limit,
            keep=frozenset({newest, *self._imported().values()}),
        )

    # ------------------------------------------------------------------ looking and keeping house

    def images(self) -> list[Image]:
        """The images in the store, by name; what cannot be read is left to `verify`."""
        found = []
        for directory in (self.root / "images").glob("[0-9a-f]*"):
            with suppress(FileNotFoundError, ImageError):
                found.append(manifests.read(directory))
        return sorted(found, key=lambda image: (image.name, image.digest))

    def find(self, reference: str | Path) -> Image | None:
        """The image that `ensure` would return without building anything, or None."""
        recipe = self.recipe(reference)
        if recipe is None:
            try:
                return self._stored(str(reference))
            except ImageNotFound:
                return None
        suite = self.suite(recipe.distribution, recipe.suite)
        snapshot = self.settings.pins.get(recipe.suite) or suite.pinned()
        if snapshot is None:
            return None
        digest = image_digest(recipe, snapshot, inputs(recipe, guest_agent()))
        try:
            return manifests.read(self.directory_of(digest))
        except FileNotFoundError:
            return None

    def _stored(self, reference: str) -> Image:
        """An imported image by name, or any image by the beginning of its digest.

        Raises:
            ImageNotFound: there is none, or several begin so.
        """
        digest = self._imported().get(reference)
        if digest is not None:
            with suppress(FileNotFoundError):
                return manifests.read(self.directory_of(digest))
        if len(reference) >= _SHORTEST_PREFIX and set(reference) <= _DIGITS:
            matching = [image for image in self.images() if image.digest.startswith(reference)]
            if len(matching) == 1:
                return matching[0]
            if matching:
                raise ImageNotFound(
                    f"{len(matching)} images have a digest that begins with {reference!r}",
                    hint="give more of its digits: " + ", ".join(i.digest for i in matching),
                )
        known = sorted({*recipes.builtin_names(), *self._imported()})
        close = difflib.get_close_matches(reference, known, n=3)
        raise ImageNotFound(
            f"there is no image or recipe {reference!r}",
            hint=(
                "did you mean " + " or ".join(close) + "?"
                if close
                else "`vmlab image list --all` names the images and the recipes"
            ),
        )

    def _imported(self) -> dict[str, str]:
        """The digests of imported images by name."""
        found = {}
        for path in (self.root / "names").glob("[!.]*"):
            with suppress(OSError, UnicodeDecodeError):
                found[path.name] = path.read_text(encoding="ascii").strip()
        return found

    def verify(self, reference: str | None = None, *, progress: Progress = silent) -> list[Problem]:
        """Read every file of one image, or of all, and return what is not as it was written.

        Raises:
            ImageNotFound: there is no such image in the store.
        """
        if reference is None:
            images = self.images()
        else:
            found = self.find(reference)
            if found is None:
                raise ImageNotFound(
                    f"image {reference!r} is not in the store", hint="`vmlab image build` makes it"
                )
            images = [found]
        problems = []
        for image in images:
            wrong = list(self._problems(image, progress))
            if wrong:
                (image.directory / _STAMP).unlink(missing_ok=True)
            problems += wrong
        return problems

    def remove(self, reference: str) -> list[Image]:
        """Remove an image: by name all its builds, by digest that one.

        Raises:
            ImageNotFound: there is no such image in the store.
            StoreError: a process is using it.
        """
        images = [image for image in self.images() if image.name == reference]
        if not images:
            images = [self._stored(reference)]
        for image in images:
            with storing(image.directory):
                if not remove_image(image.directory):
                    raise StoreError(
                        f"image {image.name!r} is in use", hint="end the machines that use it first"
                    )
                name = self._named(image.name)
                if self._imported().get(image.name) == image.digest:
                    name.unlink(missing_ok=True)
        return images

    def prune(self, limit: int | None = None, *, everything: bool = False) -> Freed:
        """Remove what was used longest ago until the store holds at most `limit` bytes.

        Args:
            limit: None for the limit of the settings.
            everything: Remove all that can come back: fetched files and built images.
        """
        with storing(self.root):
            return prune(
                self.root,
                self.blobs,
                limit=0 if everything else self.settings.limit if limit is None else limit,
                keep=frozenset(self._imported().values()),
                grace_seconds=0.0,
            )


def _channels(recipe: Recipe, given: Inputs) -> tuple[str, ...]:
    """The recipe's channels, without an agent that this installation does not have."""
    return tuple(
        channel for channel in recipe.channels if channel != "agent" or given.agent is not None
    )


def _facts(image: Image) -> dict[str, list[int]] | None:
    """What a file that was not touched still has: size, times in ns, inode."""
    facts = {}
    for file in image.files.values():
        try:
            status = (image.directory / file.name).stat()
        except OSError:
            return None
        facts[file.name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return facts

"""Package indexes: finding packages and what they depend on.

Not a solver: the newest version of a name wins, whichever suite has it, and of alternatives the
first that exists. The index is searched as bytes, since parsing its 60,000 paragraphs would cost
seconds.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vmlab.images.debian import versions
from vmlab.images.errors import FormatError, ImageNotFound
from vmlab.images.formats.control import paragraph

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_FILENAME = re.compile(rb"\nFilename: ([^\n]+)")
_ALTERNATIVE = re.compile(r"^\s*([a-z0-9][a-z0-9+.-]*)(?::[a-z0-9-]+)?\s*(?:\(([^)]*)\))?")


@dataclass(frozen=True)
class Package:
    """One package of an index; `size` in bytes, `sha256` in hexadecimal, `suite` that has it."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str
    depends: tuple[tuple[str, ...], ...] = ()
    suite: str = ""


class PackageIndex:
    """The text of a `Packages` file, or of several, ready to be searched.

    Args:
        text: The file's contents.
        source: Its name, for errors.
        suite: The suite that it is of.
    """

    def __init__(self, text: bytes, *, source: str, suite: str = "") -> None:
        self._text = b"\n" + text
        self._starts = [0]
        self._parts = [(source, suite)]

    @classmethod
    def merged(cls, indexes: Sequence[PackageIndex]) -> PackageIndex:
        """Several indexes as one; of packages with the same version the first one's is taken.

        Raises:
            ValueError: there are none.
        """
        first, *others = indexes
        if not others:
            return first
        result = cls(b"", source="")
        result._text = b"\n".join(index._text for index in indexes)
        result._starts, result._parts = [], []
        start = 0
        for index in indexes:
            result._starts += [start + position for position in index._starts]
            result._parts += index._parts
            start += len(index._text) + 1
        return result

    @property
    def source(self) -> str:
        """What the index is called in errors."""
        names = [source for source, _ in self._parts]
        return names[0] if len(names) == 1 else f"{names[0]} (and {', '.join(names[1:])})"

    def find(self, name: str) -> Package | None:
        """The newest package called `name`, or None."""
        found = list(self._named(name))
        return max(found, key=lambda package: versions.key(package.version), default=None)

    def get(self, name: str) -> Package:
        """The newest package called `name`, or the one that provides it.

        Raises:
            ImageNotFound: the index has none.
        """
        package = self.find(name) or self._provider(name)
        if package is None:
            raise ImageNotFound(
                f"{self.source} has no package {name!r}",
                hint="check the recipe's packages, its suite and its architecture",
            )
        return package

    def closure(self, names: Iterable[str], *, without: Iterable[str] = ()) -> list[Package]:
        """The packages of these names with all that they depend on, in the order of names.

        Raises:
            ImageNotFound: one of them, or something that one needs, is not in the index.
        """
        left_out = set(without)
        chosen: dict[str, Package] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in left_out:
                continue
            package = self.get(name)
            if package.name in chosen or package.name in left_out:
                continue
            chosen[package.name] = package
            waiting.extend(self._choose(alternatives) for alternatives in package.depends)
        return [chosen[name] for name in sorted(chosen)]

    def by_filename(self, filename: str) -> Package | None:
        """The package that is the file `filename` of the archive, or None."""
        position = self._filenames.get(filename.encode("utf-8", "surrogateescape"))
        if position is None:
            return None
        return self._package(self._text.rfind(b"\nPackage: ", 0, position) + 1)

    @functools.cached_property
    def _filenames(self) -> dict[bytes, int]:
        """Where in the text each file is named."""
        return {match[1]: match.start() for match in _FILENAME.finditer(self._text)}

    def _choose(self, alternatives: tuple[str, ...]) -> str:
        for name in alternatives:
            if self.find(name) is not None or self._provider(name) is not None:
                return name
        return alternatives[0]

    def _named(self, name: str) -> Iterator[Package]:
        if _NAME.fullmatch(name) is None:
            return
        needle = b"\nPackage: " + name.encode() + b"\n"
        position = self._text.find(needle)
        while position >= 0:
            yield self._package(position + 1)
            position = self._text.find(needle, position + 1)

    def _provider(self, name: str) -> Package | None:
        """The first package, by name, that says that it provides `name`."""
        if _NAME.fullmatch(name) is None:
            return None
        wanted = re.compile(
            rb"\nProvides:[^\n]*[ ,]" + re.escape(name.encode()) + rb"(?![a-z0-9+.-])[^\n]*"
        )
        found = [
            self._package(self._text.rfind(b"\nPackage: ", 0, match.start()) + 1)
            for match in wanted.finditer(self._text)
        ]
        return min(found, key=lambda package: package.name, default=None)

    def _package(self, start: int) -> Package:
        end = self._text.find(b"\n\n", start)
        text = self._text[start : end if end >= 0 else len(self._text)]
        source, suite = self._parts[bisect.bisect_right(self._starts, start) - 1]
        fields = paragraph(text.decode("utf-8", "replace"), source=source)
        try:
            size = int(fields["Size"])
            sha256 = fields["SHA256"].lower()
            package = Package(
                name=fields["Package"],
                version=fields["Version"],
                filename=fields["Filename"],
                size=size,
                sha256=sha256,
                depends=_dependencies(fields),
                suite=suite,
            )
        except (KeyError, ValueError) as error:
            raise FormatError(f"{source} has a package without a proper {error}") from error
        if len(sha256) != 64 or size < 0 or ".." in package.filename.split("/"):
            raise FormatError(f"{source} has a broken entry for {package.name!r}")
        return package


def _dependencies(fields: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    text = ",".join(filter(None, (fields.get("Pre-Depends"), fields.get("Depends"))))
    groups = []
    for group in text.replace("\n", " ").split(","):
        names = tuple(
            match[1] for part in group.split("|") if (match := _ALTERNATIVE.match(part)) is not None
        )
        if names:
            groups.append(names)
    return tuple(groups)

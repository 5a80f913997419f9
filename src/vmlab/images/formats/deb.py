"""Reading Debian binary packages, deb(5) format 2.0.

Not a package manager: maintainer scripts are never run, nothing is installed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vmlab.images.errors import FormatError
from vmlab.images.formats import ar, tarball
from vmlab.images.formats.compression import decompressed
from vmlab.images.progress import Progress, reading, silent, watched

_CONTROL_BYTES_AT_MOST = 16 << 20


@contextmanager
def data_archive(
    package: Path, *, step: str = "", progress: Progress = silent
) -> Iterator[BinaryIO]:
    """The tar stream of a package's files, decompressed.

    Args:
        package: The .deb.
        step: What progress events call the reading.
        progress: Told how far the package has been read.

    Raises:
        FormatError: it is not a Debian package, or is damaged.
    """
    with _member(package, "data.tar", step=step, progress=progress) as stream:
        yield stream


def control(package: Path) -> dict[str, str]:
    """The fields of a package's control file.

    Raises:
        FormatError: it is not a Debian package, or is damaged.
    """
    from vmlab.images.formats.control import paragraph

    with _member(package, "control.tar") as stream:
        for entry, contents in tarball.entries(stream, source=package.name):
            if entry.path == "control" and contents is not None:
                text = contents.read(_CONTROL_BYTES_AT_MOST)
                return paragraph(text.decode("utf-8", "replace"), source=package.name)
    raise FormatError(f"{package.name} is not a Debian package: it has no control file")


@contextmanager
def _member(
    package: Path, prefix: str, *, step: str = "", progress: Progress = silent
) -> Iterator[BinaryIO]:
    with package.open("rb") as file, watched(step, progress, reading(file)):
        found = None
        for index, member in enumerate(ar.members(file, source=package.name)):
            if index == 0:
                _check_version(file, member, package.name)
            if member.name == prefix or member.name.startswith(prefix + "."):
                found = member
                break
        if found is None:
            raise FormatError(f"{package.name} is not a Debian package: it has no {prefix}")
        section = io.BufferedReader(ar.Section(file, found.offset, found.size), 1 << 17)
        with decompressed(section, source=f"{package.name}: {found.name}") as stream:
            yield stream


def _check_version(file: BinaryIO, member: ar.ArMember, source: str) -> None:
    if member.name != "debian-binary":
        raise FormatError(f"{source} is not a Debian package: it begins with {member.name!r}")
    file.seek(member.offset)
    version = file.read(min(member.size, 16))
    if not version.startswith(b"2."):
        raise FormatError(f"{source} is a Debian package of the unknown version {version!r}")

"""Reading tar archives that nobody vouches for: strict about paths, and streaming.

The format itself is `tarfile`'s business (POSIX.1-2001 pax, GNU and ustar); this module decides
what an entry may be called and where it may land.
"""

from __future__ import annotations

import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO

from vmlab.images.errors import FormatError

_XATTR = "SCHILY.xattr."
_NAME_BYTES_AT_MOST = 4096  # PATH_MAX


@dataclass(frozen=True)
class TarEntry:
    """One entry of a tar archive, under a path that is safe.

    `path` is relative, without `.`, `..` or empty parts; the archive's own root is "".
    `kind` is one of "file", "directory", "symlink", "hardlink", "character", "block", "fifo".
    """

    path: str
    kind: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int = 0
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


def safe_path(name: str, *, source: str) -> str:
    """`name` as a clean relative path.

    Raises:
        FormatError: it is absolute, climbs out with "..", or holds a NUL or newline.
    """
    if name.startswith("/") or "\0" in name or "\n" in name or len(name) > _NAME_BYTES_AT_MOST:
        raise FormatError(f"{source} has an entry with the unsafe path {name[:200]!r}")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise FormatError(f"{source} has an entry with the unsafe path {name[:200]!r}")
    return "/".join(parts)


def entries(stream: BinaryIO, *, source: str) -> Iterator[tuple[TarEntry, IO[bytes] | None]]:
    """The entries of an uncompressed tar stream, in order, with the contents of files.

    Args:
        stream: The archive; read once, forwards.
        source: The archive's name, for errors.

    Yields:
        An entry, and for a file a reader that is good until the next entry is asked for.

    Raises:
        FormatError: it is not a tar archive, is cut short, or has an entry with an unsafe path.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as archive:
            for info in archive:
                entry = _entry(info, source)
                yield entry, archive.extractfile(info) if entry.kind == "file" else None
                # tarfile keeps every member it has seen; a root has tens of thousands.
                archive.members = []  # type: ignore[attr-defined]  # typeshed lacks it
    except FormatError:
        raise
    except (tarfile.TarError, EOFError, ValueError, zlib.error, OverflowError) as error:
        raise FormatError(f"{source} is not a sound tar archive: {error}") from error


def _entry(info: tarfile.TarInfo, source: str) -> TarEntry:
    kind = _kind(info)
    if kind is None:
        raise FormatError(f"{source} has {info.name[:200]!r} of the unknown type {info.type!r}")
    if not 0 <= info.size < 1 << 50:
        raise FormatError(f"{source} has {info.name[:200]!r} of the impossible size {info.size}")
    target = info.linkname
    if kind == "hardlink":
        target = safe_path(target, source=source)
    if "\0" in target or (kind == "symlink" and not target):
        raise FormatError(f"{source} has {info.name[:200]!r} with a broken link target")
    return TarEntry(
        path=safe_path(info.name, source=source),
        kind=kind,
        mode=stat.S_IMODE(info.mode),
        uid=info.uid,
        gid=info.gid,
        mtime=int(info.mtime),
        size=info.size if kind == "file" else 0,
        target=target if kind in ("symlink", "hardlink") else "",
        device=(info.devmajor, info.devminor) if kind in ("character", "block") else (0, 0),
        xattrs={
            key.removeprefix(_XATTR): value.encode("utf-8", "surrogateescape")
            for key, value in info.pax_headers.items()
            if key.startswith(_XATTR)
        },
    )


def _kind(info: tarfile.TarInfo) -> str | None:
    if info.isreg():
        return "file"
    kinds = {
        tarfile.DIRTYPE: "directory",
        tarfile.SYMTYPE: "symlink",
        tarfile.LNKTYPE: "hardlink",
        tarfile.CHRTYPE: "character",
        tarfile.BLKTYPE: "block",
        tarfile.FIFOTYPE: "fifo",
    }
    return kinds.get(info.type)


def extract(
    stream: BinaryIO,
    destination: Path,
    *,
    source: str,
    select: Callable[[str], bool] = lambda path: True,
    limit: int = 64 << 30,
) -> list[TarEntry]:
    """Unpack directories, files, symlinks and hard links into a directory, as an ordinary user.

    Owners, times, devices and extended attributes are not applied: the entries that are returned
    tell them. Nothing is ever written through a symlink that the archive made.

    Args:
        stream: The uncompressed archive.
        destination: An existing directory.
        source: The archive's name, for errors.
        select: Told each path; what it refuses is left out.
        limit: Bytes of contents that may be unpacked in all.

    Returns:
        The entries that were selected, in the archive's order.

    Raises:
        FormatError: the archive is broken, too large, or tries to get out of `destination`.
    """
    unpacked = 0
    taken = []
    for entry, contents in entries(stream, source=source):
        if not entry.path or not select(entry.path):
            continue
        unpacked += entry.size
        if unpacked > limit:
            raise FormatError(f"{source} unpacks to more than {limit} bytes")
        target = _landing(destination, entry.path, source)
        try:
            _place(entry, contents, target, destination, source)
        except (IsADirectoryError, FileExistsError, NotADirectoryError) as error:
            raise FormatError(f"{source} has {entry.path!r} twice, as different kinds") from error
        taken.append(entry)
    return taken


def _landing(destination: Path, path: str, source: str) -> Path:
    """Where `path` goes, with its parents made; a parent that is a symlink is refused."""
    current = destination
    parts = path.split("/")
    for part in parts[:-1]:
        current /= part
        try:
            mode = current.lstat().st_mode
        except FileNotFoundError:
            current.mkdir(mode=0o755)
            continue
        except OSError as error:
            raise FormatError(f"{source} has the unusable path {path[:200]!r}: {error}") from error
        if not stat.S_ISDIR(mode):
            raise FormatError(f"{source} has {path[:200]!r} below {part!r}, which is no directory")
    return current / parts[-1]


def _place(
    entry: TarEntry, contents: IO[bytes] | None, target: Path, destination: Path, source: str
) -> None:
    if entry.kind == "directory":
        if target.is_symlink():
            raise FormatError(f"{source} has {entry.path!r} twice, as different kinds")
        target.mkdir(mode=0o755, exist_ok=True)
        return
    if target.is_symlink() or target.is_file():
        target.unlink()
    if entry.kind == "file" and contents is not None:
        with target.open("xb") as file:
            while chunk := contents.read(1 << 20):
                file.write(chunk)
        target.chmod(entry.mode & 0o777)
    elif entry.kind == "symlink":
        target.symlink_to(entry.target)
    elif entry.kind == "hardlink":
        first = _landing(destination, entry.target, source)
        if first.is_symlink() or not first.is_file():
            raise FormatError(
                f"{source} has {entry.path!r} linked to {entry.target!r}, which is "
                "not a file before it"
            )
        target.hardlink_to(first)

"""A machine at rest as one file: a tar archive with its description first, then what it describes.

`machine.json` names every other member with its size and SHA-256; disks are raw contents compressed
by gzip, in which holes take no room. Reading one trusts nothing: every name is looked up in the
description, every size is a limit, every digest is compared, and nothing is unpacked under a name
that the archive chose.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vmlab.engine.devices.storage.overlay import open_disk
from vmlab.images.errors import FormatError
from vmlab.images.formats import tarball
from vmlab.machine.errors import CorruptSnapshot, OperationFailed
from vmlab.machine.fields import Name, Whole
from vmlab.manager.requests import Metadata

__all__ = [
    "Contents",
    "DiskMember",
    "FileMember",
    "Manifest",
    "NicPart",
    "compress_disk",
    "hash_file",
    "read_manifest",
    "unpack",
    "write_archive",
]

FORMAT: Final = "vmlab-machine/1"
MANIFEST: Final = "machine.json"
_MANIFEST_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 20
_SECTOR: Final = 512
_MEMBER: Final = r"^(disks|boot)/[a-z0-9]{1,16}(\.gz)?$"
_DIGEST: Final = r"^[0-9a-f]{64}$"
Check = Callable[[], None]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DiskMember(_Part):
    """A disk: raw contents of `size` bytes with the digest `sha256`, compressed."""

    name: Name
    size: Whole = Field(gt=0, le=1 << 46, multiple_of=_SECTOR)
    own: bool = Field(description="whether it is the machine's own, or one of the store's")
    format: Literal["raw", "qcow2"] = "raw"
    bus: Literal["virtio", "scsi"] = "virtio"
    readonly: bool = False
    mount_point: str | None = Field(None, max_length=4096)
    member: str = Field(pattern=_MEMBER)
    packed: Whole = Field(ge=0, le=1 << 46, description="bytes in the archive")
    sha256: str = Field(pattern=_DIGEST)


class FileMember(_Part):
    """A file that the machine boots from."""

    field: Literal["kernel", "initrd", "firmware"]
    member: str = Field(pattern=_MEMBER)
    size: Whole = Field(ge=0, le=1 << 33)
    sha256: str = Field(pattern=_DIGEST)


class NicPart(_Part):
    """A NIC, with the name of its network, which the store that it comes to may have, too."""

    name: Name
    network: str = Field(max_length=63)


class Manifest(_Part):
    """What is in the archive."""

    format: Literal["vmlab-machine/1"] = FORMAT
    name: Name
    hypervisor: str = Field(max_length=63)
    image: str | None = Field(None, max_length=255)
    spec: dict[str, Any] = Field(description="without names, disks, NICs and paths of a host")
    labels: dict[str, str] = Field(default_factory=dict)
    metadata: Metadata = Field(default_factory=Metadata)
    disks: tuple[DiskMember, ...] = Field((), max_length=256)
    files: tuple[FileMember, ...] = Field((), max_length=3)
    nics: tuple[NicPart, ...] = Field((), max_length=64)

    @property
    def members(self) -> dict[str, DiskMember | FileMember]:
        """What each member is, by its name."""
        return {part.member: part for part in self.parts}

    @property
    def parts(self) -> tuple[DiskMember | FileMember, ...]:
        """Disks, then files."""
        return (*self.disks, *self.files)


# ------------------------------------------------------------------------ writing


def compress_disk(image: Path, form: str, target: Path, check: Check) -> tuple[int, str]:
    """Compress the contents of a disk that nobody writes to; returns their size and digest.

    Args:
        image: Its image, whatever lies below it included.
        form: "raw" or "qcow2".
        target: Where the compressed contents go.
        check: Called often; may raise to end it.

    Raises:
        VmlabError: the image cannot be read.
    """
    digest = hashlib.sha256()
    with (
        closing(open_disk(image, form, read_only=True)) as disk,
        target.open("wb") as file,
        gzip.GzipFile(fileobj=file, mode="wb", filename="", compresslevel=1, mtime=0) as packed,
    ):
        size = disk.size
        for offset in range(0, size, _CHUNK):
            check()
            data = disk.read(offset, min(_CHUNK, size - offset))
            digest.update(data)
            packed.write(data)
    return size, digest.hexdigest()


def hash_file(path: Path, check: Check) -> tuple[int, str]:
    """A file's size and digest."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            check()
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


def write_archive(
    target: Path, manifest: Manifest, members: Mapping[str, Path], check: Check
) -> str:
    """Write an archive; returns its SHA-256.

    Args:
        target: The new file.
        manifest: What is in it.
        members: The file of each member, by its name.
        check: Called often; may raise to end it.

    Raises:
        OSError: it cannot be written.
    """
    with target.open("xb") as file, tarfile.open(fileobj=file, mode="w|") as archive:
        text = manifest.model_dump_json(indent=1).encode()
        archive.addfile(_entry(MANIFEST, len(text)), io.BytesIO(text))
        for name in manifest.members:
            check()
            with members[name].open("rb") as content:
                archive.addfile(_entry(name, members[name].stat().st_size), content)
    return hash_file(target, check)[1]


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o600
    return entry


# ------------------------------------------------------------------------ reading


def _damaged(source: Path, what: str) -> CorruptSnapshot:
    return CorruptSnapshot(
        f"{source} is no machine that was exported by vmlab: {what}",
        hint="nothing was made; export the machine anew",
        operation="machine.import",
    )


def _entries(file: Any, source: Path) -> Iterator[tuple[tarball.TarEntry, IO[bytes] | None]]:
    try:
        yield from tarball.entries(file, source="it")
    except FormatError as error:
        raise _damaged(source, error.message) from error


def read_manifest(source: Path) -> Manifest:
    """The description of an archive, which is its first member.

    Raises:
        OperationFailed: the file cannot be read.
        CorruptSnapshot: it is no such archive.
    """
    try:
        with source.open("rb") as file:
            for entry, content in _entries(file, source):
                return _manifest(entry, content, source)
    except OSError as error:
        raise OperationFailed(
            f"{source} cannot be read: {error.strerror}",
            hint="name a file that was made by `vmlab export`",
            operation="machine.import",
        ) from error
    raise _damaged(source, "it is empty")


def _manifest(entry: tarball.TarEntry, content: IO[bytes] | None, source: Path) -> Manifest:
    if entry.path != MANIFEST or content is None:
        raise _damaged(source, f"its first member is {entry.path!r}, not {MANIFEST}")
    if entry.size > _MANIFEST_BYTES:
        raise _damaged(source, f"{MANIFEST} has {entry.size} bytes")
    try:
        manifest = Manifest.model_validate_json(content.read(_MANIFEST_BYTES + 1))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or MANIFEST
        raise _damaged(source, f"{where}: {first['msg']}") from None
    described = [part.member for part in manifest.parts]
    if len(set(described)) != len(described):
        raise _damaged(source, "two of its parts are one member")
    if len({disk.name for disk in manifest.disks}) != len(manifest.disks):
        raise _damaged(source, "two of its disks have one name")
    if len({file.field for file in manifest.files}) != len(manifest.files):
        raise _damaged(source, "two of its files are for one purpose")
    return manifest


class Contents:
    """An archive that was unpacked: every part whole, as it was described.

    Attributes:
        manifest: The description.
        files: Where each member's contents are, by its name; disks are sparse raw images.
    """

    def __init__(self, manifest: Manifest, files: Mapping[str, Path]) -> None:
        self.manifest = manifest
        self.files = dict(files)


def unpack(source: Path, directory: Path, expected: Manifest, check: Check) -> Contents:
    """Unpack an archive into an empty directory, and compare all of it with its description.

    Args:
        source: The archive.
        directory: Where its members go, under names of this function's own.
        expected: The description that was read before: another one is refused.
        check: Called often; may raise to end it.

    Raises:
        OperationFailed: the archive cannot be read, or there is no space.
        CorruptSnapshot: something is missing, is more than was described, or differs.
    """
    files: dict[str, Path] = {}
    try:
        with source.open("rb") as file:
            entries = _entries(file, source)
            for number, (entry, content) in enumerate(entries):
                check()
                if number == 0:
                    if _manifest(entry, content, source) != expected:
                        raise _damaged(source, "it was changed while it was read")
                    continue
                part = expected.members.get(entry.path)
                if part is None or content is None or entry.path in files:
                    raise _damaged(source, f"{entry.path!r} is not in its description")
                target = directory / f"{number}.part"
                if isinstance(part, DiskMember):
                    _unpack_disk(part, entry, content, target, source, check)
                else:
                    _unpack_file(part, entry, content, target, source, check)
                files[entry.path] = target
    except tarfile.TarError as error:
        raise _damaged(source, str(error)) from error
    except OSError as error:
        raise OperationFailed(
            f"{source} cannot be unpacked: {error.strerror or error}",
            hint="look whether there is space, and whether the file is whole",
            operation="machine.import",
        ) from error
    missing = [name for name in expected.members if name not in files]
    if missing:
        raise _damaged(source, f"{', '.join(missing)} is missing")
    return Contents(expected, files)


def _unpack_disk(  # noqa: PLR0917  (where it comes from and goes to)
    part: DiskMember,
    entry: tarball.TarEntry,
    content: IO[bytes],
    target: Path,
    source: Path,
    check: Check,
) -> None:
    if entry.size != part.packed:
        raise _damaged(source, f"{entry.path} has {entry.size} bytes, not {part.packed}")
    digest, done = hashlib.sha256(), 0
    with target.open("xb") as file:
        try:
            with gzip.GzipFile(fileobj=content, mode="rb") as packed:
                # Not a byte more than was said is ever unpacked.
                while data := packed.read(min(_CHUNK, part.size - done + 1)):
                    check()
                    done += len(data)
                    if done > part.size:
                        raise _damaged(source, f"{entry.path} unpacks to more than {part.size}")
                    digest.update(data)
                    if data.count(0) == len(data):
                        file.seek(len(data), io.SEEK_CUR)
                    else:
                        file.write(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged(source, f"{entry.path}: {error}") from error
        file.truncate(part.size)
    _compare(part, entry, done, digest.hexdigest(), source)


def _unpack_file(  # noqa: PLR0917  (where it comes from and goes to)
    part: FileMember,
    entry: tarball.TarEntry,
    content: IO[bytes],
    target: Path,
    source: Path,
    check: Check,
) -> None:
    if entry.size != part.size:
        raise _damaged(source, f"{entry.path} has {entry.size} bytes, not {part.size}")
    digest, done = hashlib.sha256(), 0
    with target.open("xb") as file:
        while data := content.read(_CHUNK):
            check()
            digest.update(data)
            file.write(data)
            done += len(data)
    _compare(part, entry, done, digest.hexdigest(), source)


def _compare(
    part: DiskMember | FileMember, entry: tarball.TarEntry, size: int, digest: str, source: Path
) -> None:
    if size != part.size:
        raise _damaged(source, f"{entry.path} has {size} bytes, not {part.size}")
    if digest != part.sha256:
        raise _damaged(source, f"{entry.path} is not what was exported: its digest differs")

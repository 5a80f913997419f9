"""Snapshots as one file, which outlives the machine and its owner: packed, and unpacked elsewhere.

A parcel is a gzipped tar of a snapshot's directory (`snapshots`). What is not in there has to be
where it was when it is unpacked: the images under its disks, its kernel.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable
from gzip import BadGzipFile
from pathlib import Path
from typing import IO, BinaryIO, Final

from vmlab.hypervisors.base import Snapshot
from vmlab.hypervisors.qemu import snapshots
from vmlab.hypervisors.records import FILE_NAME
from vmlab.machine.errors import CorruptSnapshot

_FASTEST: Final = 1
"""gzip's level: memory is mostly zeros, and somebody waits."""
_CHUNK: Final = 1 << 20
_MOST_FILES: Final = 256


class _Watched:
    """A file that is read, and whose reader can be stopped."""

    def __init__(self, file: BinaryIO, check: Callable[[], None]) -> None:
        self._file = file
        self._check = check

    def read(self, size: int = -1) -> bytes:
        self._check()
        return self._file.read(size)


def pack(snapshot: Path, target: Path, check: Callable[[], None]) -> int:
    """Pack the snapshot in a directory into the file `target`; returns its size in bytes.

    Args:
        snapshot: The directory of a complete snapshot.
        target: A file that does not exist.
        check: Called again and again; raises to stop it.

    Raises:
        OSError: it cannot be read or written; nothing is left of `target`.
    """
    try:
        with tarfile.open(target, "x:gz", compresslevel=_FASTEST) as tar:
            for path in sorted(snapshot.iterdir()):
                with path.open("rb") as file:
                    member = tar.gettarinfo(fileobj=file, arcname=path.name)
                    tar.addfile(member, _Watched(file, check))
    except FileExistsError:
        raise
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target.stat().st_size


def unpack(parcel: Path, directory: Path, check: Callable[[], None]) -> Snapshot:
    """Unpack a parcel into `directory`, which is made, and whose name becomes the snapshot's.

    Raises:
        CorruptSnapshot: it is none.
        OSError: it cannot be read, or `directory` not written.
    """
    directory.mkdir(mode=0o700, parents=True)
    try:
        with tarfile.open(parcel, "r:gz") as tar:
            for number, member in enumerate(tar):
                if not member.isreg() or not FILE_NAME.fullmatch(member.name):
                    raise _damaged(parcel, f"{member.name!r} is no file of a snapshot")
                if number >= _MOST_FILES:
                    raise _damaged(parcel, f"it has more than {_MOST_FILES} files")
                source = tar.extractfile(member)
                assert source is not None, "it is a regular file"
                with (directory / member.name).open("xb") as target:
                    _copy_sparse(source, target, check)
    except (tarfile.TarError, BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise _damaged(parcel, str(error)) from error
    return snapshots.load(directory).snapshot


def _copy_sparse(source: IO[bytes], target: BinaryIO, check: Callable[[], None]) -> None:

    while data := source.read(_CHUNK):
        check()
        if data.count(0) == len(data):
            target.seek(len(data), 1)
        else:
            target.write(data)
    target.truncate()


def _damaged(parcel: Path, why: str) -> CorruptSnapshot:
    return CorruptSnapshot(
        f"{parcel} is no snapshot that can be unpacked: {why}",
        hint="it was cut off or changed after it was written",
        hypervisor="qemu",
    )

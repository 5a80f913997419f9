"""Files and trees as tar streams: what `copy_in` sends and what `copy_out` unpacks.

Permissions, times, symbolic and hard links survive; owners become those of whoever unpacks, and no
file becomes set-uid. The guest is not trusted: nothing is unpacked outside the destination or
through a symbolic link, and no device node is made. GNU's format, which busybox reads too.
"""

from __future__ import annotations

import asyncio
import io
import os
import queue
import shutil
import stat
import tarfile
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, cast

from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import OperationFailed

PIECE: Final = 4 << 20
"""Bytes of a piece of a stream: the guest starts a program for each."""

LARGE: Final = 1 << 20
"""Bytes from which on a file of a tree is copied by itself, which is faster than through tar."""

_PERMISSIONS: Final = 0o1777


class _Abandoned(Exception):
    """Nobody listens any more; ends the thread that packs."""


class _Pieces(io.RawIOBase):
    """A file to write to that hands on what is written, in pieces of about PIECE bytes."""

    def __init__(self, hand_on: Callable[[bytes], None]) -> None:
        self._hand_on = hand_on
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        view = memoryview(cast("bytes", data))
        self._held += view
        if len(self._held) >= PIECE:
            self.finish()
        return len(view)

    def finish(self) -> None:
        """Hand on what is left."""
        piece, self._held = bytes(self._held), bytearray()
        if piece:
            self._hand_on(piece)


async def contents(path: Path, size: int) -> AsyncIterator[bytes]:
    """The bytes of a file, in pieces; of a LARGE one as many as it had when it was looked at.

    Args:
        path: The file.
        size: Bytes that it has; below LARGE it is not relied on (files of /proc say 0).

    Raises:
        OperationFailed: it cannot be read, or a large one has become shorter.
    """
    left = size if size >= LARGE else None
    try:
        file = await asyncio.to_thread(path.open, "rb")
        try:
            while left != 0:
                piece = await asyncio.to_thread(
                    file.read, PIECE if left is None else min(PIECE, left)
                )
                if not piece:
                    break
                if left is not None:
                    left -= len(piece)
                yield piece
        finally:
            file.close()
        if left:
            raise OSError(f"it became {left} bytes shorter meanwhile")
    except OSError as error:
        raise _unreadable(error, path) from error


def _unreadable(error: BaseException, path: Path) -> OperationFailed:
    reason = error.strerror if isinstance(error, OSError) else None
    return OperationFailed(
        f"cannot read {getattr(error, 'filename', None) or path}: {reason or error}",
        hint="check that it exists and may be read",
        operation="copy_in",
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How something is best copied: `single` if it is one file, else the large files in the tree.

    `large` has them by their path in it; of hard links to one file only one.
    """

    single: os.stat_result | None
    large: dict[PurePosixPath, os.stat_result]


def plan(source: Path) -> Plan:
    """Look at what is to be copied. What cannot be read is left to the copy to tell of."""
    if source.is_symlink() or not source.is_dir():
        single = source.stat() if source.is_file() and not source.is_symlink() else None
        return Plan(single, {})
    found: dict[tuple[int, int], tuple[PurePosixPath, os.stat_result]] = {}
    for folder, names, files in os.walk(source):
        names.sort()
        for name in sorted(files):
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_size >= LARGE:
                inner = PurePosixPath(path.relative_to(source))
                found.setdefault((status.st_dev, status.st_ino), (inner, status))
    return Plan(None, dict(found.values()))


async def packed(
    source: Path, name: str, *, without: Collection[PurePosixPath] = ()
) -> AsyncIterator[bytes]:
    """A tar stream of `source`, a file or a tree, under the name `name`.

    Args:
        source: What to pack.
        name: What it is called in the stream.
        without: Files of the tree, by their path in it, that are packed empty.

    Raises:
        OperationFailed: something in it cannot be read.
    """
    loop = asyncio.get_running_loop()
    room = queue.Queue[None](maxsize=2)
    pieces = asyncio.Queue[bytes | BaseException | None]()
    abandoned = threading.Event()

    def hand_on(piece: bytes | BaseException | None) -> None:
        while True:
            if abandoned.is_set():
                raise _Abandoned
            try:
                room.put(None, timeout=0.05)
                break
            except queue.Full:
                continue
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:
            raise _Abandoned from None  # the loop has ended

    emptied = {str(PurePosixPath(name, path)) for path in without}

    def prepared(member: tarfile.TarInfo) -> tarfile.TarInfo:
        if member.name in emptied and member.isreg():
            member.size = 0
        return _without_owner(member)

    def pack() -> None:
        try:
            try:
                target = _Pieces(hand_on)
                with tarfile.open(
                    fileobj=cast("IO[bytes]", target), mode="w|", format=tarfile.GNU_FORMAT
                ) as archive:
                    archive.add(source, arcname=name, filter=prepared)
                target.finish()
            except (OSError, ValueError, tarfile.TarError) as error:
                hand_on(error)
            else:
                hand_on(None)
        except _Abandoned:
            return

    thread = threading.Thread(target=pack, name=f"pack {source.name}", daemon=True)
    thread.start()
    try:
        while (piece := await pieces.get()) is not None:
            room.get_nowait()
            if isinstance(piece, BaseException):
                raise _unreadable(piece, source) from piece
            yield piece
    finally:
        abandoned.set()
        await uninterrupted(asyncio.to_thread(thread.join))


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """As root unpacks it: what is the user's here is root's there."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


class Unpacker:
    """Takes a tar stream piece by piece and unpacks it into a directory that exists.

    What has been taken is unpacked by a thread; `finish` has to be called, whatever happened.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        reading, self._writing = os.pipe()
        self._error: BaseException | None = None
        self._write_under_way: asyncio.Future[None] | None = None
        self._thread = threading.Thread(
            target=self._unpack, args=(reading,), name=f"unpack {target.name}", daemon=True
        )
        self._thread.start()

    def _unpack(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r|") as archive:
                    archive.extractall(self._target, members=self._members(archive), **_TRUSTED)
            except Exception as error:  # the guest wrote it: tarfile raises all kinds
                self._error = error
            # Whoever writes must not be stopped by what is wrong with the rest.
            while stream.read(PIECE):
                pass

    def _members(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """The members, each checked when all before it are unpacked."""
        for member in archive:
            _refuse_outside(self._target, member.name, member)
            if member.islnk():
                _refuse_outside(self._target, member.linkname, member)
                if not (self._target / member.linkname).is_file():
                    raise tarfile.ExtractError(f"{member.name!r} is a hard link to no file")
            if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
                kind = "device" if member.isdev() and not member.isfifo() else "special file"
                raise tarfile.ExtractError(f"{member.name!r} is a {kind}, which is not copied")
            yield member.replace(
                mode=member.mode & _PERMISSIONS,
                uid=os.getuid(),
                gid=os.getgid(),
                uname="",
                gname="",
                deep=False,
            )

    async def take(self, data: bytes) -> None:
        """The next piece of the stream."""
        self._write_under_way = asyncio.ensure_future(asyncio.to_thread(self._write, data))
        await asyncio.shield(self._write_under_way)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._writing, view) :]

    async def finish(self) -> None:
        """No more comes: wait until all is unpacked."""
        await uninterrupted(self._finish())

    async def _finish(self) -> None:
        if self._write_under_way is not None:
            await asyncio.wait([self._write_under_way])
        os.close(self._writing)
        await asyncio.to_thread(self._thread.join)

    def check(self) -> None:
        """Refuse what did not unpack well.

        Raises:
            OperationFailed: the stream is damaged, reaches outside, or cannot be written.
        """
        if self._error is not None:
            raise OperationFailed(
                f"cannot unpack what the guest sent: {self._error}",
                hint="check the space and permissions here, and what the guest has there",
                operation="copy_out",
            ) from self._error


# Pythons that know extraction filters (PEP 706) warn if none is named; the checks are our own,
# since the standard ones resolve links by name and can be led astray (CVE-2025-4517).
_TRUSTED: dict[str, Any] = (
    {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
)


def _refuse_outside(base: Path, name: str, member: tarfile.TarInfo) -> None:
    """Refuse a name that leads out of `base`, or anywhere through a symbolic link.

    Raises:
        tarfile.ExtractError: naming the member.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise tarfile.ExtractError(f"{member.name!r} reaches outside ({name!r})")
    place = base
    for part in path.parts[:-1]:
        place = place / part
        if place.is_symlink():
            raise tarfile.ExtractError(f"{member.name!r} reaches through a symbolic link")
    if member.isdir() and (base / path).is_symlink():
        raise tarfile.ExtractError(f"{member.name!r} is a directory and a symbolic link")


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A directory beside `target` to unpack into, gone afterwards with what is left in it."""
    if os.path.lexists(target):
        raise OperationFailed(
            f"{str(target)!r} exists already", hint="choose another name", operation="copy_out"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=".vmlab-copy-", dir=target.parent))
    except OSError as error:
        raise OperationFailed(
            f"cannot write beside {target}: {error.strerror}",
            hint="check the space and permissions there",
            operation="copy_out",
        ) from error
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    """Remove a tree, also one with directories that may not be written or looked into."""
    for folder, names, _ in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o700 != 0o700:
                path.chmod(0o700)
    shutil.rmtree(directory)


def settle(unpacked: Path, target: Path) -> None:
    """Give what was unpacked its place.

    Raises:
        OperationFailed: it is not there, or the place is taken by now.
    """
    if not os.path.lexists(unpacked):
        raise OperationFailed(
            f"the guest sent something else than {unpacked.name!r}",
            hint="is the guest's tar a tar?",
            operation="copy_out",
        )
    try:
        if os.path.lexists(target):
            raise FileExistsError(None, "it exists already")
        unpacked.rename(target)
    except OSError as error:
        raise OperationFailed(
            f"cannot write {target}: {error.strerror}",
            hint="check what is there",
            operation="copy_out",
        ) from error

"""Files and trees as tar streams: what `copy_in` sends and what `copy_out` unpacks.

Modes, times, symlinks and hard links survive; owners become those of whoever unpacks. Nothing is
unpacked outside the destination (tarfile's "tar" filter, PEP 706).
"""

from __future__ import annotations

import asyncio
import io
import os
import queue
import shutil
import tarfile
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from vmlab.machine.errors import OperationFailed

BLOCK = 1 << 20
_QUEUED = 4


class _Pieces(io.RawIOBase):
    """A file to write to that hands what is written to a queue, in pieces of about BLOCK bytes."""

    def __init__(self, pieces: queue.Queue[bytes | BaseException | None]) -> None:
        self._pieces = pieces
        self._held = bytearray()
        self.abandoned = threading.Event()

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        view = memoryview(cast("bytes", data))
        self._held += view
        if len(self._held) >= BLOCK:
            self._put()
        return len(view)

    def _put(self) -> None:
        piece, self._held = bytes(self._held), bytearray()
        put_unless(self._pieces, piece, self.abandoned)

    def finish(self) -> None:
        """Hand over what is left."""
        if self._held:
            self._put()


class Abandoned(Exception):
    """The other side of a queue no longer listens; ends the thread that fills it."""


def put_unless(
    pieces: queue.Queue[bytes | BaseException | None],
    piece: bytes | BaseException | None,
    abandoned: threading.Event,
) -> None:
    """Put `piece` when there is room, unless the reader has gone."""
    while not abandoned.is_set():
        try:
            return pieces.put(piece, timeout=0.1)
        except queue.Full:
            continue
    raise Abandoned


async def packed(source: Path, name: str) -> AsyncIterator[bytes]:
    """A tar stream of `source`, a file or a tree, under the name `name`.

    Raises:
        OperationFailed: something in it cannot be read.
    """
    pieces: queue.Queue[bytes | BaseException | None] = queue.Queue(_QUEUED)
    target = _Pieces(pieces)

    def pack() -> None:
        try:
            with tarfile.open(
                fileobj=cast("IO[bytes]", target),
                mode="w|",
                bufsize=BLOCK,
                format=tarfile.PAX_FORMAT,
            ) as archive:
                archive.add(source, arcname=name)
            target.finish()
            put_unless(pieces, None, target.abandoned)
        except Abandoned:
            return
        except (OSError, tarfile.TarError) as error:
            put_unless(pieces, error, target.abandoned)

    thread = threading.Thread(target=pack, name=f"pack {source.name}", daemon=True)
    thread.start()
    try:
        while (piece := await asyncio.to_thread(pieces.get)) is not None:
            if isinstance(piece, BaseException):
                raise OperationFailed(
                    f"cannot read {source}: {piece}",
                    hint="check that it exists and may be read",
                    operation="copy_in",
                ) from piece
            yield piece
    finally:
        target.abandoned.set()


class Unpacker:
    """Takes a tar stream piece by piece and unpacks it into a directory that exists."""

    def __init__(self, target: Path) -> None:
        self._target = target
        reading, self._writing = os.pipe()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._unpack, args=(reading,), name=f"unpack {target.name}", daemon=True
        )
        self._thread.start()

    def _unpack(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK) as archive:
                    archive.extractall(self._target, members=_owned(archive), filter="tar")
            except (OSError, tarfile.TarError, EOFError) as error:
                self._error = error
            # Whoever writes must not be stopped by what is wrong with the rest.
            while stream.read(BLOCK):
                pass

    async def take(self, data: bytes) -> None:
        """The next piece of the stream."""
        await asyncio.to_thread(self._write, data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._writing, view) :]

    async def finish(self) -> None:
        """No more comes: wait until all is unpacked."""
        os.close(self._writing)
        await asyncio.to_thread(self._thread.join)

    def check(self) -> None:
        """Refuse what did not unpack well.

        Raises:
            OperationFailed: the stream is damaged, reaches outside, or cannot be written.
        """
        if self._error is not None:
            raise OperationFailed(
                f"cannot unpack into {self._target}: {self._error}",
                hint="check the space and permissions there",
                operation="copy_out",
            ) from self._error


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A directory beside `target` to unpack into, gone afterwards with what is left in it."""
    if target.exists() or target.is_symlink():
        raise OperationFailed(
            f"{str(target)!r} exists already", hint="choose another name", operation="copy_out"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OperationFailed(
            f"cannot write beside {target}: {error.strerror}",
            hint="check the space and permissions there",
            operation="copy_out",
        ) from error
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _owned(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, as belonging to whoever unpacks them."""
    for member in archive:
        yield member.replace(uid=os.getuid(), gid=os.getgid(), uname="", gname="", deep=False)

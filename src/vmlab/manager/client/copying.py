"""Files through the manager: trees into and out of guests, as tar streams, and archives."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import Final

from vmlab.guests import trees
from vmlab.machine.errors import OperationFailed
from vmlab.manager.client.sending import Sender, path_of

__all__ = ["archive_in", "archive_out", "copied_in", "copied_out"]

_CHUNK: Final = 1 << 20


async def copied_in(sender: Sender, machine: str, source: Path, target: PurePosixPath) -> None:
    """Copy a file or a tree of this host to that path in a guest.

    Raises:
        OperationFailed: it cannot be read.
        VmlabError: what the manager raised.
    """
    if not await asyncio.to_thread(os.path.lexists, source):
        raise OperationFailed(
            f"there is no {source} here", hint="check the path", operation="copy_in"
        )
    await sender.request(
        "PUT",
        path_of("machines", machine, "files"),
        query={"path": str(target)},
        content=lambda: trees.packed(source, target.name),
        headers={"Content-Type": "application/x-tar"},
    )


async def copied_out(sender: Sender, machine: str, source: PurePosixPath, target: Path) -> None:
    """Copy a file or a tree of a guest to a place here that is free.

    Raises:
        OperationFailed: the place is taken or cannot be written, or what came is not what it was.
        VmlabError: what the manager raised.
    """
    with trees.scratch(target) as directory:
        unpacker = trees.Unpacker(directory)
        try:
            path = path_of("machines", machine, "files")
            async with sender.stream(path, query={"path": str(source)}) as response:
                async for piece in response.aiter_bytes():
                    await unpacker.take(piece)
        finally:
            await unpacker.finish()
        unpacker.check()
        await asyncio.to_thread(trees.settle, directory / source.name, target)


async def archive_in(sender: Sender, name: str, source: Path) -> bytes:
    """Bring an archive of this host among the exports of the manager; returns its answer.

    Raises:
        OperationFailed: it cannot be read.
        VmlabError: what the manager raised.
    """
    try:
        size, digest = await asyncio.to_thread(_measured, source)
    except OSError as error:
        raise OperationFailed(
            f"{source} cannot be read: {error.strerror}", hint="check the path"
        ) from error
    response = await sender.request(
        "PUT",
        path_of("exports", name),
        content=lambda: _pieces(source),
        headers={
            "Content-Type": "application/x-tar",
            "Content-Length": str(size),
            "Content-Digest": f"sha-256=:{base64.b64encode(digest).decode()}:",
        },
    )
    return response.content


def _measured(source: Path) -> tuple[int, bytes]:
    """A file's size and SHA-256."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return file.tell(), digest


async def _pieces(source: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(source.open, "rb")
    try:
        while piece := await asyncio.to_thread(file.read, _CHUNK):
            yield piece
    finally:
        file.close()


async def archive_out(sender: Sender, name: str, target: Path) -> None:
    """Copy an archive of the manager's exports to a place here that is free.

    Raises:
        OperationFailed: the place is taken or cannot be written, or the archive broke off.
        VmlabError: what the manager raised.
    """
    with trees.scratch(target) as directory:
        part = directory / "archive"
        try:
            file = await asyncio.to_thread(part.open, "wb")
            try:
                async with sender.stream(path_of("exports", name)) as response:
                    async for piece in response.aiter_bytes():
                        await asyncio.to_thread(file.write, piece)
            finally:
                await asyncio.to_thread(file.close)
        except OSError as error:
            raise OperationFailed(
                f"{target} cannot be written: {error.strerror}", hint="make room, and try again"
            ) from error
        await asyncio.to_thread(trees.settle, part, target)

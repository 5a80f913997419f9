"""Files and trees into and out of guests, as tar streams through the manager."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path, PurePosixPath

from vmlab.guests import trees
from vmlab.machine.errors import OperationFailed
from vmlab.manager.client.sending import Sender, path_of

__all__ = ["copied_in", "copied_out"]


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

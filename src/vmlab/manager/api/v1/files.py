"""`/v1/machines/{machine}/files`: a file or tree of a guest, out and in, as a tar stream (POSIX.1).

`path` is what it is, or will be, in the guest; in the stream it bears that path's last name. It
appears as a whole or not at all. How much is taken is limited, told or untold.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from vmlab.guests.guest import Guest
from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError
from vmlab.manager.api.problems import TooLarge, documented
from vmlab.manager.api.service import Here, Service
from vmlab.manager.api.streaming import of_type, streamed
from vmlab.manager.api.uploads import body_of_type

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["machines"])

TAR: Final = "application/x-tar"
_ANSWER_SECONDS: Final = 60.0
_BLOCK: Final = 512
"""Bytes of a tar's header (POSIX.1, pax); its name is in the first 100 of them."""

Machine = Annotated[str, Path(description="name or id of the machine")]
GuestPath = Annotated[
    str,
    Query(
        alias="path",
        pattern=r"^/[^\x00]*[^/\x00]$",
        max_length=4096,
        description="absolute path in the guest",
    ),
]


async def _guest(here: Service, machine: str) -> Guest:
    """The guest of a machine that runs.

    Raises:
        InvalidState: it does not run.
    """
    id_ = await here.running_machine(machine, "copy files of")
    return await here.manager.guests.get(id_, timeout=_ANSWER_SECONDS)


def _checked(path: str) -> str:
    if ".." in path.split("/"):
        raise InvalidSpec(
            [SpecProblem("path", path, "a path without ..")], what="the request", operation="copy"
        )
    return path


@router.get(
    "/machines/{machine}/files",
    response_class=Response,
    responses=of_type(TAR, "A tar stream; one that breaks off is not whole.")
    | documented(404, 409, 502, 504),
)
async def copy_out(request: Request, here: Here, machine: Machine, path: GuestPath) -> Response:
    """A file or a tree of its guest."""
    guest = await _guest(here, machine)
    stream = _Outgoing(guest, _checked(path), here.limits.download)
    return await streamed(request, stream.pieces(), media_type=TAR)


class _Outgoing:
    """A tar stream on its way out of a guest, which waits while nobody takes it."""

    def __init__(self, guest: Guest, path: str, most: int) -> None:
        self._guest = guest
        self._path = path
        self._most = most
        self._sent = 0
        self._pieces = asyncio.Queue[bytes](2)

    async def _take(self, data: bytes) -> None:
        self._sent += len(data)
        if self._sent > self._most:
            raise TooLarge(
                f"{self._path!r} has more than {self._most} bytes", hint="copy its parts"
            )
        await self._pieces.put(data)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """All pieces, at least one; what goes wrong breaks the stream off: none takes it for whole.

        Raises:
            ResourceNotFound: there is nothing there; before the first piece.
        """
        packing = asyncio.create_task(self._guest.pack(self._path, self._take))
        try:
            first = await self._next(packing) or b""
            if not first.strip(b"\0"):
                # An archive of nothing: tar says at its end why.
                await packing
            yield first
            while (piece := await self._next(packing)) is not None:
                yield piece
        finally:
            packing.cancel()
            await asyncio.wait({packing})

    async def _next(self, packing: asyncio.Task[None]) -> bytes | None:
        """The next piece; None when it has ended well."""
        if self._pieces.empty():
            coming = asyncio.ensure_future(self._pieces.get())
            try:
                await asyncio.wait({coming, packing}, return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    return coming.result()
            finally:
                coming.cancel()
        if not self._pieces.empty():
            return self._pieces.get_nowait()
        packing.result()
        return None


@router.put(
    "/machines/{machine}/files",
    status_code=204,
    response_model=None,
    responses=documented(404, 409, 413, 502, 504),
    openapi_extra=body_of_type(TAR),
)
async def copy_in(request: Request, here: Here, machine: Machine, path: GuestPath) -> Response:
    """Give its guest a file or a tree; a file that is there is replaced, a directory refused."""
    guest = await _guest(here, machine)
    _checked(path)
    incoming = _Incoming(request, path)
    try:
        await guest.unpack(incoming.pieces(), path)
    except VmlabError as error:
        if incoming.refused is not None and error is not incoming.refused:
            raise incoming.refused from error
        raise
    return Response(status_code=204)


class _Incoming:
    """A tar stream on its way into a guest, looked at as it passes."""

    def __init__(self, request: Request, path: str) -> None:
        self._request = request
        self._name = path.rpartition("/")[2]
        self.refused: InvalidSpec | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The pieces of the body.

        Raises:
            InvalidSpec: it is no tar, or of something else.
        """
        head = b""
        checked = False
        async for piece in self._request.stream():
            if checked:
                yield piece
                continue
            head += piece
            if len(head) >= _BLOCK:
                self._check(head)
                checked = True
                yield head
        if not checked:
            self._check(head)

    def _check(self, head: bytes) -> None:
        """Refuse what does not begin with the header of a tar's member of the right name."""
        problem = ""
        if len(head) < _BLOCK or not _has_checksum(head[:_BLOCK]):
            problem = "a tar stream"
        elif head[156:157] not in b"xgLK":
            # pax and GNU put other headers first where a name is long.
            name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            if name.removeprefix("./").split("/")[0] != self._name:
                problem = f"a tar stream of {self._name!r}, the last name of the path"
        if problem:
            self.refused = InvalidSpec(
                [SpecProblem("body", None, problem)], what="the request", operation="copy"
            )
            raise self.refused


def _has_checksum(header: bytes) -> bool:
    """Whether 512 bytes are a tar's header: they add up to what stands in them (POSIX.1, ustar)."""
    field = header[148:156].strip(b" \0")
    try:
        said = int(field, 8)
    except ValueError:
        return False
    return said == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])

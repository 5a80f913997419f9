"""Bodies that are files: written down as they come, measured, hashed, and compared with a digest.

Content-Digest is RFC 9530's. How much is taken is the gate's business.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Header, Request

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.manager.api.problems import BadRequest
from vmlab.manager.operator.exports import (
    exports_directory,
    forget_parts,
    fresh_parts,
    parts_directory,
)
from vmlab.manager.settings import Settings
from vmlab.manager.storage import file_error
from vmlab.manager.store.tables import new_id

__all__ = ["ContentDigest", "body_of_type", "uploaded"]

_DIGEST: Final = re.compile(r"\s*sha-256\s*=\s*:([A-Za-z0-9+/=]+):\s*")

ContentDigest = Annotated[
    str | None,
    Header(alias="Content-Digest", description='of the body: "sha-256=:BASE64:" (RFC 9530)'),
]
"""What a body is said to be, for a route."""


def body_of_type(media_type: str) -> dict[str, Any]:
    """What OpenAPI is told of a body that is a file, for a route's `openapi_extra`."""
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": {media_type: schema}}}


@asynccontextmanager
async def uploaded(
    request: Request, digest: str | None, settings: Settings, what: str
) -> AsyncIterator[Path]:
    """The body in a file, gone afterwards; the next manager removes what a killed one left of it.

    Args:
        request: Whose body.
        digest: What Content-Digest says, if it is there.
        settings: Of the manager, among whose exports the file is.
        what: What the body should be: "the image's bytes".

    Raises:
        BadRequest: it is not what its digest says, or the digest is none.
        InvalidSpec: it is empty.
        ResourceExhausted: there is no room for it.
    """
    wanted = _sha256_in(digest)
    directory = parts_directory(settings, new_id())
    await fresh_parts(directory)
    try:
        place = directory / "file"
        try:
            found = await _take(request, place, what)
        except OSError as error:
            raise file_error(error, exports_directory(settings) / "the upload") from error
        if wanted is not None and found != wanted:
            raise BadRequest(
                "what came is not what Content-Digest promises: its SHA-256 is "
                f"{base64.b64encode(found).decode()}",
                hint="send it again",
            )
        yield place
    finally:
        await forget_parts(directory)


async def _take(request: Request, place: Path, what: str) -> bytes:
    """Write the body down; returns its SHA-256."""
    hashed = hashlib.sha256()
    size = 0
    file = await asyncio.to_thread(place.open, "wb")
    try:
        async for piece in request.stream():
            size += len(piece)
            hashed.update(piece)
            await asyncio.to_thread(file.write, piece)
    finally:
        await asyncio.to_thread(file.close)
    if size == 0:
        raise InvalidSpec([SpecProblem("body", None, what)], what="the request")
    return hashed.digest()


def _sha256_in(digest: str | None) -> bytes | None:
    """The SHA-256 that a Content-Digest header has.

    Raises:
        BadRequest: it has none.
    """
    if digest is None:
        return None
    # One of each algorithm; base64 has no comma.
    match = next(filter(None, map(_DIGEST.fullmatch, digest.split(","))), None)
    try:
        found = base64.b64decode(match[1], validate=True) if match else b""
    except binascii.Error:
        found = b""
    if len(found) != hashlib.sha256().digest_size:
        raise BadRequest(
            f"Content-Digest: {digest!r} has no SHA-256",
            hint="send sha-256=:BASE64: (RFC 9530)",
        )
    return found

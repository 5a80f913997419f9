"""`/v1/images`: the images that machines are made of, and images that are brought from elsewhere.

What is uploaded is measured, hashed as it comes and compared with the digest that came with it
(RFC 9530), written beside the store, and looked at by `vmlab.images` before it is an image.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from vmlab.images import Image, ImageStore
from vmlab.images.importing import Parts, import_image
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.fields import NAME_PATTERN
from vmlab.manager.api.problems import BadRequest, documented
from vmlab.manager.api.service import Here, Who, told
from vmlab.manager.documents import Page

__all__ = ["ImageDocument", "router"]

router = APIRouter(prefix="/v1", tags=["images"])

_DIGEST: Final = re.compile(r"\s*sha-256\s*=\s*:([A-Za-z0-9+/=]+):\s*")
_OCTETS: Final = "application/octet-stream"


class ImageDocument(BaseModel):
    """An image that is in the store."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str = Field(description="of what it was made from; hexadecimal")
    architecture: Architecture
    size: int = Field(description="bytes of all its files")
    channels: tuple[str, ...] = Field(description="how its guests can be talked to")
    kernel_release: str
    origin: str


def _document(image: Image) -> ImageDocument:
    return ImageDocument(
        name=image.name,
        digest=image.digest,
        architecture=image.architecture,
        size=sum(file.size for file in image.files.values()),
        channels=image.channels,
        kernel_release=image.kernel_release,
        origin=image.origin,
    )


@router.get("/images", response_model=Page[ImageDocument], responses=documented())
async def list_images() -> Response:
    """The images that are there; those of built-in recipes are made when they are first needed."""
    found = await asyncio.to_thread(lambda: ImageStore().images())
    images = sorted((_document(image) for image in found), key=lambda each: each.name)
    return told(Page[ImageDocument](items=tuple(images), total=len(images)))


@router.put(
    "/images/{image}",
    status_code=201,
    response_model=ImageDocument,
    responses=documented(413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {_OCTETS: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_image(
    *,
    request: Request,
    here: Here,
    who: Who,
    image: Annotated[str, InPath(pattern=NAME_PATTERN, description="what it is called then")],
    role: Annotated[
        Literal["disk", "kernel", "root"],
        Query(description="a disk's image (raw or qcow2), a kernel, or a tarred root directory"),
    ] = "disk",
    architecture: Annotated[
        Architecture | None, Query(description="needed where nothing in it tells")
    ] = None,
    cmdline: Annotated[
        str | None, Query(max_length=2048, pattern=r"^[\x20-\x7e]*$", description="the kernel's")
    ] = None,
    digest: Annotated[
        str | None,
        Header(alias="Content-Digest", description='of the body: "sha-256=:BASE64:" (RFC 9530)'),
    ] = None,
) -> Response:
    """Bring an image from elsewhere; one of that name that is there loses it."""
    who.need("admin", "an image from elsewhere")
    wanted = _sha256_in(digest)
    with _beside(here.manager.settings.directory) as place:
        found = await _take(request, place)
        if wanted is not None and found != wanted:
            raise BadRequest(
                "what came is not what Content-Digest promises: its SHA-256 is "
                f"{base64.b64encode(found).decode()}",
                hint="send it again",
            )
        parts: dict[str, Any] = {role: place}
        made = await asyncio.to_thread(
            lambda: import_image(
                ImageStore(), image, Parts(**parts), architecture=architecture, cmdline=cmdline
            )
        )
    return told(_document(made), status=201, headers={"Location": "/v1/images"})


@contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    """A file for what is uploaded, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="upload-", dir=directory) as scratch:
        yield Path(scratch) / "image"


async def _take(request: Request, place: Path) -> bytes:
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
        raise InvalidSpec([SpecProblem("body", None, "the image's bytes")], what="the request")
    return hashed.digest()


def _sha256_in(digest: str | None) -> bytes | None:
    """The SHA-256 that a Content-Digest header has.

    Raises:
        BadRequest: it has none.
    """
    if digest is None:
        return None
    match = _DIGEST.fullmatch(digest)
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

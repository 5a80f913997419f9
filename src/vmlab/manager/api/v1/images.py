"""`/v1/images`: the images that machines are made of, and images that are brought from elsewhere.

What is uploaded is measured, hashed as it comes and compared with the digest that came with it
(RFC 9530), written beside the store, and looked at by `vmlab.images` before it is an image.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from vmlab.images import Image, ImageStore
from vmlab.images.importing import Parts, import_image
from vmlab.machine.architecture import Architecture
from vmlab.machine.fields import NAME_PATTERN
from vmlab.manager.api.problems import documented
from vmlab.manager.api.service import Here, Who, told
from vmlab.manager.api.uploads import ContentDigest, body_of_type, uploaded
from vmlab.manager.documents import Page

__all__ = ["ImageDocument", "router"]

router = APIRouter(prefix="/v1", tags=["images"])

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
    responses=documented(409, 413),
    openapi_extra=body_of_type(_OCTETS),
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
    digest: ContentDigest = None,
) -> Response:
    """Bring an image from elsewhere; one of that name that is there loses it."""
    who.need("admin", "an image from elsewhere")
    settings = here.manager.settings
    async with uploaded(request, digest, settings, "the image's bytes") as place:
        parts: dict[str, Any] = {role: place}
        made = await asyncio.to_thread(
            lambda: import_image(
                ImageStore(), image, Parts(**parts), architecture=architecture, cmdline=cmdline
            )
        )
    return told(_document(made), status=201, headers={"Location": "/v1/images"})

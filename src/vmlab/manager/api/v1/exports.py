"""`/v1/exports`: the archives that machines are exported to and imported from, out and in.

An export is written by its operation and read here; an archive of elsewhere is brought here and
made a machine by an import. What is in one is in `vmlab.manager.machine_archive`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Final

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from vmlab.machine.errors import InvalidSpec, OperationFailed, ResourceNotFound, SpecProblem
from vmlab.machine.fields import NAME_PATTERN, is_name
from vmlab.manager import machine_archive
from vmlab.manager.api.problems import documented
from vmlab.manager.api.service import Here, Service, Who, told
from vmlab.manager.api.streaming import of_type, streamed
from vmlab.manager.api.uploads import ContentDigest, body_of_type, uploaded
from vmlab.manager.api.v1.files import TAR
from vmlab.manager.documents import Page
from vmlab.manager.lending import is_lent
from vmlab.manager.operator.exports import export_path, exports_directory, keep_archive

__all__ = ["ExportDocument", "router"]

router = APIRouter(prefix="/v1", tags=["exports"])

_CHUNK: Final = 1 << 20

Export = Annotated[str, InPath(pattern=NAME_PATTERN, description="name of the archive")]


class ExportDocument(BaseModel):
    """An archive of a machine that was exported, here or elsewhere."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int = Field(description="bytes")
    written: datetime


def _document(path: Path) -> ExportDocument:
    facts = path.stat()
    written = datetime.fromtimestamp(facts.st_mtime, UTC)
    return ExportDocument(name=path.name, size=facts.st_size, written=written)


@router.get("/exports", response_model=Page[ExportDocument], responses=documented())
async def list_exports(here: Here) -> Response:
    """The archives that are there, by name."""

    def look() -> list[ExportDocument]:
        directory = exports_directory(here.manager.settings)
        names = sorted(path.name for path in directory.iterdir() if path.is_file())
        there = []
        for name in names:
            if is_name(name) and not is_lent(name):
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    there.append(_document(directory / name))
        return there

    found = await asyncio.to_thread(look)
    return told(Page[ExportDocument](items=tuple(found), total=len(found)))


@router.get(
    "/exports/{export}",
    response_class=Response,
    responses=of_type(TAR, "The archive (tar).") | documented(404),
)
async def download_export(request: Request, here: Here, who: Who, export: Export) -> Response:
    """An archive, with all that is on the machine's disks."""
    who.need("operate", "what is on a machine's disks")
    file, size = await asyncio.to_thread(_opened, here, export)
    return await streamed(
        request, _pieces(file), media_type=TAR, headers={"Content-Length": str(size)}
    )


def _opened(here: Service, export: str) -> tuple[IO[bytes], int]:
    try:
        file = _path_of(here, export).open("rb")
    except FileNotFoundError:
        raise _missing(export) from None
    return file, os.fstat(file.fileno()).st_size


async def _pieces(file: IO[bytes]) -> AsyncGenerator[bytes]:
    """A file, piece by piece; at least one, and closed afterwards."""
    try:
        while True:
            piece = await asyncio.to_thread(file.read, _CHUNK)
            yield piece
            if len(piece) < _CHUNK:
                return
    finally:
        file.close()


@router.put(
    "/exports/{export}",
    status_code=201,
    response_model=ExportDocument,
    responses=documented(409, 413),
    openapi_extra=body_of_type(TAR),
)
async def upload_export(
    *, request: Request, here: Here, who: Who, export: Export, digest: ContentDigest = None
) -> Response:
    """Bring an archive from elsewhere; `machine.import` makes a machine of it.

    The same archive again is no other one; what is there is never overwritten. One that is called
    `once-` and 16 hexadecimal digits is removed a week after it was written.
    """
    who.need("admin", "an archive from elsewhere")
    if is_lent(export):
        expected = 'another name: those that begin with "import-" are of files that are lent'
        raise InvalidSpec([SpecProblem("export", export, expected)], what="the request")
    settings = here.manager.settings
    target = export_path(settings, export)

    def keep(place: Path) -> None:
        try:
            machine_archive.read_manifest(place)
        except OperationFailed as error:
            expected = "an archive that `vmlab export` has written"
            raise InvalidSpec([SpecProblem("body", None, expected)], what="the request") from error
        with place.open("rb") as file:
            os.fsync(file.fileno())
        if not (target.is_file() and _same(place, target)):
            keep_archive(place, target)

    async with uploaded(request, digest, settings, "the archive's bytes") as place:
        await asyncio.to_thread(keep, place)
    location = {"Location": f"/v1/exports/{export}"}
    return told(await asyncio.to_thread(_document, target), status=201, headers=location)


def _same(one: Path, other: Path) -> bool:
    """Whether two files have the same contents."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while piece := first.read(_CHUNK):
            if piece != second.read(_CHUNK):
                return False
    return True


@router.delete("/exports/{export}", status_code=204, response_model=None, responses=documented(404))
async def delete_export(here: Here, export: Export) -> Response:
    """Remove an archive; machines that were made of it stay."""
    await asyncio.to_thread(lambda: _path_of(here, export).unlink(missing_ok=True))
    return Response(status_code=204)


def _path_of(here: Service, export: str) -> Path:
    """Where an archive is that is the manager's own, and not lent to it.

    Raises:
        ResourceNotFound: there is none of that name.
    """
    path = export_path(here.manager.settings, export)
    if is_lent(export) or not path.is_file():
        raise _missing(export)
    return path


def _missing(export: str) -> ResourceNotFound:
    return ResourceNotFound(
        f"there is no archive {export!r} among the exports", hint="GET /v1/exports lists them"
    )

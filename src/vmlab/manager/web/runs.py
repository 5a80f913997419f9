"""The pages of test runs: the lab's reports, from the directory that it keeps them in.

Nothing of it is the store's. A report shows what guests printed, so it is a page of no origin: it
may run its own script and can reach nothing of this service (CSP's `sandbox`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import BaseRoute

from vmlab.machine.errors import ResourceNotFound
from vmlab.machine.places import reports_directory
from vmlab.manager.web.rendering import headers
from vmlab.manager.web.visit import Pages, Visit
from vmlab.report.model import Outcome
from vmlab.report.shelf import RunSummary, run_directories, summarize

if TYPE_CHECKING:
    from vmlab.report.model import Artifact, Run

__all__ = ["routes"]

_MOST: Final = 50
"""Runs that are listed."""
_OUTCOMES: Final = tuple(outcome.value for outcome in Outcome)

_REPORT: Final = (
    "sandbox allow-scripts allow-popups allow-downloads; default-src 'none'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Beside the policy that is in the report, which names its style and script by their hashes."""
_FILE: Final = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def routes(pages: Pages) -> list[BaseRoute]:
    """The routes of these pages."""
    return [
        pages.get("/runs", runs),
        pages.get("/runs/{run}", report),
        pages.get("/runs/{run}/files/{path:path}", file),
    ]


def _directory(name: str) -> Path:
    """The directory of the run of that name, of those that are there.

    Raises:
        ResourceNotFound: There is none.
    """
    for path in run_directories():
        if path.name == name:
            return path
    raise ResourceNotFound(
        f"there is no test run {name!r}", hint="those that are there are listed on the page before"
    )


def _summaries() -> list[RunSummary]:
    return [
        _summary(path, path.stat().st_mtime_ns)
        for path, _ in zip(run_directories(), range(_MOST), strict=False)
    ]


@lru_cache(4 * _MOST)
def _summary(path: Path, changed: int) -> RunSummary:
    """The run in a directory that was changed then."""
    return summarize(path)


def _run(path: Path) -> Run:
    from vmlab.report import read_run

    return read_run(path)


async def runs(visit: Visit) -> Response:
    """The last runs."""
    return visit.page(
        "runs",
        runs=await asyncio.to_thread(_summaries),
        directory=reports_directory(),
        outcomes=_OUTCOMES,
    )


async def report(visit: Visit) -> Response:
    """The report of a run, as `vmlab report` makes it."""
    text = await asyncio.to_thread(_report, visit.path("run"))
    return HTMLResponse(text, headers={**headers(), "Content-Security-Policy": _REPORT})


def _report(name: str) -> bytes:
    from vmlab.report import html

    path = _directory(name)
    return html.render(_run(path), path, links=f"/ui/runs/{name}/files/")


async def file(visit: Visit) -> Response:
    """A file of a run that its report names."""
    found = await asyncio.to_thread(_file, visit.path("run"), visit.path("path"))
    path, artifact = found
    plain = artifact.media_type.startswith("text/")
    return FileResponse(
        path,
        media_type="text/plain; charset=utf-8" if plain else artifact.media_type,
        headers={**headers(), "Content-Security-Policy": _FILE},
        filename=None if plain else path.name,
    )


def _file(name: str, wanted: str) -> tuple[Path, Artifact]:
    """The file of a run's artifact, and the artifact.

    Raises:
        ResourceNotFound: The report names none like that, or it is not there any more.
    """
    directory = _directory(name)
    for artifact in _artifacts(_run(directory)):
        path = directory / artifact.path
        if artifact.path == wanted and path.is_file() and not path.is_symlink():
            return path, artifact
    raise ResourceNotFound(f"run {name} has no file {wanted!r}")


def _artifacts(run: Run) -> Iterator[Artifact]:
    yield from run.artifacts
    for test in run.tests():
        for attempt in test.attempts:
            yield from attempt.artifacts

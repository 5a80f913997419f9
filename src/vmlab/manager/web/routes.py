"""All routes of the page, as one router that the service mounts: below `/ui`, and `/` leads there.

Not in the OpenAPI description: programs use `/v1`.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from vmlab.machine.errors import ResourceNotFound
from vmlab.manager.web import (
    disks,
    findings,
    live,
    machines,
    networks,
    operations,
    overview,
    readings,
    runs,
    session,
    templates,
)
from vmlab.manager.web.assets import asset_at
from vmlab.manager.web.rendering import headers
from vmlab.manager.web.visit import HOME, Pages

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["router"]

_ROOMS = (
    machines,
    readings,
    disks,
    networks,
    templates,
    operations,
    findings,
    overview,
    runs,
    live,
    session,
)


def router(manager: Manager) -> APIRouter:
    """The routes of the page of a manager.

    The application that they are mounted in has the gate in front of it, which says who asks, and
    the service at `app.state.service`.
    """
    pages = Pages(manager)
    routes: list[BaseRoute] = [
        Route("/", _home, methods=["GET"], include_in_schema=False),
        Route("/ui", _home, methods=["GET"], include_in_schema=False),
        Route("/ui/assets/{digest}/{name}", _asset, methods=["GET"], include_in_schema=False),
    ]
    for room in _ROOMS:
        routes += room.routes(pages)
    return APIRouter(routes=routes, include_in_schema=False)


async def _home(request: Request) -> Response:
    return RedirectResponse(HOME, HTTPStatus.SEE_OTHER, headers())


async def _asset(request: Request) -> Response:
    try:
        found = asset_at(request.path_params["digest"], request.path_params["name"])
    except ResourceNotFound as error:
        return Response(str(error), HTTPStatus.NOT_FOUND, headers(), "text/plain")
    told = headers() | {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(found.data, headers=told, media_type=found.media_type)

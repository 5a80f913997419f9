"""The service of one manager as an ASGI application: its routes, behind one gate.

What it says of itself (`/openapi.json`, `/openapi.yaml`) is made from the routes, so that it cannot
say anything else than what they do; tests hold them against it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vmlab import __version__
from vmlab.machine.errors import VmlabError
from vmlab.manager.api import problems, vman
from vmlab.manager.api.gate import Gate
from vmlab.manager.api.health import Health, health
from vmlab.manager.api.limits import Limits, Places
from vmlab.manager.api.meters import Meters, count
from vmlab.manager.api.security import Authenticator
from vmlab.manager.api.service import Here, Service, told
from vmlab.manager.api.v1 import (
    console,
    events,
    execute,
    exports,
    files,
    images,
    machines,
    operations,
    things,
    tokens,
)

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["create_app", "end_streams"]

_PARTS: Final = (
    machines, things, operations, events, tokens, files, images, exports, console, execute, vman,
)  # fmt: skip

_ABOUT = """\
Machines, disks and networks that outlive a command. Every change is an operation: it is answered
with 202 and where to follow it, or with `wait` when it has ended. Errors are problem details
(RFC 9457) with a `hint`. Lists have pages: `next` is the `cursor` of the next one. Events are at
`/v1/events`, as pages or as a stream of server-sent events. WebSockets:
`/v1/machines/{machine}/console` and `/v1/machines/{machine}/exec`.

Routes without `/v1` are those of VMAN, for its clients.
"""


def create_app(manager: Manager, *, authenticate: bool, limits: Limits | None = None) -> FastAPI:
    """The service of a manager that was started.

    Args:
        manager: Whose service it is.
        authenticate: Ask for tokens: wherever anybody but its user can connect. On a unix socket
            the permissions of the file are the authentication.
        limits: How much is taken of one client.
    """
    # The pages are built upon this package.
    from vmlab.manager.web.routes import router as pages

    limits = limits or Limits()
    meters = Meters()
    service = Service(
        manager=manager,
        authenticator=Authenticator(manager.database) if authenticate else None,
        limits=limits,
        meters=meters,
        streams=Places(limits.streams, "streams, consoles and commands"),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        end_streams(app)

    app = FastAPI(
        title="vmlab manager",
        version=__version__,
        description=_ABOUT,
        # The interactive pages would be loaded from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(
        Gate,
        authenticator=service.authenticator,
        limits=limits,
        meters=meters,
        rate=manager.settings.rate_limit,
    )
    app.add_exception_handler(VmlabError, problems.on_vmlab_error)
    app.add_exception_handler(RequestValidationError, problems.on_invalid_request)
    app.add_exception_handler(HTTPException, problems.on_http_error)
    for kind in problems.STORE_ERRORS:
        app.add_exception_handler(kind, problems.on_store_error)
    for part in _PARTS:
        app.include_router(part.router)
    _add_own_routes(app)
    app.include_router(pages(manager))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's own way
    return app


def end_streams(app: FastAPI) -> None:
    """End what stays open: event streams, consoles, commands, and waiting for operations.

    For a server that is to end: it waits for its connections.
    """
    service: Service = app.state.service
    service.closing.set()


def _add_own_routes(app: FastAPI) -> None:
    """What is about the service itself."""

    @app.get(
        "/health",
        tags=["service"],
        response_model=Health,
        responses={503: {"model": Health, "description": "A part is out of order; it says which."}},
    )
    async def show_health(here: Here) -> Response:
        """Whether every part works."""
        found = await health(here.manager)
        status = 200 if found.status == "ok" else 503
        return told(found, status=status)

    @app.get(
        "/metrics",
        tags=["service"],
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **problems.documented(),
        },
    )
    async def show_metrics(here: Here) -> Response:
        """What Prometheus reads."""
        counts = await here.manager.database.read(count)
        return Response(
            here.meters.text(counts), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get(
        "/openapi.yaml",
        tags=["service"],
        response_class=Response,
        responses={200: {"content": {"application/yaml": {"schema": {"type": "object"}}}}},
    )
    async def show_openapi() -> Response:
        """This description; JSON is YAML, too (YAML 1.2, 1.3)."""
        return Response(json.dumps(app.openapi(), indent=2), media_type="application/yaml")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """What the service says of itself."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        )
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        _, told_of = models_json_schema(
            [(problems.Problem, "serialization")], ref_template="#/components/schemas/{model}"
        )
        schemas.update(told_of["$defs"])
        made["components"]["securitySchemes"] = {
            "token": {
                "type": "http",
                "scheme": "bearer",
                "description": "Asked for over TCP, and not on the unix socket.",
            }
        }
        made["security"] = [{"token": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema

"""Errors as HTTP tells them: problem details (RFC 9457) with hint, fields and vmlab's own record.

The status says whose turn it is: 404 there is no such thing, 409 something that is there now is in
the way, 410 it is not kept any more, 412 somebody changed it meanwhile, 422 it cannot work as it is
written, 429 too fast, 502 the hypervisor or the guest could not, 503 something is out of order
here, 504 it took too long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final, get_args, get_origin

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, create_model
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.websockets import WebSocket

from vmlab.guests.guest import CommandFailed
from vmlab.images.errors import (
    FormatError,
    ImageError,
    ImageNotFound,
    RecipeError,
    StoreError,
    ToolMissing,
)
from vmlab.machine.errors import (
    DeadlineExceeded,
    HypervisorUnavailable,
    InvalidSpec,
    InvalidState,
    MachineExists,
    OperationFailed,
    ResourceExhausted,
    ResourceNotFound,
    SpecProblem,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.problems import described
from vmlab.manager.store.failures import Conflict, EventsGone, PreconditionFailed, StoreUnavailable

MEDIA_TYPE: Final = "application/problem+json"
RETRY_SECONDS: Final = 5
"""What `Retry-After` says where nobody knows better."""


class BadRequest(VmlabError):
    """A request that is none: its syntax, not its meaning."""

    exit_code = 2


class Forbidden(VmlabError):
    """Who asks may not do this."""


class Unauthenticated(VmlabError):
    """Nobody knows who asks."""


class TooLarge(VmlabError):
    """More than is taken at once."""


class TooFast(VmlabError):
    """More requests than are taken in a while; `seconds` is how long to wait."""

    _fields = ("seconds",)

    def __init__(self, message: str, *, seconds: float, hint: str | None = None) -> None:
        self.seconds = seconds
        super().__init__(message, hint=hint)


class FieldProblem(BaseModel):
    """One thing that is wrong with a request."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description='where, such as "memory" or "nics.0.mac"')
    value: Any = Field(None, description="what stands there; null where nothing does")
    expected: str = Field(description="what would be right")


class Problem(BaseModel):
    """What went wrong, and what to do about it (RFC 9457).

    The fields of `VmlabError.to_record` stand beside those of the RFC, as extensions.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str = Field(description='"urn:vmlab:problem:" and the kind of the error')
    title: str = Field(description="the status in words")
    status: int
    detail: str = Field(description="what was tried and what came back")
    instance: str | None = Field(None, description="path of what was asked for")
    hint: str | None = Field(None, description="what to do next")
    problems: tuple[FieldProblem, ...] = Field((), description="what is wrong, field by field")
    request_id: str | None = Field(None, description="finds the request in the manager's log")
    kind: str = Field(description="the error's kind, by which the Python client raises it again")


_STATUS: Final[Mapping[type[BaseException], int]] = {
    BadRequest: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    ResourceNotFound: 404,
    ImageNotFound: 404,
    Conflict: 409,
    MachineExists: 409,
    InvalidState: 409,
    ResourceExhausted: 409,
    CommandFailed: 409,
    PreconditionFailed: 412,
    TooLarge: 413,
    InvalidSpec: 422,
    UnsupportedOperation: 422,
    FormatError: 422,
    RecipeError: 422,
    TooFast: 429,
    OperationFailed: 502,
    EventsGone: 410,
    HypervisorUnavailable: 503,
    StoreUnavailable: 503,
    StoreError: 503,
    ToolMissing: 503,
    DeadlineExceeded: 504,
    ImageError: 422,
    VmlabError: 400,
}
"""The nearest class above an error's own decides."""


def status_of(error: VmlabError) -> int:
    """The HTTP status of an error."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def problem(error: VmlabError, *, instance: str | None, request_id: str | None) -> Problem:
    """An error as problem details."""
    status = status_of(error)
    rows = error.problems if isinstance(error, InvalidSpec) else ()
    # Where a name is the RFC's too (a command's `status`), the RFC's meaning stands.
    record = {
        name: value for name, value in error.to_record().items() if name not in Problem.model_fields
    }
    return Problem(
        type=f"urn:vmlab:problem:{type(error).__name__}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=str(error),
        instance=instance,
        hint=error.hint,
        problems=tuple(
            FieldProblem(field=row.field, value=row.value, expected=row.expected) for row in rows
        ),
        request_id=request_id,
        kind=type(error).__name__,
        **record,
    )


def response_of(
    error: VmlabError,
    *,
    instance: str | None = None,
    request_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    status: int | None = None,
) -> Response:
    """An error as a reply, with the headers that its status asks for.

    Args:
        error: What went wrong.
        instance: The path that was asked for.
        request_id: Of the request.
        headers: More headers.
        status: Another status than that of the error's kind.
    """
    told = problem(error, instance=instance, request_id=request_id)
    if status is not None:
        told = told.model_copy(update={"status": status, "title": HTTPStatus(status).phrase})
    extra = dict(headers or {})
    if isinstance(error, TooFast):
        extra.setdefault("Retry-After", str(max(1, round(error.seconds + 0.5))))
    elif told.status == HTTPStatus.SERVICE_UNAVAILABLE:
        extra.setdefault("Retry-After", str(RETRY_SECONDS))
    elif told.status == HTTPStatus.UNAUTHORIZED:
        extra.setdefault("WWW-Authenticate", 'Bearer realm="vmlab"')  # RFC 6750, 3
    return Response(
        told.model_dump_json().encode(),
        status_code=told.status,
        headers=extra,
        media_type=MEDIA_TYPE,
    )


def request_id_of(request: Request) -> str | None:
    """The id of a request, if it has come through the gate."""
    return getattr(request.state, "request_id", None)


# ------------------------------------------------------------------- what FastAPI calls


async def on_vmlab_error(request: Request, error: Exception) -> Response:
    """A VmlabError, wherever in a route it came from; of a WebSocket the gate tells it."""
    if isinstance(request, WebSocket):
        raise error
    assert isinstance(error, VmlabError)
    return response_of(error, instance=request.url.path, request_id=request_id_of(request))


async def on_invalid_request(request: Request, error: Exception) -> Response:
    """What pydantic has to say of a request, in vmlab's words."""
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    refused: VmlabError
    if any(detail["type"] == "json_invalid" for detail in details):
        said = next(detail for detail in details if detail["type"] == "json_invalid")
        refused = BadRequest(
            f"the body is not JSON: {said.get('ctx', {}).get('error', said['msg'])} "
            f"at character {said['loc'][-1]}",
            hint="send a JSON document with the Content-Type application/json",
        )
    elif any(isinstance(detail["input"], bytes) for detail in details):
        refused = BadRequest(
            "the body is not said to be JSON",
            hint="send it with the header Content-Type: application/json",
        )
    else:
        refused = InvalidSpec(
            _listed(request, details),
            what="the request",
            hint="/openapi.json describes every field",
            operation=request.method.lower(),
        )
    return response_of(refused, instance=request.url.path, request_id=request_id_of(request))


def _listed(request: Request, details: Sequence[Any]) -> list[SpecProblem]:
    """Pydantic's complaints about path, query, headers and body, each seen from there."""
    found = []
    for detail in details:
        place, *location = detail["loc"]
        model = _body_model(request) if place == "body" else _Anything
        if place == "body" and model.model_fields.keys() == {"body"}:
            location = ["body", *location]
        (one,) = described([{**detail, "loc": tuple(location)}], model)
        field = one.field.removeprefix("body.") if model is not _Anything else one.field
        found.append(SpecProblem(field, one.value, one.expected))
    return found


class _Anything(BaseModel):
    """A model that knows no fields."""


def _body_model(request: Request) -> type[BaseModel]:
    """The model of a route's body; of a union a model whose only field `body` is that."""
    field = getattr(request.scope.get("route"), "body_field", None)
    if field is None:
        return _Anything
    annotation = field.field_info.annotation
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    members = [one for one in get_args(annotation) if one is not type(None)] or [annotation]
    if len(members) == 1 and isinstance(members[0], type) and issubclass(members[0], BaseModel):
        return members[0]
    return create_model("Request", body=(annotation, ...))


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: no such route, no such method, a body too large."""
    assert isinstance(error, HTTPException)
    refused: VmlabError
    if error.status_code == HTTPStatus.NOT_FOUND:
        refused = ResourceNotFound(
            f"there is nothing at {request.url.path}", hint="/openapi.json lists every route"
        )
    elif error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        refused = TooLarge(str(error.detail))
    else:
        refused = BadRequest(f"{request.method} {request.url.path}: {error.detail}")
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(allowed(request.app, request.url.path)))
    return response_of(
        refused,
        instance=request.url.path,
        request_id=request_id_of(request),
        headers=headers,
        status=error.status_code,
    )


def allowed(app: FastAPI, path: str) -> set[str]:
    """The methods that there are at a path, by all routes together (RFC 9110, 10.2.1)."""
    return {
        method.upper()
        for template, methods in app.openapi()["paths"].items()
        if compile_path(template)[0].match(path)
        for method in methods
    }


async def on_store_error(request: Request, error: Exception) -> Response:
    """The database is gone, busy for too long, or was given what it cannot hold."""
    refused: VmlabError
    if isinstance(error, DataError):
        refused = BadRequest("a value in the request cannot be kept in the store")
    else:
        refused = StoreUnavailable(
            "the manager's store does not answer", hint="look at the manager's log; try again"
        )
    return response_of(refused, instance=request.url.path, request_id=request_id_of(request))


STORE_ERRORS: Final = (OperationalError, InterfaceError, DataError, PoolTimeout)
"""What SQLAlchemy raises where it is the database's fault, or the value's."""


# ------------------------------------------------------------------- what OpenAPI says of them

_ABOUT: Final[Mapping[int, str]] = {
    400: "The request is malformed.",
    401: "There is no valid token.",
    403: "The token's scope does not allow it, or another site's page asked.",
    404: "There is no such thing.",
    409: "It contradicts what is there now: a name, a state, a limit.",
    410: "Events that old are not kept any more.",
    412: "It was changed meanwhile: `If-Match` names another version.",
    413: "The body is larger than is taken.",
    422: "It cannot work as it is written; `problems` says why, field by field.",
    429: "Too many requests; `Retry-After` says when to come back.",
    502: "The hypervisor or the guest could not do it.",
    503: "A part of the manager, or the hypervisor, is out of order.",
    504: "It took too long.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its errors, each as problem details."""
    return {
        status: {
            "description": _ABOUT[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({400, 401, 403, 422, 429, 503, *statuses})
    }

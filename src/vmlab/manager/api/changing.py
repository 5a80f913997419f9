"""How a change is asked for over HTTP: its headers, its answer, and what scope it takes.

Every change is an operation: 202 with its address, 200 where it has ended already. `wait` is a
question of patience, not of the operation: it goes on whether somebody waits or not.
"""

from __future__ import annotations

import asyncio
import re
from copy import copy
from datetime import datetime
from inspect import Parameter, Signature
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Request
from pydantic import BaseModel, create_model
from starlette.responses import Response

from vmlab.machine.documents import build
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.manager import requests
from vmlab.manager.api.problems import BadRequest, documented, request_id_of
from vmlab.manager.api.service import Here, Service, Who, told
from vmlab.manager.documents import ENDED, OperationDocument
from vmlab.manager.requests import Moment

__all__ = ["ANSWERS", "Asked", "Change", "ended", "route_of_change"]

LONGEST_WAIT: Final = 600.0
"""Seconds that a request may wait; clients and proxies give up on longer ones."""

_ETAG: Final = re.compile(r'\s*"([0-9]{1,18})"\s*')

ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": OperationDocument,
        "description": "It has ended already: `state` says how. Or this was a dry run.",
    },
    202: {
        "description": "It is taken on.",
        "headers": {
            "Location": {
                "description": "Where to ask how it goes.",
                "schema": {"type": "string"},
            }
        },
    },
    **documented(404, 409, 412, 413, 502, 504),
}
"""What a change is answered with, for a route's `responses`."""


def _version(if_match: str | None) -> int | None:
    """The version that a change was decided upon (RFC 9110, 13.1.1); None is any.

    Raises:
        BadRequest: it is no entity tag of the manager's.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    match = _ETAG.fullmatch(if_match)
    if match is None:
        raise BadRequest(
            f"If-Match: {if_match!r} is no version",
            hint='give one ETag as it was told, with its quotes, such as "3"; or "*"',
        )
    return int(match[1])


class Change:
    """How one request wants its change done."""

    def __init__(
        self,
        service: Service,
        who: Who,
        request: Request,
        *,
        wait: float = 0.0,
        dry_run: bool | None = None,
        key: str | None = None,
        if_match: int | None = None,
        deadline: datetime | None = None,
    ) -> None:
        self._service = service
        self._who = who
        self._request = request
        self._wait = wait
        self._dry_run = dry_run
        self._key = key
        self._if_match = if_match
        self._deadline = deadline

    async def submit(self, wanted: requests.Request) -> Response:
        """Ask for it, and answer.

        Args:
            wanted: What is asked for.

        Raises:
            VmlabError: it is refused.
        """
        operation = await self.taken(wanted)
        if operation.dry_run:
            return told(operation)
        operation = await ended(self._service, operation, self._wait)
        return told(
            operation,
            status=200 if operation.state in ENDED else 202,
            headers={"Location": f"/v1/operations/{operation.id}"},
        )

    async def taken(self, wanted: requests.Request) -> OperationDocument:
        """Ask for it; returns the operation as it was taken on.

        Raises:
            VmlabError: it is refused.
        """
        _need_scope(self._who, wanted)
        operation = await self._service.manager.operator.submit(
            wanted,
            actor=self._who.name,
            idempotency_key=self._key,
            request_id=request_id_of(self._request),
            dry_run=self._dry_run,
            deadline=self._deadline,
            if_match=self._if_match,
        )
        self._request.state.operation = operation.id
        return operation


async def ended(
    service: Service, operation: OperationDocument, seconds: float
) -> OperationDocument:
    """An operation when it has ended, or when so many seconds are over, as it is then.

    When the service ends, nobody is kept waiting.
    """
    if operation.state in ENDED or seconds <= 0:
        return operation
    waiting = asyncio.ensure_future(service.manager.operator.wait(operation.id, timeout=seconds))
    closing = asyncio.ensure_future(service.closing.wait())
    try:
        await asyncio.wait({waiting, closing}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        return operation
    finally:
        for task in (waiting, closing):
            task.cancel()
        await asyncio.wait({waiting, closing})


def _need_scope(who: Who, wanted: BaseModel) -> None:
    """Refuse what may name files of the manager's host to those who may only operate machines.

    Raises:
        Forbidden: it does.
    """
    if getattr(wanted, "spec", None):
        who.need("admin", "a whole specification, which may name files of the manager's host,")


async def _change(
    *,
    here: Here,
    who: Who,
    request: Request,
    wait: Annotated[
        float,
        Query(ge=0, le=LONGEST_WAIT, description="seconds to wait for its end before answering"),
    ] = 0.0,
    deadline: Annotated[
        Moment | None, Query(description="when it has to be done; then it is undone")
    ] = None,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=255,
            pattern=r"^[\x21-\x7e]+$",
            description="the same key again is the same operation, not another one",
        ),
    ] = None,
    if_match: Annotated[
        str | None,
        Header(alias="If-Match", description="refuse it unless this is its version (its ETag)"),
    ] = None,
    dry_run: Annotated[
        bool | None,
        Header(alias="Vmlab-Dry-Run", description="only say, step by step, what would be done"),
    ] = None,
) -> Change:
    if deadline is not None and deadline.tzinfo is None:
        raise InvalidSpec(
            [SpecProblem("deadline", str(deadline), "a time with its zone, such as ...T12:00:00Z")],
            what="the request",
        )
    return Change(
        here,
        who,
        request,
        wait=wait,
        dry_run=dry_run,
        key=key,
        if_match=_version(if_match),
        deadline=deadline,
    )


Asked = Annotated[Change, Depends(_change)]
"""How the change of a route is wanted."""


def body_of(model: type[BaseModel], *without: str) -> type[BaseModel]:
    """A request without its kind, and without what stands in the path already."""
    fields: dict[str, Any] = {
        name: (field.annotation, copy(field))
        for name, field in model.model_fields.items()
        if name not in ("kind", *without)
    }
    made: type[BaseModel] = create_model(
        f"{model.__name__}Body",
        # FastAPI makes its validators of models that are built.
        __config__={**model.model_config, "defer_build": False},
        __doc__=model.__doc__,
        **fields,
    )
    return made


def route_of_change(
    router: APIRouter,
    path: str,
    model: type[Any],
    *,
    name: str,
    noun: str | None = None,
    method: str = "POST",
    tag: str | None = None,
) -> None:
    """Add the route of a change; its body is the request without what stands in the path.

    Args:
        router: Where to.
        path: With `{NOUN}` in it, if it is about one thing.
        model: The request, one of `vmlab.manager.requests`.
        name: The route's own name: "start_machine".
        noun: The field of the request that says what it is about: "machine"; None if none does.
        method: HTTP's.
        tag: What it is listed under; as the router's if left out.
    """
    body = body_of(model, *filter(None, [noun]))
    needed = any(field.is_required() for field in body.model_fields.values())

    async def act(**given: Any) -> Response:
        change: Change = given["change"]
        said: BaseModel | None = given.get("body")
        fields = (
            {} if said is None else {part: getattr(said, part) for part in said.model_fields_set}
        )
        if noun is not None:
            fields[noun] = given[noun]
        return await change.submit(build(model, fields))

    parameters = [Parameter("change", Parameter.KEYWORD_ONLY, annotation=Asked)]
    if noun is not None:
        described = Path(description=f"name or id of the {noun}")
        parameters.append(
            Parameter(noun, Parameter.KEYWORD_ONLY, annotation=Annotated[str, described])
        )
    if body.model_fields:
        parameters.append(
            Parameter(
                "body",
                Parameter.KEYWORD_ONLY,
                annotation=Annotated[body if needed else body | None, Body()],
                default=Parameter.empty if needed else None,
            )
        )
    act.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # what FastAPI reads
    act.__name__ = name
    act.__doc__ = model.__doc__
    router.add_api_route(
        path,
        act,
        methods=[method],
        status_code=202,
        response_model=OperationDocument,
        responses=ANSWERS,
        tags=[tag] if tag is not None else None,
    )

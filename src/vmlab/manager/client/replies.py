"""What came back, as what it means: a document, or the error that the manager raised.

The service tells errors as RFC 9457 has them, with the fields of `VmlabError.to_record` beside;
they become the same kind of error again. What is no such answer at all is `Unreachable`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from vmlab.machine.errors import (
    HypervisorUnavailable,
    OperationAborted,
    OperationFailed,
    VmlabError,
    from_record,
)
from vmlab.manager.client.address import TOKEN_VARIABLE, Address
from vmlab.manager.documents import OperationDocument, Page
from vmlab.manager.store.failures import Conflict, EventsGone, PreconditionFailed

__all__ = ["KINDS", "Unreachable", "checked", "ended", "error_of", "page_of", "told"]

T = TypeVar("T")
D = TypeVar("D", bound=BaseModel)

KINDS: Final = (Conflict, EventsGone, PreconditionFailed)
"""Errors that only a manager raises: an error's kind has to be imported to be raised again."""

_RARE: Final = ("vmlab.manager.api.problems", "vmlab.guests.guest", "vmlab.images.errors")
"""Where the kinds of errors are that are told rarely, and that take long to be imported."""

_EXCERPT: Final = 200
"""Characters of an answer that nobody understands which its error quotes."""


class Unreachable(HypervisorUnavailable):
    """The manager does not answer, or something answers that is no manager."""


def told(model: type[T] | TypeAdapter[T], content: bytes, address: Address) -> T:
    """The document in an answer.

    Raises:
        Unreachable: it is none.
    """
    try:
        if isinstance(model, TypeAdapter):
            return model.validate_json(content)
        if issubclass(model, BaseModel):
            return model.model_validate_json(content)
        return TypeAdapter(model).validate_json(content)
    except ValidationError as error:
        raise Unreachable(
            f"what answers at {address} is no manager of this version: {error.errors()[0]['msg']}",
            hint="is the address right, and is the manager there as new as this vmlab?",
        ) from error


def page_of(model: type[D]) -> TypeAdapter[Page[D]]:
    """What reads a page of such documents."""
    # A type that is made of a variable is none to mypy, though it is one to pydantic.
    reader: TypeAdapter[Page[D]] = TypeAdapter(cast("Any", Page)[model])
    return reader


def checked(status: int, content: bytes, address: Address) -> None:
    """Refuse an answer that is an error.

    Raises:
        VmlabError: of the kind that the manager raised.
    """
    if status >= 400:
        raise error_of(status, content, address)


def error_of(status: int, content: bytes, address: Address) -> VmlabError:
    """The error that an answer of a status of 400 and above tells."""
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, Mapping) or not ({"title", "detail", "kind"} & set(body)):
        text = content[:_EXCERPT].decode("utf-8", "backslashreplace").strip()
        said = f", {text!r}" if text else ""
        return Unreachable(
            f"what answers at {address} is no manager: status {status}{said}",
            hint="is the address right?",
        )
    return _of_its_kind(_record(status, body))


def _of_its_kind(record: Mapping[str, Any]) -> VmlabError:
    """The error of a record; where its kind is defined is imported if it is not known yet."""
    error = from_record(record)
    if type(error) is VmlabError and record.get("kind") != VmlabError.__name__:
        for module in _RARE:
            importlib.import_module(module)
        error = from_record(record)
    return error


def _record(status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """`VmlabError.to_record` of a problem (RFC 9457, section 3)."""
    record = dict(body)
    if not record.get("message"):
        record["message"] = str(body.get("detail") or body.get("title"))
    if body.get("problems"):
        # `InvalidSpec` keeps them as rows.
        record["problem_rows"] = [
            [each.get("field"), each.get("value"), each.get("expected")]
            for each in body["problems"]
        ]
    # Here a token is no header, but a variable.
    if status == HTTPStatus.UNAUTHORIZED or (
        status == HTTPStatus.FORBIDDEN and not record.get("hint")
    ):
        record["hint"] = (
            f"set {TOKEN_VARIABLE} to a token that may do this; "
            "`vmlab token create`, where the manager runs, makes one"
        )
    return record


def ended(operation: OperationDocument) -> OperationDocument:
    """An operation that has succeeded, or its error.

    Raises:
        OperationAborted: it was cancelled.
        VmlabError: of the kind that it failed with.
    """
    if operation.state == "cancelled":
        raise OperationAborted(
            f"{operation.kind} of {operation.target_name or operation.target} was cancelled",
            hint=f"`vmlab operations show {operation.id}` tells what was undone",
            operation=operation.kind,
        )
    if operation.state == "failed":
        if operation.error is not None:
            raise _of_its_kind(operation.error)
        raise OperationFailed(
            f"{operation.kind} failed, and nothing says why", operation=operation.kind
        )
    return operation

"""Errors come back as the kinds that the manager raised."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from vmlab.machine.errors import (
    InvalidSpec,
    InvalidState,
    MachineNotFound,
    OperationAborted,
    OperationFailed,
    ResourceExhausted,
    SpecProblem,
    VmlabError,
)
from vmlab.manager.api.problems import BadRequest, Forbidden, Unauthenticated, response_of
from vmlab.manager.client.address import Address
from vmlab.manager.client.replies import Unreachable, ended, error_of, told
from vmlab.manager.documents import HostDocument, OperationDocument
from vmlab.manager.store.failures import Conflict, EventsGone, PreconditionFailed

HERE = Address("http://localhost")


def back(error: VmlabError) -> VmlabError:
    """An error after its way through the service."""
    response = response_of(error, instance="/v1/machines/web")
    return error_of(response.status_code, bytes(response.body), HERE)


@pytest.mark.parametrize(
    "error",
    [
        MachineNotFound("there is no machine 'web'", hint="did you mean 'web1'?", machine="web"),
        InvalidState("start", expected=("created",), actual="running", machine="web"),
        ResourceExhausted("no memory is left"),
        Conflict("the name is taken", hint="choose another"),
        PreconditionFailed("machine web", expected=1, actual=2),
        EventsGone(3, oldest=7, latest=9),
        BadRequest("no JSON"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_as_it_was(error: VmlabError) -> None:
    again = back(error)
    assert type(again) is type(error)
    assert again.to_record() == error.to_record()


def test_what_is_wrong_with_a_request_comes_back_field_by_field() -> None:
    problems = [SpecProblem("memory", "512X", "a size"), SpecProblem("nics.0.mac", None, "a MAC")]
    again = back(InvalidSpec(problems, what="the request"))
    assert isinstance(again, InvalidSpec)
    assert list(map(str, again.problems)) == list(map(str, problems))
    assert again.exit_code == 2


@pytest.mark.parametrize("error", [Unauthenticated("this takes a token"), Forbidden("no")])
def test_who_may_not_ask_is_told_where_tokens_come_from(error: VmlabError) -> None:
    again = back(error)
    assert again.hint is not None
    assert "VMLAB_TOKEN" in again.hint


@pytest.mark.parametrize("content", [b"<html>no</html>", b"", b"[1]", b'{"a": 1}'])
def test_what_is_no_manager_is_said_to_be_none(content: bytes) -> None:
    error = error_of(502, content, Address("http://proxy:1"))
    assert isinstance(error, Unreachable)
    assert "http://proxy:1" in str(error)
    assert error.exit_code == 4


def test_a_document_that_is_none_is_no_manager_s() -> None:
    with pytest.raises(Unreachable, match="no manager of this version"):
        told(HostDocument, b'{"name": 1}', HERE)


def operation(state: str, **more: object) -> OperationDocument:
    return OperationDocument.model_validate(
        {
            "id": "0" * 32,
            "kind": "machine.start",
            "state": state,
            "target_name": "web",
            "request": {},
            "created": datetime.now(UTC),
            **more,
        }
    )


def test_an_operation_that_failed_raises_what_it_failed_with() -> None:
    error = ResourceExhausted("no memory is left", hint="stop another one")
    with pytest.raises(ResourceExhausted, match="no memory") as raised:
        ended(operation("failed", error=error.to_record()))
    assert raised.value.hint == "stop another one"


def test_an_operation_that_failed_for_no_reason_is_an_error_all_the_same() -> None:
    with pytest.raises(OperationFailed, match=r"machine\.start failed"):
        ended(operation("failed"))


def test_a_cancelled_operation_is_one_that_was_aborted() -> None:
    with pytest.raises(OperationAborted, match=r"machine\.start of web was cancelled"):
        ended(operation("cancelled"))


def test_one_that_succeeded_is_returned() -> None:
    good = operation("succeeded")
    assert ended(good) is good

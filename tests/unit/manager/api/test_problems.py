"""Errors as HTTP tells them."""

from __future__ import annotations

import json

import pytest

from vmlab.guests.command import CommandResult
from vmlab.guests.guest import CommandFailed
from vmlab.images.errors import FormatError, ImageNotFound, StoreError
from vmlab.machine.errors import (
    DeadlineExceeded,
    HypervisorUnavailable,
    InvalidSpec,
    InvalidState,
    MachineCrashed,
    MachineExists,
    MachineNotFound,
    OperationFailed,
    ResourceExhausted,
    SnapshotNotFound,
    SpecProblem,
    UnsupportedOperation,
    VmlabError,
    from_record,
)
from vmlab.manager.api.problems import (
    MEDIA_TYPE,
    BadRequest,
    Forbidden,
    TooFast,
    TooLarge,
    Unauthenticated,
    documented,
    response_of,
    status_of,
)
from vmlab.manager.store.failures import (
    Conflict,
    EventsGone,
    PreconditionFailed,
    StoreUnavailable,
)

SPEC = InvalidSpec([SpecProblem("memory", "1Q", "a size")], what="the request")
ERRORS = [
    (BadRequest("x"), 400),
    (VmlabError("x"), 400),
    (Unauthenticated("x"), 401),
    (Forbidden("x"), 403),
    (MachineNotFound("x"), 404),
    (SnapshotNotFound("x"), 404),
    (ImageNotFound("x"), 404),
    (Conflict("x"), 409),
    (MachineExists("x"), 409),
    (InvalidState("start", expected=("stopped",), actual="running"), 409),
    (ResourceExhausted("x"), 409),
    (CommandFailed(CommandResult("tar", 2, b"", b"no", 0.1), "0"), 409),
    (EventsGone(1, oldest=5, latest=9), 410),
    (PreconditionFailed("machine 'a'", expected=1, actual=2), 412),
    (TooLarge("x"), 413),
    (SPEC, 422),
    (UnsupportedOperation("fork", hypervisor="qemu"), 422),
    (FormatError("x"), 422),
    (TooFast("x", seconds=2.2), 429),
    (OperationFailed("x"), 502),
    (MachineCrashed("x"), 502),
    (HypervisorUnavailable("x"), 503),
    (StoreUnavailable("x"), 503),
    (StoreError("x"), 503),
    (DeadlineExceeded("start", seconds=3), 504),
]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: type(value).__name__)
def test_each_kind_of_error_has_its_status(error: VmlabError, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize("error", [error for error, _ in ERRORS], ids=lambda e: type(e).__name__)
def test_a_problem_is_the_same_error_again_on_the_other_side(error: VmlabError) -> None:
    body = json.loads(bytes(response_of(error, instance="/x", request_id="r").body))
    again = from_record(body)
    assert type(again) is type(error)
    assert (again.message, again.hint) == (error.message, error.hint)
    assert str(again) == str(error)


def test_a_problem_has_what_the_rfc_asks_for_and_each_field() -> None:
    reply = response_of(SPEC, instance="/v1/machines", request_id="r-1")
    assert reply.media_type == MEDIA_TYPE
    body = json.loads(bytes(reply.body))
    assert body["type"] == "urn:vmlab:problem:InvalidSpec"
    assert (body["status"], body["instance"], body["request_id"]) == (422, "/v1/machines", "r-1")
    assert body["problems"] == [{"field": "memory", "value": "1Q", "expected": "a size"}]
    assert from_record(body).problems[0].expected == "a size"


def test_headers_say_when_to_come_back_and_how_to_log_in() -> None:
    assert response_of(TooFast("x", seconds=2.2)).headers["Retry-After"] == "3"
    assert response_of(HypervisorUnavailable("x")).headers["Retry-After"] == "5"
    assert response_of(Unauthenticated("x")).headers["WWW-Authenticate"].startswith("Bearer")
    given = response_of(TooFast("x", seconds=1), headers={"Retry-After": "9"})
    assert given.headers["Retry-After"] == "9"


def test_a_routes_errors_are_described_with_those_that_every_route_has() -> None:
    described = documented(404)
    assert {400, 401, 403, 404, 422, 429, 503} == set(described)
    assert all(MEDIA_TYPE in each["content"] for each in described.values())

"""Requests are sent again where that is safe, and a home's own manager is started for them."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from vmlab.machine.errors import VmlabError
from vmlab.manager import requests
from vmlab.manager.client import AsyncClient, Unreachable
from vmlab.manager.client.address import Address
from vmlab.manager.client.sending import Sender, path_of
from vmlab.manager.documents import OperationDocument

OPERATION = {
    "id": "1" * 32,
    "kind": "machine.start",
    "state": "queued",
    "request": {},
    "created": "2026-11-21T12:00:00Z",
}


class World:
    """A manager that does not always answer."""

    def __init__(self, *faults: Exception | httpx.Response) -> None:
        self.faults = list(faults)
        self.seen: list[httpx.Request] = []
        self.revived = 0

    async def revive(self) -> None:
        self.revived += 1

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault or httpx.Response(200, json=OPERATION)

    def client(self, *, ours: bool = True, token: str | None = None) -> AsyncClient:
        address = Address("http://localhost", token=token)
        return AsyncClient(
            Sender(
                address,
                revive=self.revive if ours else None,
                transport=httpx.MockTransport(self.answer),
            )
        )


def run(world: World, *, ours: bool = True, wait: bool = False) -> None:
    async def asking() -> None:
        async with world.client(ours=ours) as client:
            await client.submit(requests.StartMachine(machine="web"), wait=wait)

    asyncio.run(asking())


@pytest.mark.parametrize(
    "fault",
    [httpx.ConnectError("refused"), httpx.ReadError(""), httpx.RemoteProtocolError("gone")],
    ids=lambda fault: type(fault).__name__,
)
def test_a_manager_of_ours_is_started_and_asked_again_the_same(fault: Exception) -> None:
    world = World(fault, fault)
    run(world)
    assert world.revived == 2
    assert len(world.seen) == 3
    keys = {request.headers["Idempotency-Key"] for request in world.seen}
    assert len(keys) == 1
    assert len({request.content for request in world.seen}) == 1


def test_another_one_that_does_not_answer_is_unreachable() -> None:
    world = World(httpx.ConnectError("refused"))
    with pytest.raises(Unreachable, match="does not answer: refused"):
        run(world, ours=False)
    assert len(world.seen) == 1


def test_another_one_that_ended_a_kept_connection_is_asked_once_more() -> None:
    world = World(httpx.RemoteProtocolError("gone"))
    run(world, ours=False)
    assert len({request.headers["Idempotency-Key"] for request in world.seen}) == 1
    assert len(world.seen) == 2
    world = World(httpx.ReadError(""), httpx.ReadError(""))
    with pytest.raises(Unreachable):
        run(world, ours=False)
    assert len(world.seen) == 2


def test_one_that_never_answers_is_given_up() -> None:
    world = World(*[httpx.ConnectError("refused") for _ in range(50)])
    with pytest.raises(Unreachable) as raised:
        run(world)
    assert raised.value.hint is not None
    assert "serve --stop" in raised.value.hint
    assert len(world.seen) == 5


def test_what_may_have_been_done_and_must_not_be_twice_is_not_asked_again() -> None:
    world = World(httpx.ReadError(""))

    async def asking() -> None:
        async with world.client() as client:
            await client.tokens.create("laptop")

    with pytest.raises(Unreachable):
        asyncio.run(asking())
    assert len(world.seen) == 1


def test_but_what_was_never_sent_is() -> None:
    issued = {
        "id": "1" * 32, "name": "laptop", "user": "admin", "scope": "read",
        "created": "2026-11-21T12:00:00Z", "token": "vml_x",
    }  # fmt: skip
    world = World(httpx.ConnectError(""), httpx.Response(201, json=issued))

    async def asking() -> str:
        async with world.client() as client:
            return (await client.tokens.create("laptop", scope="read")).token

    assert asyncio.run(asking()) == "vml_x"
    assert world.revived == 1


def test_two_requests_have_two_keys() -> None:
    world = World()
    run(world)
    run(world)
    assert len({request.headers["Idempotency-Key"] for request in world.seen}) == 2


def test_a_manager_that_is_asked_too_much_is_asked_again_when_it_says() -> None:
    slow = httpx.Response(429, headers={"Retry-After": "0"}, json={"detail": "too fast"})
    world = World(slow, slow)
    run(world)
    assert len(world.seen) == 3


def test_one_that_is_asked_too_much_for_ever_says_so() -> None:
    slow = {"detail": "too many requests", "kind": "TooFast"}
    responses = [httpx.Response(429, headers={"Retry-After": "0"}, json=slow) for _ in range(50)]
    world = World(*responses)
    with pytest.raises(VmlabError, match="too many requests"):
        run(world)


def test_a_token_is_shown() -> None:
    world = World()

    async def asking() -> None:
        async with world.client(token="vml_secret") as client:
            await client.submit(requests.StartMachine(machine="web"), wait=False)

    asyncio.run(asking())
    assert world.seen[0].headers["Authorization"] == "Bearer vml_secret"


def test_names_cannot_leave_their_place_in_a_path() -> None:
    assert path_of("machines", "../tokens", "a b/ü?x#y") == (
        "/v1/machines/..%2Ftokens/a%20b%2F%C3%BC%3Fx%23y"
    )


def test_an_operation_is_waited_for_until_it_has_ended() -> None:
    world = World(
        httpx.Response(202, json=OPERATION),
        httpx.Response(200, json=OPERATION | {"state": "running"}),
        httpx.Response(200, json=OPERATION | {"state": "succeeded"}),
    )
    run(world, wait=True)
    assert [request.method for request in world.seen] == ["POST", "GET", "GET"]
    assert float(world.seen[1].url.params["wait"]) > 0


def test_who_waits_sees_how_it_goes_and_no_longer_than_said() -> None:
    world = World(*[httpx.Response(200, json=OPERATION | {"state": "running"}) for _ in range(999)])
    states = []

    async def asking() -> None:
        async def watch(operation: OperationDocument) -> None:
            states.append(operation.state)

        async with world.client() as client:
            await client.wait("1" * 32, timeout=0.3, watch=watch)

    with pytest.raises(TimeoutError, match="waiting for operation"):
        asyncio.run(asking())
    assert set(states) == {"running"}

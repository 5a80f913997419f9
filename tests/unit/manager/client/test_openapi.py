"""Whatever the client asks for is in the service's own description, and the other way round."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import VmlabError
from vmlab.manager import requests
from vmlab.manager.api import create_app
from vmlab.manager.client import AsyncClient, nouns
from vmlab.manager.client.address import Address
from vmlab.manager.client.sending import Sender
from vmlab.manager.manager import Manager
from vmlab.manager.settings import Settings

ARGUMENTS: dict[str, Any] = {
    "name": "a",
    "machine": "m",
    "disk": "d",
    "network": "n",
    "template": "t",
    "snapshot": "s",
    "host": "h",
    "finding": "f",
    "operation": "o",
    "token": "k",
    "action": "report",
    "path": "web.tar",
    "export": "web.tar",
    "size": "1G",
    "source": "/etc/hosts",
    "target": "/root/hosts",
}
FIELDS: dict[str, dict[str, Any]] = {
    "Machines.create": {"image": "tiny", "memory": "64M", "nics": [{"network": "lan"}]},
    "Machines.resize": {"memory": "1G"},
    "Networks.create": {"subnet": "10.0.0.0/24"},
}
SOCKETS = {"console", "command", "execute"}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The service's description."""

    async def asked() -> dict[str, Any]:
        home = Home.open(tmp_path_factory.mktemp("home"))
        manager = await Manager.open(Settings.from_environment(home=home))
        try:
            document: dict[str, Any] = create_app(manager, authenticate=True).openapi()
            return document
        finally:
            await manager.close()

    return asyncio.run(asked())


def asked_for(call: Callable[[AsyncClient], Any]) -> list[httpx.Request]:
    """The requests of a call; each is refused."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(400, json={"detail": "refused", "kind": "VmlabError"})

    async def calling() -> None:
        sender = Sender(Address("http://localhost"), transport=httpx.MockTransport(answer))
        async with AsyncClient(sender) as client:
            with pytest.raises(VmlabError, match="refused"):
                await call(client)

    asyncio.run(calling())
    return seen


def calls() -> list[tuple[str, Callable[[AsyncClient], Any]]]:
    """A call of each method of each noun."""
    found: list[tuple[str, Callable[[AsyncClient], Any]]] = []
    for noun, attribute in {
        nouns.Machines: "machines", nouns.Disks: "disks", nouns.Networks: "networks",
        nouns.Templates: "templates", nouns.Snapshots: "snapshots", nouns.Hosts: "hosts",
        nouns.Findings: "findings", nouns.Operations: "operations", nouns.Tokens: "tokens",
        nouns.Exports: "exports",
    }.items():  # fmt: skip
        for name, method in inspect.getmembers(noun, inspect.isfunction):
            if name.startswith("_") or name in SOCKETS or name == "each":
                continue
            if noun is nouns.Snapshots and name == "show":
                continue
            found.append((f"{noun.__name__}.{name}", call_of(attribute, noun, name, method)))
    found.append(("past_events", lambda client: client.past_events(3, limit=2, kind="machine.*")))
    found.append(("health", lambda client: client.health()))
    return found


def call_of(attribute: str, noun: type, name: str, method: Any) -> Callable[[AsyncClient], Any]:
    given = {}
    for parameter in inspect.signature(method).parameters.values():
        required = parameter.default is inspect.Parameter.empty
        named = parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
        if parameter.name != "self" and required and named:
            given[parameter.name] = ARGUMENTS[parameter.name]
    given |= FIELDS.get(f"{noun.__name__}.{name}", {})
    if name in {"copy_in", "upload"}:
        given["source"] = Path("/etc/hosts")
    if name in {"copy_out", "download"}:
        given["target"] = Path("/tmp/no-such-place-of-vmlab")
    return lambda client: getattr(getattr(client, attribute), name)(**given)


@pytest.mark.parametrize(("name", "call"), calls(), ids=[name for name, _ in calls()])
def test_what_a_method_asks_for_is_described(
    name: str, call: Callable[[AsyncClient], Any], described: dict[str, Any]
) -> None:
    for request in asked_for(call):
        route = route_of(described, request)
        known = {each["name"] for each in route.get("parameters", []) if each["in"] == "query"}
        assert set(request.url.params) <= known
        headers = {
            each["name"].lower() for each in route.get("parameters", []) if each["in"] == "header"
        }
        own = {"idempotency-key", "vmlab-dry-run", "if-match"} & set(request.headers)
        assert own <= headers
        if request.headers.get("content-type") == "application/json":
            check_body(described, route, json.loads(request.content))


def route_of(described: dict[str, Any], request: httpx.Request) -> dict[str, Any]:
    """What is said of a request's method and path."""
    path = request.url.raw_path.decode().partition("?")[0]
    for pattern, methods in described["paths"].items():
        matching = re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", pattern), path)
        if matching and request.method.lower() in methods:
            route: dict[str, Any] = methods[request.method.lower()]
            return route
    pytest.fail(f"{request.method} {path} is not described")


def check_body(described: dict[str, Any], route: dict[str, Any], body: object) -> None:
    """A body has to be what its description says."""
    schema = route["requestBody"]["content"]["application/json"]["schema"]
    whole = {**schema, "components": described["components"]}
    Draft202012Validator(whole).validate(body)


def test_filters_of_lists_are_described(described: dict[str, Any]) -> None:
    filters: dict[str, dict[str, Any]] = {
        "machines": {
            "state": "running",
            "label": "a=b",
            "host": "h",
            "name": "w*",
            "template": "t",
        },
        "disks": {"state": "attached", "machine": "m", "name": "d*"},
        "networks": {"name": "l*", "mode": "user"},
        "snapshots": {"machine": "m"},
        "findings": {"code": "c", "severity": "error", "resolved": False, "subject": "m"},
        "operations": {"state": "queued", "kind": "machine.*", "target": "m"},
    }  # fmt: skip
    for noun, given in filters.items():
        (request,) = asked_for(
            lambda client, noun=noun, given=given: getattr(client, noun).page(
                limit=3, cursor="x", **given
            )
        )
        route = route_of(described, request)
        known = {each["name"] for each in route["parameters"]}
        assert set(request.url.params) == {*given, "limit", "cursor"}
        assert set(request.url.params) <= known, noun


def test_every_kind_of_change_can_be_asked_for_by_a_method() -> None:
    """A request that no method makes would be one that only `submit` knows."""
    asked = set()
    for _, call in calls():
        for request in asked_for(call):
            if request.url.path == "/v1/operations" and request.method == "POST":
                asked.add(json.loads(request.content)["kind"])
    kinds = {
        model.model_fields["kind"].default
        for model in vars(requests).values()
        if isinstance(model, type) and "kind" in getattr(model, "model_fields", {})
    }
    assert kinds - asked == {"emergency.stop"}

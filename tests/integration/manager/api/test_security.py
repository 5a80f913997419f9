"""Who may ask what: tokens and their scopes, rates, other sites, and what the log keeps."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from vmlab.manager.api import Limits
from vmlab.manager.api.logs import configure
from vmlab.manager.api.security import NewToken, issue

SPEC = {"memory": "64M"}


def token(live: Any, **fields: Any) -> str:
    """A new token."""
    wanted = NewToken(name=f"t-{uuid.uuid4().hex[:8]}", **fields)
    return live.call(live.manager.database.write(issue, wanted)).token


@pytest.fixture(scope="module")
def guarded(live: Any) -> str:
    """Where the shared manager asks for tokens."""
    return live.serve(authenticate=True, limits=Limits(failures=1000))


@contextmanager
def client(url: str, shown: str | None = None, **headers: str) -> Iterator[httpx.Client]:
    if shown is not None:
        headers["Authorization"] = f"Bearer {shown}"
    with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as made:
        yield made


def test_nobody_without_a_token_learns_anything(guarded: str) -> None:
    with client(guarded) as nobody:
        for method, path in (
            ("GET", "/v1/machines"),
            ("POST", "/v1/operations"),
            ("GET", "/metrics"),
            ("GET", "/vms"),
            ("POST", "/vms"),
            ("GET", "/v1/events"),
            ("GET", "/nothing"),
            ("GET", "/v1/tokens"),
        ):
            answer = nobody.request(method, path)
            assert answer.status_code == 401, path
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert answer.json()["kind"] == "Unauthenticated"
        assert nobody.get("/health").status_code in {200, 503}
        assert nobody.get("/openapi.json").status_code == 200
    with pytest.raises(InvalidStatus) as refused:
        connect(
            f"ws{guarded.removeprefix('http')}/v1/machines/x/exec", proxy=None, open_timeout=120
        )
    assert refused.value.response.status_code == 401


def test_wrong_tokens_are_refused(guarded: str) -> None:
    for header in ("Bearer nonsense", "Basic eDp5", "Bearer"):
        with client(guarded, Authorization=header) as somebody:
            assert somebody.get("/v1/machines").status_code == 401


def test_a_token_allows_what_its_scope_does(live: Any, guarded: str) -> None:
    change = {"json": {"name": f"m-{uuid.uuid4().hex[:8]}", "template": "none"}}
    whole = {"json": {"name": f"m-{uuid.uuid4().hex[:8]}", "spec": SPEC}}
    upload = {"content": b"no image, and no archive"}
    for scope, expected in (
        ("read", (200, 403, 403, 403, 403, 403, 403)),
        ("operate", (200, 404, 403, 403, 403, 404, 403)),
        ("admin", (200, 404, 202, 422, 422, 404, 200)),
    ):
        with client(guarded, token(live, scope=scope)) as somebody:
            told = (
                somebody.get("/v1/machines").status_code,
                somebody.post("/v1/machines", **change).status_code,
                somebody.post("/v1/machines", **whole).status_code,
                somebody.put("/v1/images/mine", **upload).status_code,
                somebody.put("/v1/exports/mine", **upload).status_code,
                somebody.get("/v1/exports/mine").status_code,
                somebody.get("/v1/tokens").status_code,
            )
        assert told == expected, scope


def test_a_token_is_told_once_and_good_until_it_is_revoked(live: Any, guarded: str) -> None:
    with client(guarded, token(live, scope="admin")) as admin:
        name = f"t-{uuid.uuid4().hex[:8]}"
        made = admin.post("/v1/tokens", json={"name": name, "user": "bob", "scope": "read"})
        assert made.status_code == 201
        assert admin.post("/v1/tokens", json={"name": name, "user": "bob"}).status_code == 409
        secret = made.json()["token"]
        listed = admin.get("/v1/tokens")
        assert secret not in listed.text
        assert made.json()["id"] in listed.text
        with client(guarded, secret) as bob:
            assert bob.get("/v1/machines").status_code == 200
            assert admin.delete(f"/v1/tokens/{made.json()['id']}").status_code == 204
            assert bob.get("/v1/machines").status_code == 401
        assert admin.delete(f"/v1/tokens/{made.json()['id']}").status_code == 404
        again = admin.post("/v1/tokens", json={"name": name, "user": "bob", "scope": "read"})
        assert again.status_code == 201


def test_the_store_has_no_token_but_its_hash(live: Any, guarded: str) -> None:
    secret = token(live)
    files = list(Path(live.manager.settings.directory).glob("manager.sqlite3*"))
    assert files
    assert not any(secret.encode() in file.read_bytes() for file in files)


def test_who_asks_too_fast_is_told_to_wait(living_with: Any) -> None:
    # So slow a rate that no host is slower: how it grows again is a unit test's business.
    with living_with(rate_limit=0.001) as live:
        url = live.serve(authenticate=False)
        with client(url) as fast:
            first, late = [fast.get("/v1/machines/x") for _ in range(2)]
        assert (first.status_code, late.status_code) == (404, 429)
        assert int(late.headers["Retry-After"]) >= 1
        assert late.json()["kind"] == "TooFast"


def test_wrong_tokens_of_one_address_are_counted(live: Any) -> None:
    url = live.serve(authenticate=True, limits=Limits(failures=0.001))
    with client(url, "wrong") as somebody:
        found = [somebody.get("/v1/machines").status_code for _ in range(3)]
    assert found == [401, 429, 429]


def test_pages_of_other_sites_change_nothing(url: str, live: Any) -> None:
    with client(url, Origin="https://evil.example") as page:
        assert page.get("/v1/machines").status_code == 200
        assert page.post("/v1/emergency-stop", json={}).status_code == 403
    with client(url, Host="evil.example") as rebound:
        assert rebound.get("/v1/machines").status_code == 403
    with pytest.raises(InvalidStatus) as refused:
        connect(
            f"ws{url.removeprefix('http')}/v1/machines/x/console",
            origin="https://evil.example",
            proxy=None,
            open_timeout=120,
        )
    assert refused.value.response.status_code == 403


def test_a_browsers_cookie_is_good_for_the_managers_own_pages_alone(
    live: Any, guarded: str
) -> None:
    cookie = {"Cookie": f"vmlab-token={token(live)}"}
    with client(guarded, **cookie) as browser:
        assert browser.get("/v1/machines").status_code == 200
        own = {"Origin": guarded}
        assert browser.post("/v1/operations", headers=own).status_code == 422
        other = {"Origin": "https://evil.example"}
        assert browser.post("/v1/operations", headers=other).status_code == 403


def test_so_many_streams_and_no_more(live: Any) -> None:
    url = live.serve(authenticate=False, limits=Limits(streams=1))
    headers = {"Accept": "text/event-stream"}
    with client(url) as one, one.stream("GET", "/v1/events", headers=headers) as first:
        assert first.status_code == 200
        lines = first.iter_lines()
        assert next(lines).startswith(":")
        with client(url) as two:
            assert two.get("/v1/events", headers=headers).status_code == 429


def test_the_log_has_ids_and_no_secrets(living_with: Any, tmp_path: Path) -> None:
    file = tmp_path / "log"
    before = structlog.get_config()
    handlers = logging.getLogger().handlers[:]
    try:
        configure(file)
        with living_with() as live:
            url = live.serve(authenticate=True)
            secret = token(live, scope="admin")
            with client(url, secret) as admin:
                machine = {
                    "name": "kept",
                    "spec": SPEC,
                    "metadata": {"user_data": "hunter2", "ssh_keys": ["ssh-rsa hunter2"]},
                }
                answer = admin.post(
                    "/v1/machines",
                    params={"wait": 100},
                    json=machine,
                    headers={"X-Request-Id": "asked-1"},
                )
                admin.get("/v1/machines", params={"name": "hunter2"})
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        (request,) = [line for line in lines if line.get("request_id") == "asked-1"]
        assert request["operation"] == answer.json()["id"]
        assert (request["method"], request["status"]) == ("POST", 200)
        assert request["actor"] == "admin"
        text = file.read_text()
        assert secret not in text
        assert "hunter2" not in text
        assert file.stat().st_mode & 0o077 == 0
    finally:
        structlog.configure(**before)
        for handler in logging.getLogger().handlers[:]:
            if handler not in handlers:
                logging.getLogger().removeHandler(handler)
                handler.close()

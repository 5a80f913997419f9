"""Who asks, and what a browser may be made to ask."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from vmlab.manager.api.problems import Forbidden, Unauthenticated
from vmlab.manager.api.security import (
    Principal,
    presented,
    refuse_other_sites,
    required_scope,
)


def headers(**given: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in given.items()})


def test_a_token_is_shown_by_a_header_or_by_a_browsers_cookie() -> None:
    assert presented(headers(authorization="Bearer abc")) == ("abc", False)
    assert presented(headers(authorization="bearer  abc ")) == ("abc", False)
    assert presented(headers(cookie="a=b; vmlab-token=abc")) == ("abc", True)
    assert presented(headers(cookie="a=b")) == (None, False)
    assert presented(headers(cookie="\x00=;;=")) == (None, False)
    assert presented(headers()) == (None, False)
    for wrong in ("Basic abc", "Bearer", "abc"):
        with pytest.raises(Unauthenticated):
            presented(headers(authorization=wrong, cookie="vmlab-token=abc"))


@pytest.mark.parametrize(
    ("kind", "method", "path", "scope"),
    [
        ("http", "GET", "/v1/machines", "read"),
        ("http", "HEAD", "/metrics", "read"),
        ("http", "POST", "/v1/machines", "operate"),
        ("http", "DELETE", "/vms/x", "operate"),
        ("websocket", "", "/v1/machines/x/console", "operate"),
        ("http", "GET", "/v1/tokens", "admin"),
        ("http", "DELETE", "/v1/tokens/x", "admin"),
        ("http", "GET", "/v1/tokensx", "read"),
    ],
)
def test_what_a_request_takes(kind: str, method: str, path: str, scope: str) -> None:
    assert required_scope(kind, method, path) == scope


def test_a_scope_allows_what_is_below_it() -> None:
    Principal("a", "admin").need("read", "this")
    Principal("a", "operate").need("operate", "this")
    with pytest.raises(Forbidden, match="this takes a token of the scope 'admin'"):
        Principal("a", "operate").need("admin", "this")


@pytest.mark.parametrize(
    ("host", "origin", "local", "passes"),
    [
        ("localhost:80", None, True, True),
        ("vmlab.localhost", None, True, True),
        ("127.0.0.1:8080", None, True, True),
        ("[::1]:8080", None, True, True),
        ("192.168.1.4", None, True, True),
        ("evil.example", None, True, False),
        ("", None, True, False),
        ("[::1", None, True, False),
        ("evil.example", None, False, True),
        ("localhost:80", "http://localhost:80", True, True),
        ("localhost:80", "http://LOCALHOST:80", True, True),
        ("localhost:80", "http://localhost:81", True, False),
        ("localhost:80", "null", True, False),
        ("localhost:80", "http://[", True, False),
    ],
)
def test_other_sites_have_a_browser_change_nothing(
    host: str, origin: str | None, local: bool, passes: bool
) -> None:
    given = {"host": host, **({"origin": origin} if origin is not None else {})}
    for kind, method in (("http", "POST"), ("websocket", "")):
        if passes:
            refuse_other_sites(kind, method, Headers(given), local=local)
        else:
            with pytest.raises(Forbidden):
                refuse_other_sites(kind, method, Headers(given), local=local)
    if origin is not None:
        refuse_other_sites("http", "GET", Headers(given), local=local)

"""Where a manager is: by URL, by environment, or the home's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import SOCKET_PATH_LIMIT, Home
from vmlab.machine.errors import InvalidSpec
from vmlab.manager.client import address


def test_nothing_said_is_the_home_s_own_manager(home: Home) -> None:
    found = address.find(home=home)
    assert found.home == home.directory
    assert found.socket is not None
    assert found.loopback
    assert str(found) == f"unix:{found.socket}"


def test_its_socket_is_in_a_shorter_place_where_the_home_s_path_is_too_long(tmp_path: Path) -> None:
    deep = tmp_path
    while len(os.fsencode(deep)) < SOCKET_PATH_LIMIT:
        deep /= "a-long-name-of-a-directory"
    home = Home.open(deep)
    path = address.socket_of(home)
    assert len(os.fsencode(path)) <= SOCKET_PATH_LIMIT
    assert address.socket_of(home) == path


def test_a_short_home_has_it_among_the_manager_s_files(tmp_path: Path) -> None:
    home = Home(Path("/h"))
    home.directory = tmp_path
    assert address.directory_of(home) == tmp_path / "manager"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://lab.example:443/", "https://lab.example:443"),
        ("http://[::1]:9/under/", "http://[::1]:9/under"),
    ],
)
def test_a_url(url: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(address.TOKEN_VARIABLE, "vml_secret")
    found = address.find(url)
    assert (found.url, found.socket, found.home) == (base, None, None)
    assert found.token == "vml_secret"
    assert found.loopback == ("127.0.0.1" in url or "::1" in url)


def test_a_unix_socket_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(address.URL_VARIABLE, "unix:/run/vmlab.sock")
    found = address.find()
    assert (found.socket, found.home) == (Path("/run/vmlab.sock"), None)


def test_what_is_said_is_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(address.URL_VARIABLE, "unix:/run/vmlab.sock")
    monkeypatch.setenv(address.TOKEN_VARIABLE, "of the environment")
    found = address.find("http://lab:1", token="given")
    assert (found.url, found.token) == ("http://lab:1", "given")


@pytest.mark.parametrize(
    "url",
    [
        "lab.example:8080", "unix:relative", "http://", "ftp://lab", "http://lab:0",
        "http://lab:port", "http://user:word@lab", "http://lab/?token=1", "http://lab:99999999",
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused_by_the_variable_s_name(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(address.URL_VARIABLE, url)
    with pytest.raises(InvalidSpec) as refused:
        address.find()
    assert refused.value.problems[0].field == address.URL_VARIABLE
    assert refused.value.problems[0].value == url


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("lab", False)],
)
def test_which_hosts_are_this_one(host: str, here: bool) -> None:
    assert address.is_here(host) is here

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from vmlab.manager.networks.metadata import Instance, InstanceNic, application

INSTANCE = Instance(
    id="i-0123456789abcdef0",
    hostname="one",
    image="debian-12",
    kind="2x512m",
    host="qemu",
    ssh_keys=("ssh-ed25519 AAAA me", "ssh-rsa BBBB you"),
    user_data="#cloud-config\n{}\n",
    nics=(
        InstanceNic("52:54:00:00:00:01", ("10.9.0.2", "fd00:9::2"), ("10.9.0.0/24", "fd00:9::/64")),
        InstanceNic("52:54:00:00:00:02", (), ()),
    ),
)
TOKEN = "X-aws-ec2-metadata-token"


async def who(network: str, address: str) -> Instance | None:
    return INSTANCE if (network, address) == ("lan", "10.9.0.2") else None


def ask(
    path: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    address: str = "10.9.0.2",
    app: Any = None,
) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app or application("lan", who), client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://there") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/latest", "meta-data/\nuser-data"),
        ("/latest/meta-data/instance-id", "i-0123456789abcdef0"),
        ("/2009-04-04/meta-data/local-hostname", "one"),
        ("/latest/meta-data/local-ipv4", "10.9.0.2"),
        ("/latest/meta-data/mac", "52:54:00:00:00:01"),
        ("/latest/meta-data/placement/availability-zone", "qemu"),
        ("/latest/meta-data/public-keys/", "0=key0\n1=key1"),
        ("/latest/meta-data/public-keys/1/openssh-key", "ssh-rsa BBBB you"),
        ("/latest/meta-data/network/interfaces/macs/", "52:54:00:00:00:01/\n52:54:00:00:00:02/"),
        (
            "/latest/meta-data/network/interfaces/macs/52:54:00:00:00:01/ipv6s",
            "fd00:9::2",
        ),
        (
            "/2021-03-23/meta-data/network/interfaces/macs/52:54:00:00:00:01/subnet-ipv4-cidr-block",
            "10.9.0.0/24",
        ),
        ("/latest/user-data", "#cloud-config\n{}\n"),
    ],
)
def test_a_guest_reads_about_itself(path: str, text: str) -> None:
    answer = ask(path)
    assert (answer.status_code, answer.text) == (200, text)


def test_a_guest_finds_the_versions_and_what_there_is() -> None:
    assert "latest" in ask("/").text.splitlines()
    listed = ask("/latest/meta-data/").text.splitlines()
    assert {"instance-id", "local-ipv4", "network/", "placement/", "public-keys/"} <= set(listed)


@pytest.mark.parametrize(
    "path",
    [
        "/older/meta-data/",
        "/latest/meta-data/kernel-id",
        "/latest/meta-data/mac/more",
        "/latest/dynamic",
        "/latest/meta-data/public-keys/2/openssh-key",
    ],
)
def test_what_there_is_not_is_not_found(path: str) -> None:
    assert ask(path).status_code == 404


def test_who_has_no_address_of_the_network_is_told_nothing() -> None:
    assert ask("/latest/meta-data/instance-id", address="10.9.0.3").status_code == 404


def test_a_session_s_token_is_its_guest_s_alone() -> None:
    app = application("lan", who)
    made = ask("/latest/api/token", "PUT", {f"{TOKEN}-ttl-seconds": "3600"}, app=app)
    assert made.status_code == 200
    assert made.headers[f"{TOKEN}-ttl-seconds"] == "3600"

    def with_token(token: str, **options: Any) -> int:
        path = "/latest/meta-data/instance-id"
        return ask(path, headers={TOKEN: token}, app=app, **options).status_code

    assert with_token(made.text) == 200
    assert with_token(made.text, address="10.9.0.3") == 401
    assert with_token(made.text[:-1]) == 401
    assert with_token(re.sub(r"^\d+", "9" * 12, made.text)) == 401
    # Of a service that was started anew.
    path = "/latest/meta-data/instance-id"
    assert ask(path, headers={TOKEN: made.text}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),
        ({f"{TOKEN}-ttl-seconds": "0"}, 400),
        ({f"{TOKEN}-ttl-seconds": "21601"}, 400),
        ({f"{TOKEN}-ttl-seconds": "soon"}, 400),
        ({f"{TOKEN}-ttl-seconds": "60", "X-Forwarded-For": "10.9.0.7"}, 403),
    ],
)
def test_a_token_is_asked_for_as_it_should_be(headers: dict[str, str], status: int) -> None:
    assert ask("/latest/api/token", "PUT", headers).status_code == status


def test_only_questions_are_answered() -> None:
    assert ask("/latest/meta-data/mac", "POST").status_code == 405

"""The metadata service of bridged networks, as instances of EC2 have it at 169.254.169.254.

A guest is known by the address that it asks from, on the interface of the network that it is on:
each network has a socket of its own. Follows the Amazon EC2 User Guide, "Instance metadata", with
both versions: a session token is not asked for, but a wrong one is refused. Answers while a manager
runs; the seed disk (`seed`) tells the same at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks.nat import METADATA_ADDRESS

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response

    from vmlab.manager.networks.layout import Layout

__all__ = ["Instance", "InstanceNic", "MetadataService", "application", "tree"]

_VERSIONS: Final = ("2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest")
_TOKEN: Final = "x-aws-ec2-metadata-token"
_TOKEN_SECONDS: Final = 21_600
_PORT: Final = 80

Tree: TypeAlias = "Mapping[str, Tree | str]"


@dataclass(frozen=True, slots=True)
class InstanceNic:
    """A NIC as its guest is told of it: addresses without prefix length, subnets with."""

    mac: str
    addresses: tuple[str, ...]
    subnets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """A machine as its guest is told of it. `nics` begins with the one that it asks by; `id` is
    that of `seed.instance_id`."""

    id: str
    hostname: str
    image: str
    kind: str
    host: str
    ssh_keys: tuple[str, ...]
    user_data: str | None
    nics: tuple[InstanceNic, ...]


Lookup: TypeAlias = Callable[[str, str], Awaitable[Instance | None]]
"""Who has an address: of the network of that id, that address."""


def tree(instance: Instance) -> Tree:
    """All that a guest can ask for below a version: directories and texts."""
    first = instance.nics[0]
    told: dict[str, Tree | str] = {
        "ami-id": instance.image,
        "hostname": instance.hostname,
        "instance-id": instance.id,
        "instance-type": instance.kind,
        "local-hostname": instance.hostname,
        "local-ipv4": _addresses(first, 4),
        "mac": first.mac,
        "placement": {"availability-zone": instance.host},
        "reservation-id": f"r-{instance.id.partition('-')[2]}",
        "security-groups": "default",
        "network": {"interfaces": {"macs": _macs(instance)}},
    }
    if instance.ssh_keys:
        told["public-keys"] = {
            f"{number}=key{number}": {"openssh-key": text}
            for number, text in enumerate(instance.ssh_keys)
        }
    root: dict[str, Tree | str] = {"meta-data": told}
    if instance.user_data is not None:
        root["user-data"] = instance.user_data
    return root


def _macs(instance: Instance) -> Tree:
    made: dict[str, Tree | str] = {}
    for number, nic in enumerate(instance.nics):
        entry = {
            "device-number": str(number),
            "interface-id": f"eni-{nic.mac.replace(':', '')}",
            "local-hostname": instance.hostname,
            "local-ipv4s": _addresses(nic, 4),
            "ipv6s": _addresses(nic, 6),
            "mac": nic.mac,
            "subnet-ipv4-cidr-block": _subnets(nic, 4),
            "subnet-ipv6-cidr-blocks": _subnets(nic, 6),
        }
        made[nic.mac] = {name: text for name, text in entry.items() if text}
    return made


def _addresses(nic: InstanceNic, version: int) -> str:
    return "\n".join(each for each in nic.addresses if (":" in each) is (version == 6))


def _subnets(nic: InstanceNic, version: int) -> str:
    return "\n".join(each for each in nic.subnets if ip_network(each).version == version)


def _found(root: Tree, path: list[str]) -> Tree | str | None:
    here: Tree | str = root
    for name in path:
        if isinstance(here, str):
            return None
        # Keys are listed as "0=name" and asked for as "0".
        match = next((key for key in here if key == name or key.partition("=")[0] == name), None)
        if match is None:
            return None
        here = here[match]
    return here


def _listing(directory: Tree) -> str:
    return "\n".join(
        name if isinstance(below, str) or "=" in name else f"{name}/"
        for name, below in sorted(directory.items())
    )


class _Tokens:
    """Session tokens (version 2 of the service): signed, for one guest, for a while; none kept."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def made(self, guest: str, seconds: int) -> str:
        until = str(int(time.time()) + seconds)
        return f"{until}.{self._signature(guest, until)}"

    def holds(self, guest: str, token: str) -> bool:
        until, _, signature = token.partition(".")
        right = hmac.compare_digest(signature.encode(), self._signature(guest, until).encode())
        return right and until.isdecimal() and int(until) > time.time()

    def _signature(self, guest: str, until: str) -> str:
        return hmac.new(self._key, f"{guest}\0{until}".encode(), hashlib.sha256).hexdigest()


def application(network: str, lookup: Lookup) -> Any:
    """The service of one network, as an ASGI application.

    Args:
        network: Id of the network.
        lookup: Says who asks.
    """
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    tokens = _Tokens()

    def said(text: str, status: int = 200) -> Response:
        return PlainTextResponse(text, status, headers={"Server": "EC2ws"})

    def guest(request: Request) -> str:
        return request.client.host if request.client is not None else ""

    async def token(request: Request) -> Response:
        # A proxy in the guest is not to hand tokens out to others.
        if "x-forwarded-for" in request.headers:
            return said("forbidden", 403)
        text = request.headers.get(f"{_TOKEN}-ttl-seconds", "")
        if not text.isdecimal() or not 1 <= int(text[:6]) <= _TOKEN_SECONDS:
            return said(f"{_TOKEN}-ttl-seconds is a number from 1 to {_TOKEN_SECONDS}", 400)
        made = said(tokens.made(guest(request), int(text)))
        made.headers[f"{_TOKEN}-ttl-seconds"] = text
        return made

    async def answer(request: Request) -> Response:
        given = request.headers.get(_TOKEN)
        if given is not None and not tokens.holds(guest(request), given):
            return said("the token is none, or is not valid any more", 401)
        path = [part for part in request.url.path.split("/") if part]
        if not path:
            return said("\n".join(_VERSIONS))
        if path[0] not in _VERSIONS:
            return said("not found", 404)
        instance = await lookup(network, guest(request))
        found = _found(tree(instance), path[1:]) if instance is not None else None
        if found is None:
            return said("not found", 404)
        return said(found if isinstance(found, str) else _listing(found))

    return Starlette(
        routes=[
            Route("/latest/api/token", token, methods=["PUT"]),
            Route("/{path:path}", answer, methods=["GET"]),
        ]
    )


class MetadataService:
    """The service on all networks of a manager that the host is on.

    Args:
        lookup: Says who asks.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._servers: dict[str, tuple[int, uvicorn.Server, asyncio.Task[None]]] = {}

    async def open(self, layout: Layout, index: int) -> None:
        """Serve a network whose bridge has that number; one that is served stays so.

        Raises:
            OperationFailed: the address or the port cannot be had.
        """
        served = self._servers.get(layout.network)
        if served is not None and served[0] == index and not served[2].done():
            return
        await self.close(layout.network)
        import uvicorn

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                """Signals are the manager's."""
                yield

        listening = _socket(layout.bridge)
        config = uvicorn.Config(
            application(layout.network, self._lookup),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
        )
        server = Server(config)
        task = asyncio.create_task(
            server.serve(sockets=[listening]), name=f"metadata {layout.bridge}"
        )
        self._servers[layout.network] = (index, server, task)

    async def close(self, network: str) -> None:
        """Serve a network no more; again does nothing."""
        served = self._servers.pop(network, None)
        if served is None:
            return
        _, server, task = served
        server.should_exit = server.force_exit = True
        await asyncio.gather(task, return_exceptions=True)

    async def close_all(self) -> None:
        """Serve nobody any more."""
        for network in list(self._servers):
            await self.close(network)


def _socket(interface: str) -> socket.socket:
    """A socket on the address of the service, for one interface alone (SO_BINDTODEVICE)."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        made.bind((METADATA_ADDRESS, _PORT))
        made.listen()
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise OperationFailed(
            f"the metadata service cannot have {METADATA_ADDRESS}:{_PORT} on {interface}: "
            f"{error.strerror}",
            hint="somebody else serves that address there",
        ) from error
    return made

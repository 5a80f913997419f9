"""Where a manager is: at a URL, or on a unix socket, which is that of the home if nothing is said.

`VMLAB_URL` is "http://HOST:PORT", "https://HOST:PORT" or "unix:/PATH"; `VMLAB_TOKEN` is the token
that a manager at a URL asks for. On a unix socket the file's permissions are the authentication.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from vmlab.hypervisors.ownership import SOCKET_PATH_LIMIT, Home, Store
from vmlab.machine.errors import InvalidSpec, SpecProblem

__all__ = ["STORE", "TOKEN_VARIABLE", "URL_VARIABLE", "Address", "directory_of", "find", "is_here"]

URL_VARIABLE: Final = "VMLAB_URL"
TOKEN_VARIABLE: Final = "VMLAB_TOKEN"
STORE: Final = "manager.sqlite3"
"""Name of the manager's database; where it is not, no manager has ever run in a home."""

_FORMS: Final = '"http://HOST:PORT", "https://HOST:PORT" or "unix:/PATH"'


@dataclass(frozen=True, slots=True)
class Address:
    """Where to speak to a manager.

    Attributes:
        url: What paths of the service are appended to; nobody resolves its host for a socket.
        socket: The unix socket, if it is one.
        home: The home whose own manager it is, which may be started; None for any other.
        token: What it is shown, if anything.
    """

    url: str
    socket: Path | None = None
    home: Path | None = None
    token: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether no packet leaves this host on the way there."""
        return self.socket is not None or is_here(urlsplit(self.url).hostname or "")

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket is not None else self.url


def is_here(host: str) -> bool:
    """Whether a host is this one, by its name or its address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find(url: str | None = None, *, token: str | None = None, home: Home | None = None) -> Address:
    """The manager that is meant.

    Args:
        url: Where it is; VMLAB_URL if left out, and the home's own manager without that.
        token: What it is shown; VMLAB_TOKEN if left out.
        home: The home, where nothing says where it is; None is `Home.open()`.

    Raises:
        InvalidSpec: `url` is none.
        VmlabError: the home cannot be used.
    """
    source = None
    if url is None:
        url = os.environ.get(URL_VARIABLE) or None
        source = URL_VARIABLE
    if url is None:
        home = home or Home.open()
        return Address("http://localhost", socket_of(home), home.directory)
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path.startswith("/"):
        return Address("http://localhost", Path(parts.path), token=token)
    try:
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username is not None:
        raise InvalidSpec(
            [SpecProblem(source or "url", url, _FORMS)],
            what="the manager's address",
            hint="a token is not a part of it: VMLAB_TOKEN has that",
        )
    return Address(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", token=token)


def directory_of(home: Home) -> Path:
    """The directory of a home that the manager's state is in, made if it is not there."""
    directory = home.directory / "manager"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def socket_of(home: Home) -> Path:
    """The unix socket of a home's manager, in a shorter place where the home's path is too long.

    Raises:
        VmlabError: there is no place for it.
    """

    path = directory_of(home) / "manager.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    return Store.open(home, "manager").owner.socket("manager.sock")

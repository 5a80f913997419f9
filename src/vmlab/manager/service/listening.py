"""The sockets that a manager answers on: the home's own, and where else it was told to.

A unix socket is for its user alone (0600): on it, the file's permissions are the authentication.
Over TCP a token is asked for, and beyond this host TLS.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmlab.hypervisors.ownership import SOCKET_PATH_LIMIT
from vmlab.machine.errors import InvalidSpec, OperationFailed, SpecProblem
from vmlab.manager.client.address import is_here
from vmlab.manager.client.background import answers

__all__ = ["Listening", "UnixListener", "tcp_listener"]

_BACKLOG: Final = 2048
"""Connections that wait to be taken."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a manager answers beside its home's own socket.

    Args:
        host: Name or address of this host to answer TCP on.
        port: TCP port; 0 is one that is free, None is no TCP.
        socket: Path of another unix socket.
        certificate: Chain of certificates (PEM) for TLS; None is none.
        key: Private key (PEM) of it.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    socket: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def check(self) -> None:
        """Refuse what cannot work or would tell others what is nobody's business.

        Raises:
            InvalidSpec: naming the option.
        """
        problems = []
        if self.port is None and self.host != "127.0.0.1":
            problems.append(SpecProblem("--host", self.host, "needs --port as well"))
        if (self.certificate is None) != (self.key is None):
            there, other = ("--tls-cert", "--tls-key")[:: 1 if self.certificate else -1]
            problems.append(
                SpecProblem(there, str(self.certificate or self.key), f"needs {other} as well")
            )
        if self.certificate is not None and self.port is None:
            problems.append(SpecProblem("--tls-cert", str(self.certificate), "needs --port"))
        for option, file in (("--tls-cert", self.certificate), ("--tls-key", self.key)):
            if file is not None and not file.is_file():
                problems.append(SpecProblem(option, str(file), "a file that exists"))
        if self.port is not None and not is_here(self.host) and self.certificate is None:
            problems.append(
                SpecProblem(
                    "--host",
                    self.host,
                    "an address of this host alone, such as 127.0.0.1; or --tls-cert and --tls-key",
                )
            )
        if problems:
            raise InvalidSpec(
                problems, what="command line", hint="`vmlab serve --help` shows what it takes"
            )


class UnixListener:
    """A unix socket that only its user can open; its file goes with `close`."""

    def __init__(self, path: Path) -> None:
        """Bind it, in the place of one that nobody answers at.

        Raises:
            OperationFailed: there is something else, or it cannot be made.
        """
        self.path = path
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise OperationFailed(
                f"{path} is too long a path for a socket: {SOCKET_PATH_LIMIT} bytes are possible",
                hint="choose a shorter one",
            )
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise OperationFailed(f"{path} is there, and is no socket", hint="choose another")
            if answers(path):
                raise OperationFailed(
                    f"somebody answers at {path} already", hint="choose another path"
                )
            path.unlink()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _for_its_user_alone():
                self.socket.bind(str(path))
            self.socket.listen(_BACKLOG)
            self._file = path.lstat()
        except OSError as error:
            self.socket.close()
            raise OperationFailed(
                f"cannot make the socket {path}: {error.strerror or error}",
                hint="is its directory there, and may you write to it?",
            ) from error

    def unlink(self) -> None:
        """Remove its file, unless another has taken its place; who comes now finds nobody."""
        with suppress(FileNotFoundError):
            if os.path.samestat(self.path.lstat(), self._file):
                self.path.unlink()

    def close(self) -> None:
        """Remove its file and close it; closing it again does nothing."""
        self.unlink()
        self.socket.close()


@contextmanager
def _for_its_user_alone() -> Iterator[None]:
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def tcp_listener(host: str, port: int) -> socket.socket:
    """A TCP socket that listens.

    Raises:
        OperationFailed: the port is taken, or the host is not this one.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(where)
            made.listen(_BACKLOG)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise OperationFailed(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="--port 0 takes one that is free" if taken else "is that an address of this host?",
        ) from error
    return made

"""Ports of this host that lead to TCP ports of a guest, on whatever hypervisor it is.

A forward that the machine was created with is used as it is. For any other port this process
listens, and each connection is a command in the guest that connects there (nc, python3 or bash), so
the guest needs no network at all; a channel that runs one command at a time carries one connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from vmlab.guests.command import Command, CommandChannel, quote
from vmlab.machine.errors import OperationFailed, VmlabError

_LOG: Final = logging.getLogger(__name__)
_READ: Final = 65536

# What ends one direction ends only that one, but for bash, which cannot shut down a half: there it
# ends the connection.
_PYTHON: Final = """
import os, socket, sys, threading
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def up():
    while data := os.read(0, 65536): s.sendall(data)
    s.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := s.recv(65536):
    while data: data = data[os.write(1, data):]
"""
_RELAY: Final = (
    "if command -v busybox >/dev/null && busybox nc --help >/dev/null 2>&1; then "
    "exec busybox nc {host} {port}; "
    "elif command -v python3 >/dev/null; then exec python3 -c {python} {host} {port}; "
    "else exec bash -c {bash}; fi"
)
_BASH: Final = (
    "exec 3<>/dev/tcp/{host}/{port} || exit; cat <&3 & r=$!; cat <&0 >&3 & w=$!; "
    "wait -n; kill $r $w; exit 0"
)


class PortForward:
    """A port of this host that leads to one of a guest; an asynchronous context manager.

    Args:
        port: The port of the host.
        server: What listens there, unless the hypervisor does.
    """

    host: Final = "127.0.0.1"

    def __init__(self, port: int, server: asyncio.Server | None = None) -> None:
        self.port = port
        self._server = server
        self._carrying: set[asyncio.Task[None]] = set()

    def carry(self, task: asyncio.Task[None]) -> None:
        """A connection that ends with the forward."""
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def close(self) -> None:
        """Stop listening, and end what is connected."""
        if self._server is not None:
            self._server.close()
        for task in (carrying := list(self._carrying)):
            task.cancel()
        if carrying:
            await asyncio.wait(carrying)

    async def __aenter__(self) -> PortForward:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def relay(
    channel: CommandChannel, port: int, *, address: str = "127.0.0.1", host_port: int = 0
) -> PortForward:
    """Listen on a port of this host and lead its connections to a port that the guest reaches.

    Args:
        channel: What runs the guest's end.
        port: The TCP port to connect to in the guest.
        address: The address to connect to in the guest.
        host_port: The port of this host; 0 is a free one.

    Raises:
        OperationFailed: the port of this host is not free.
    """
    command = _RELAY.format(
        host=quote(address),
        port=port,
        python=quote(_PYTHON),
        bash=quote(_BASH.format(host=address, port=port)),
    )

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        forward.carry(task)
        try:
            await _carry(channel, command, reader, writer)
        except asyncio.CancelledError:
            # The forward was closed; the server's own callback takes a cancelled task for an error.
            return
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    try:
        server = await asyncio.start_server(carry, PortForward.host, host_port)
    except OSError as error:
        raise OperationFailed(
            f"port {host_port} of this host cannot be listened on: {error.strerror or error}",
            hint="0 finds a free one",
            operation="forward_port",
        ) from error
    forward = PortForward(server.sockets[0].getsockname()[1], server)
    return forward


async def _carry(
    channel: CommandChannel,
    command: str,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    async def given() -> AsyncIterator[bytes]:
        while data := await reader.read(_READ):
            yield data

    async def take(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    said = bytearray()

    async def complain(data: bytes) -> None:
        said.extend(data)

    try:
        status = await channel.run(Command(command, given()), stdout=take, stderr=complain)
    except (OSError, VmlabError) as error:
        _LOG.info("a forwarded connection ended: %s", error)
        return
    if status:
        text = said.decode("utf-8", "replace").strip()
        _LOG.warning("a forwarded connection was not taken in the guest: %s", text or status)

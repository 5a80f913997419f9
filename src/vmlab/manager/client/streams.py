"""Consoles and commands in guests, over WebSockets.

A console is bytes both ways. A command begins with a text message that says what to run; then
binary messages carry a byte for the stream (0 stdin, 1 stdout, 2 stderr) and what goes there, and
text messages {"resize": [rows, columns]}, {"signal": number} or {"eof": true}. The last one is
{"exit": status, "signal": number}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from vmlab.guests.command import Sink
from vmlab.hypervisors.base import Console
from vmlab.machine.errors import ChannelClosed, OperationFailed, VmlabError, from_record
from vmlab.manager.client.replies import Unreachable, error_of
from vmlab.manager.client.sending import Sender, path_of

__all__ = ["Exit", "RemoteCommand", "RemoteConsole", "commanded", "consoled", "perform"]

_STDIN: Final = b"\x00"
_OUTPUTS: Final = {1: "stdout", 2: "stderr"}
_LARGEST: Final = 16 << 20
"""Bytes of the largest message that is taken."""
_NORMAL: Final = 1000
"""Close code of a connection that has done what it was for (RFC 6455, 7.4.1)."""
_OPENING: Final = 120.0
"""Seconds until it is open: a manager may be just beginning, and asks the hypervisor first."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a command ended: by itself with a code, or by a signal."""

    code: int
    signal: int | None = None

    @property
    def status(self) -> int:
        """What a shell would tell of it."""
        return 128 + self.signal if self.signal else self.code


@asynccontextmanager
async def _connected(sender: Sender, path: str) -> AsyncIterator[ClientConnection]:
    """A WebSocket to the manager."""
    uri = "ws" + sender.address.url.removeprefix("http") + path
    options: dict[str, Any] = {
        "additional_headers": sender.headers,
        "max_size": _LARGEST,
        "compression": None,
        "open_timeout": _OPENING,
        # What is on this host is not reached through a proxy.
        "proxy": None if sender.address.loopback else True,
        # The other side is busy as long as its machine is; a connection that broke is told by TCP.
        "ping_interval": None,
    }
    if sender.tls is not None:
        options["ssl"] = sender.tls

    async def ask() -> ClientConnection:
        if sender.address.socket is not None:
            return await unix_connect(str(sender.address.socket), uri, **options)
        return await connect(uri, **options)

    try:
        connection = await sender.attempt(ask)
    except InvalidStatus as error:
        answer = error.response
        raise error_of(answer.status_code, bytes(answer.body or b""), sender.address) from error
    except InvalidHandshake as error:
        raise Unreachable(
            f"what answers at {sender.address} is no manager: {error}", hint="is the address right?"
        ) from error
    try:
        yield connection
    finally:
        await connection.close()


def _ended(closed: ConnectionClosed, what: str) -> VmlabError:
    """Why a connection ended before what it was for."""
    received = closed.rcvd
    reason = received.reason if received is not None else ""
    return ChannelClosed(
        f"{what} ended: {reason or 'the manager went away'}",
        hint="`vmlab show` tells what became of the machine",
    )


def _message(text: str) -> dict[str, Any]:
    """A text message of the manager's.

    Raises:
        VmlabError: it tells of one.
    """
    try:
        message = json.loads(text)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise OperationFailed(f"the manager sent what is no message: {text[:100]!r}")
    if isinstance(message.get("error"), Mapping):
        raise from_record(message["error"])
    return message


# ------------------------------------------------------------------------------------- consoles


class RemoteConsole(Console):
    """A machine's console, as it is now; its log is asked for beside."""

    name = "serial"

    def __init__(self, connection: ClientConnection, log: Callable[[], Awaitable[bytes]]) -> None:
        self._connection = connection
        self._log = log
        self._held = b""

    async def log(self) -> bytes:
        """What it has printed so far."""
        return await self._log()

    async def read(self, size: int = 65536) -> bytes:
        """What it prints next; nothing when it has ended.

        Raises:
            ChannelClosed: the manager went away.
            VmlabError: what it raised.
        """
        while not self._held:
            try:
                received = await self._connection.recv()
            except ConnectionClosed as closed:
                if _is_over(closed):
                    return b""
                raise _ended(closed, "the console") from closed
            if isinstance(received, str):
                _message(received)
            else:
                self._held = received
        piece, self._held = self._held[:size], self._held[size:]
        return piece

    async def write(self, data: bytes) -> None:
        """Type on it.

        Raises:
            ChannelClosed: it has ended.
        """
        try:
            await self._connection.send(data)
        except ConnectionClosed as closed:
            raise _ended(closed, "the console") from closed

    async def close(self) -> None:
        """Let go of it; again does nothing."""
        await self._connection.close()


def _is_over(closed: ConnectionClosed) -> bool:
    """Whether a connection has ended because all was said."""
    return closed.rcvd is not None and closed.rcvd.code == _NORMAL and not closed.rcvd.reason


@asynccontextmanager
async def consoled(
    sender: Sender, machine: str, *, history: int = 0
) -> AsyncIterator[RemoteConsole]:
    """The live console of a machine; what it begins with is `history` bytes that are older.

    Raises:
        VmlabError: it has none, or is not there.
    """
    path = path_of("machines", machine, "console")

    async def log() -> bytes:
        return (await sender.request("GET", path)).content

    async with _connected(sender, f"{path}?history={history}") as connection:
        yield RemoteConsole(connection, log)


# ------------------------------------------------------------------------------------- commands


class RemoteCommand:
    """A command that runs in a guest."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def signal(self, number: int) -> None:
        """Send it a signal."""
        await self._tell({"signal": number})

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal how large it is."""
        await self._tell({"resize": [rows, columns]})

    async def write(self, data: bytes) -> None:
        """Give it input."""
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(_STDIN + data)

    async def end_of_input(self) -> None:
        """Give it no more input."""
        await self._tell({"eof": True})

    async def feed(self, given: AsyncIterator[bytes] | None) -> None:
        """Give it all of an input, and its end."""
        if given is not None:
            async for data in given:
                await self.write(data)
        await self.end_of_input()

    async def wait(self, *, stdout: Sink, stderr: Sink) -> Exit:
        """Hand on what it prints, until it has ended.

        Raises:
            ChannelClosed: the manager or the guest went away.
            VmlabError: what the manager raised.
        """
        sinks = {"stdout": stdout, "stderr": stderr}
        while True:
            try:
                received = await self._connection.recv()
            except ConnectionClosed as closed:
                raise _ended(closed, "the command") from closed
            if isinstance(received, bytes):
                name = _OUTPUTS.get(received[0]) if received else None
                if name is None:
                    raise OperationFailed("the manager sent output of no stream")
                await sinks[name](received[1:])
                continue
            message = _message(received)
            if "exit" in message or "signal" in message:
                code, number = message.get("exit"), message.get("signal")
                return Exit(code if isinstance(code, int) else 0, number)

    async def _tell(self, message: Mapping[str, object]) -> None:
        # It has ended, which whoever waits for it is told.
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(json.dumps(message))


@asynccontextmanager
async def commanded(
    sender: Sender,
    machine: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    terminal: tuple[int, int] | None = None,
) -> AsyncIterator[RemoteCommand]:
    """A command in the guest of a machine, from its beginning; it ends with the block.

    Args:
        sender: The manager.
        machine: Name or id of the machine.
        argv: Program and arguments.
        env: More of its environment.
        cwd: Its directory.
        terminal: Rows and columns of the terminal that it gets; None is no terminal.

    Raises:
        VmlabError: the machine is not there or its guest does not answer.
    """
    request: dict[str, Any] = {"argv": list(argv), "env": dict(env or {}), "cwd": cwd, "tty": False}
    if terminal is not None:
        request |= {"tty": True, "rows": terminal[0], "columns": terminal[1]}
    async with _connected(sender, path_of("machines", machine, "exec")) as connection:
        command = RemoteCommand(connection)
        await connection.send(json.dumps(request))
        yield command


async def perform(
    command: RemoteCommand, given: AsyncIterator[bytes] | None, *, stdout: Sink, stderr: Sink
) -> Exit:
    """Feed a command and hand on what it prints, until it has ended; its input may go on."""
    waiting = asyncio.ensure_future(command.wait(stdout=stdout, stderr=stderr))
    feeding = asyncio.ensure_future(command.feed(given))
    try:
        await asyncio.wait({waiting, feeding}, return_when=asyncio.FIRST_COMPLETED)
        if feeding.done():
            # An input that cannot be read is an end that the command must not take for its end.
            feeding.result()
        return await waiting
    finally:
        for task in (waiting, feeding):
            task.cancel()
        await asyncio.wait({waiting, feeding})

"""`WS /v1/machines/{machine}/exec`: a command in a guest, with its streams, signals and terminal.

The first message is JSON: {"argv", "env", "cwd", "tty", "rows", "columns"}. Then binary messages
carry a byte for the stream (0 stdin, 1 stdout, 2 stderr) and what goes there; text messages are
{"resize": [rows, columns]}, {"signal": number} and {"eof": true}; {"exit": status, "signal":
number} is the last one. Nothing is collected: while nobody takes the output, the guest waits. Who
leaves ends the command.
"""

from __future__ import annotations

import asyncio
import signal as signals
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.websockets import WebSocket

from vmlab.guests.command import Command, Sink, quote
from vmlab.lab.boot import TERMINAL
from vmlab.lab.terminal import on_console, printed, resized
from vmlab.machine.documents import parse_document
from vmlab.machine.errors import VmlabError
from vmlab.machine.fields import Flag, Text, Whole
from vmlab.manager.api.problems import BadRequest
from vmlab.manager.api.service import ASK_SECONDS, Here, Service
from vmlab.manager.api.sockets import Link, linked, until_first
from vmlab.manager.store.failures import Conflict

if TYPE_CHECKING:
    from vmlab.guests.guest import Guest
    from vmlab.hypervisors.base import Console

__all__ = ["Execution", "router"]

router = APIRouter(prefix="/v1")

_STDIN, _STDOUT, _STDERR = range(3)
_ANSWER_SECONDS: Final = 60.0
"""Seconds that a guest that nobody has spoken to yet has to answer."""
_LAST_OUTPUT_SECONDS: Final = 30.0
"""Seconds that a terminal's last output has to arrive after its command has ended."""
_RESIZE_SECONDS: Final = 10.0
_HELD: Final = 16
"""Messages of input that are taken before the guest has taken them."""

_Argument = Annotated[str, Text(r"(?s)^[^\0]*$", "text without NUL")]
_Variable = Annotated[str, Text(r"^[A-Za-z_][A-Za-z0-9_]*$", "the name of a variable")]


class Execution(BaseModel):
    """A command to run: program and arguments as they are, no shell's text."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="command")

    argv: tuple[_Argument, ...] = Field(min_length=1, max_length=10_000)
    env: dict[_Variable, _Argument] = Field(default_factory=dict)
    cwd: _Argument | None = None
    tty: Flag = False
    rows: Whole = Field(24, ge=1, le=10_000)
    columns: Whole = Field(80, ge=1, le=10_000)


class _Said(BaseModel):
    """A text message after the first one."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="message")

    resize: tuple[Whole, Whole] | None = None
    signal: Annotated[Whole, Field(ge=1, le=64)] | None = None
    eof: Flag = False


@router.websocket("/machines/{machine}/exec")
async def execute(socket: WebSocket, here: Here, machine: str) -> None:
    """Run a command in the guest of a machine."""
    id_ = await here.running_machine(machine, "run a command in")
    async with linked(here, socket) as link:
        first = await link.receive()
        if isinstance(first, bytes):
            raise BadRequest("the first message has to be JSON that says what to run")
        wanted = parse_document(Execution, first, form="json")
        guest = await here.manager.guests.get(id_, timeout=_ANSWER_SECONDS)
        if wanted.tty:
            status = await _on_terminal(here, id_, guest, wanted, link)
        else:
            status = await _plainly(here, guest, wanted, link)
        if status is not None:
            await link.tell({"exit": status, "signal": _signal(status)})


def _signal(status: int) -> int | None:
    """The signal that ended a command, as far as a shell's status tells."""
    number = status - 128
    return number if number in {member.value for member in signals.Signals} else None


def _text(argv: tuple[str, ...]) -> str:
    return "exec " + " ".join(quote(word) for word in argv)


class _Running:
    """A command under way: its process in the guest, once that is known, and its status."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.process: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.status: int | None = None

    def started(self, process: int) -> None:
        """Note its process."""
        if not self.process.done():
            self.process.set_result(process)

    async def signal(self, number: int) -> None:
        """Send it a signal; one that has ended takes none."""
        with suppress(VmlabError):
            await self.guest.channel.signal(await asyncio.shield(self.process), number)


def _to(link: Link, stream: int) -> Sink:
    async def take(data: bytes) -> None:
        await link.send(data, stream=stream)

    return take


async def _plainly(here: Service, guest: Guest, wanted: Execution, link: Link) -> int | None:
    """Run it on the streams of a connection; returns its status, or None if nobody waits for it."""
    running = _Running(guest)
    given = asyncio.Queue[bytes | None](_HELD)

    async def input_() -> AsyncIterator[bytes]:
        while (data := await given.get()) is not None:
            yield data

    async def run() -> None:
        running.status = await guest.channel.run(
            Command(_text(wanted.argv), input_(), dict(wanted.env), wanted.cwd),
            stdout=_to(link, _STDOUT),
            stderr=_to(link, _STDERR),
            started=running.started,
        )

    async def listen() -> None:
        ended = False
        while True:
            message = await link.receive()
            if isinstance(message, bytes):
                data = _input(message)
                if data and not ended:
                    await given.put(data)
                continue
            said = parse_document(_Said, message, form="json")
            if said.signal is not None:
                await running.signal(said.signal)
            if said.eof and not ended:
                ended = True
                await given.put(None)

    await until_first(here, run, listen)
    return running.status


async def _on_terminal(
    here: Service, id_: str, guest: Guest, wanted: Execution, link: Link
) -> int | None:
    """Run it with the machine's terminal; returns its status, or None if nobody waits for it.

    Raises:
        Conflict: somebody else has that terminal.
        ResourceNotFound: the machine has none.
    """
    if id_ in here.terminals:
        raise Conflict(
            f"the terminal of machine {guest.machine.name!r} is in use",
            hint="run the command without a terminal (tty: false), or wait",
        )
    here.terminals.add(id_)
    try:
        async with await guest.machine.console(TERMINAL, timeout=ASK_SECONDS) as console:
            return await _with(console, here, guest, wanted, link)
    finally:
        here.terminals.discard(id_)


async def _with(
    console: Console, here: Service, guest: Guest, wanted: Execution, link: Link
) -> int | None:
    running = _Running(guest)
    script, end = on_console(_text(wanted.argv), wanted.rows, wanted.columns)

    async def show() -> None:
        async for data in printed(console, end):
            await link.send(data, stream=_STDOUT)

    async def run() -> None:
        showing = asyncio.ensure_future(show())
        try:
            running.status = await guest.channel.run(
                Command(script, _leash(guest), dict(wanted.env), wanted.cwd),
                stdout=_to(link, _STDOUT),
                stderr=_to(link, _STDERR),
                started=running.started,
            )
            await asyncio.wait({showing}, timeout=_LAST_OUTPUT_SECONDS)
        finally:
            showing.cancel()
            await asyncio.wait({showing})
        if not showing.cancelled():
            showing.result()

    async def listen() -> None:
        await asyncio.shield(running.process)
        while True:
            message = await link.receive()
            if isinstance(message, bytes):
                if data := _input(message):
                    await console.write(data)
                continue
            said = parse_document(_Said, message, form="json")
            if said.signal is not None:
                await running.signal(said.signal)
            if said.resize is not None:
                # A window that cannot be told its size is no reason to end what runs in it.
                with suppress(VmlabError):
                    await guest.execute(resized(*said.resize), timeout=_RESIZE_SECONDS)

    await until_first(here, run, listen)
    return running.status


def _leash(guest: Guest) -> AsyncIterator[bytes] | None:
    """Input that says nothing: the agent ends a command whose input breaks off."""
    channel = guest.channel
    name = getattr(getattr(channel, "choice", None), "name", channel.name)
    return _silence() if name == "agent" else None


async def _silence() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def _input(message: bytes) -> bytes:
    """What goes to a command's standard input.

    Raises:
        BadRequest: it is of another stream.
    """
    if not message or message[0] != _STDIN:
        raise BadRequest(
            "a binary message begins with the byte 0, for standard input",
            hint="1 and 2 come from the command",
        )
    return message[1:]

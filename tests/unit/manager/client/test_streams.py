"""Commands and consoles over WebSockets, against a service that says what it is told to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, unix_serve
from websockets.http11 import Request, Response

from vmlab.machine.errors import ChannelClosed, MachineNotFound, OperationFailed, VmlabError
from vmlab.manager.api.problems import response_of
from vmlab.manager.client import AsyncClient, Unreachable, streams
from vmlab.manager.client.address import Address
from vmlab.manager.client.sending import Sender
from vmlab.manager.client.streams import Exit, perform

Service = Callable[[ServerConnection], Awaitable[None]]
Story = Callable[[AsyncClient], Awaitable[None]]


def against(
    tmp_path: Path,
    service: Service,
    story: Story,
    refuse: Callable[[ServerConnection, Request], Response | None] = lambda connection, request: (
        None
    ),
) -> None:
    """Run a story with a client of a service that only has WebSockets."""
    path = tmp_path / "s"

    async def told() -> None:
        async with (
            # No limit that a host that stands still would pass.
            unix_serve(
                service, str(path), process_request=refuse, open_timeout=None, ping_interval=None
            ),
            AsyncClient(Sender(Address("http://localhost", path))) as client,
        ):
            await story(client)

    asyncio.run(told())


class Heard:
    """What a client has sent."""

    def __init__(self) -> None:
        self.path = ""
        self.request: dict[str, Any] = {}
        self.stdin = b""
        self.told: list[dict[str, Any]] = []


def echoing(heard: Heard, last: dict[str, Any]) -> Service:
    """A service whose command prints what it is given, on both streams, until its end."""

    async def serve(connection: ServerConnection) -> None:
        assert connection.request is not None
        heard.path = connection.request.path
        heard.request = json.loads(await connection.recv())
        async for message in connection:
            if isinstance(message, bytes):
                assert message[0] == 0
                heard.stdin += message[1:]
                await connection.send(b"\x01" + message[1:])
                await connection.send(b"\x02" + message[1:].upper())
                continue
            heard.told.append(json.loads(message))
            if "eof" in heard.told[-1]:
                await connection.send(json.dumps(last))
                return

    return serve


class Taken:
    """What a sink has taken."""

    def __init__(self) -> None:
        self.data = b""

    async def take(self, data: bytes) -> None:
        self.data += data


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for each in data:
        yield each


def test_a_command_has_its_streams_and_its_status(tmp_path: Path) -> None:
    heard, out, err = Heard(), Taken(), Taken()

    async def story(client: AsyncClient) -> None:
        exit_ = await client.machines.execute(
            "web/1", ["cat", "-u"], stdin=pieces(b"a", b"b"), stdout=out.take, stderr=err.take,
            env={"A": "1"}, cwd="/srv",
        )  # fmt: skip
        assert exit_ == Exit(3)
        assert exit_.status == 3

    against(tmp_path, echoing(heard, {"exit": 3, "signal": None}), story)
    assert heard.path == "/v1/machines/web%2F1/exec"
    assert heard.request == {
        "argv": ["cat", "-u"], "env": {"A": "1"}, "cwd": "/srv", "tty": False,
    }  # fmt: skip
    assert (heard.stdin, out.data, err.data) == (b"ab", b"ab", b"AB")
    assert heard.told == [{"eof": True}]


def test_a_command_that_a_signal_ended_tells_so(tmp_path: Path) -> None:
    async def story(client: AsyncClient) -> None:
        exit_ = await client.machines.execute("web", ["sleep", "9"])
        assert exit_.status == 143

    against(tmp_path, echoing(Heard(), {"exit": None, "signal": 15}), story)


def test_a_terminal_has_a_size_that_changes(tmp_path: Path) -> None:
    heard = Heard()

    async def story(client: AsyncClient) -> None:
        async with client.machines.command("web", ["sh"], terminal=(24, 80)) as command:
            await command.resize(50, 132)
            await command.signal(2)
            await command.end_of_input()
            taken = Taken()
            assert (await command.wait(stdout=taken.take, stderr=taken.take)).code == 0

    against(tmp_path, echoing(heard, {"exit": 0}), story)
    assert (heard.request["tty"], heard.request["rows"], heard.request["columns"]) == (True, 24, 80)
    assert heard.told == [{"resize": [50, 132]}, {"signal": 2}, {"eof": True}]


def test_what_goes_wrong_is_the_error_that_it_is(tmp_path: Path) -> None:
    error = MachineNotFound("there is no machine 'web'", hint="vmlab list")

    async def serve(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(json.dumps({"error": error.to_record()}))
        await connection.close(1011)

    async def story(client: AsyncClient) -> None:
        with pytest.raises(MachineNotFound, match="no machine 'web'"):
            await client.machines.execute("web", ["true"])

    against(tmp_path, serve, story)


def test_what_is_refused_before_it_begins_is_as_well(tmp_path: Path) -> None:
    problem = response_of(MachineNotFound("there is no machine 'web'"))

    def refuse(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(404, bytes(problem.body).decode())

    async def story(client: AsyncClient) -> None:
        with pytest.raises(MachineNotFound):
            async with client.machines.console("web"):
                pass

    against(tmp_path, echoing(Heard(), {}), story, refuse)


def test_a_manager_that_goes_away_is_said_to_have(tmp_path: Path) -> None:
    async def serve(connection: ServerConnection) -> None:
        await connection.recv()
        connection.transport.abort()

    async def story(client: AsyncClient) -> None:
        with pytest.raises(ChannelClosed, match="the command ended: the manager went away"):
            await client.machines.execute("web", ["true"])

    against(tmp_path, serve, story)


def test_a_manager_has_the_time_to_begin_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    async def refused(*_: Any, open_timeout: float, **__: Any) -> None:
        asked.append(open_timeout)
        raise OSError("refused")

    monkeypatch.setattr(streams, "unix_connect", refused)

    async def asking() -> None:
        async with AsyncClient(Sender(Address("http://localhost", tmp_path / "s"))) as client:
            with pytest.raises(Unreachable):
                await client.machines.execute("web", ["true"])

    asyncio.run(asking())
    assert min(asked) >= 60


def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    async def asking() -> None:
        async with AsyncClient(Sender(Address("http://localhost", tmp_path / "none"))) as client:
            with pytest.raises(Unreachable, match="does not answer"):
                await client.machines.execute("web", ["true"])

    asyncio.run(asking())


@pytest.mark.parametrize("message", ["no json", "[1]", b"\x09of no stream", b""])
def test_what_is_no_message_is_an_error(message: str | bytes, tmp_path: Path) -> None:
    async def serve(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(message)
        await connection.wait_closed()

    async def story(client: AsyncClient) -> None:
        with pytest.raises(OperationFailed):
            await client.machines.execute("web", ["true"])

    against(tmp_path, serve, story)


def test_an_input_that_cannot_be_read_is_no_end_of_it(tmp_path: Path) -> None:
    heard = Heard()

    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise OperationFailed("the disk is broken")

    async def story(client: AsyncClient) -> None:
        async with client.machines.command("web", ["cat"]) as command:
            taken = Taken()
            with pytest.raises(OperationFailed, match="the disk is broken"):
                await perform(command, broken(), stdout=taken.take, stderr=taken.take)

    against(tmp_path, echoing(heard, {"exit": 0}), story)
    assert heard.told == []


def test_a_console_is_bytes_both_ways_until_it_ends(tmp_path: Path) -> None:
    async def serve(connection: ServerConnection) -> None:
        await connection.send(b"login: ")
        typed = await connection.recv()
        assert isinstance(typed, bytes)
        await connection.send(typed * 2)

    async def story(client: AsyncClient) -> None:
        async with client.machines.console("web") as console:
            assert await console.read(3) == b"log"
            assert await console.read() == b"in: "
            await console.write(b"root")
            assert await console.read() == b"rootroot"
            assert await console.read() == b""
            with pytest.raises(ChannelClosed):
                await console.write(b"more")

    against(tmp_path, serve, story)


def test_a_console_begins_with_as_much_of_what_was_before_as_is_wanted(tmp_path: Path) -> None:
    async def serve(connection: ServerConnection) -> None:
        assert connection.request is not None
        await connection.send(connection.request.path.encode())

    async def story(client: AsyncClient) -> None:
        for options, asked in (({}, 0), ({"history": 20}, 20)):
            async with client.machines.console("web", **options) as console:
                assert await console.read() == f"/v1/machines/web/console?history={asked}".encode()

    against(tmp_path, serve, story)


def test_a_console_that_breaks_says_why(tmp_path: Path) -> None:
    async def serve(connection: ServerConnection) -> None:
        gone = VmlabError("the machine is gone")
        await connection.send(json.dumps({"error": gone.to_record()}))
        await connection.close(1011)

    async def story(client: AsyncClient) -> None:
        async with client.machines.console("web") as console:
            with pytest.raises(VmlabError, match="the machine is gone"):
                await console.read()

    against(tmp_path, serve, story)


def test_a_real_service_refuses_what_is_not_there(
    tell_over_socket: Callable[[Story], None],
) -> None:
    async def story(client: AsyncClient) -> None:
        with pytest.raises(MachineNotFound):
            await client.machines.execute("web", ["true"])
        with pytest.raises(MachineNotFound):
            async with client.machines.console("web") as console:
                await console.read()

    tell_over_socket(story)

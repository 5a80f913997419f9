"""Clients of the monitor, over real sockets: by hand, and with QEMU's own client library."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient
from tests.unit.engine.monitor.wire import Wire

from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.monitor.commands import CommandError, Commands
from vmlab.engine.monitor.server import Monitor
from vmlab.machine.errors import VmlabError


class Colour(Enum):
    RED = "red"
    DARK_BLUE = "dark-blue"


@dataclass(frozen=True)
class File:
    filename: str
    read_only: bool = False


@dataclass(frozen=True)
class Block:
    node_name: str
    file: File
    sizes: list[int]
    colour: Colour | None = None


@dataclass(frozen=True)
class Stopped:
    reason: str
    code: int | None = None


class Served:
    """A monitor that is served, and what its commands were called with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[Any] = []
        self.faults: list[BaseException] = []
        self.waiting: list[Callable[[], None]] | None = None
        self.reactor = Reactor(self.faults.append)
        commands = Commands()
        commands.add("block-add", self.block_add)
        commands.add("double", self.double)
        commands.add("broken", self.broken)
        commands.add("anything", self.anything)
        commands.add_event("STOP", Stopped)
        commands.add_event("RESET")
        self.monitor = Monitor(path, self.reactor, commands, (1, 2, 3), self.place)
        self.reactor.start()

    def place(self, work: Callable[[], None]) -> None:
        if self.waiting is None:
            work()
        else:
            self.waiting.append(work)

    def block_add(self, block: Block) -> None:
        self.calls.append(block)

    def double(self, number: int, times: float = 2.0) -> list[Block]:
        if number < 0:
            raise CommandError("a number from 0 on is wanted", "DeviceNotFound")
        return [Block("n", File("f"), [int(number * times)], Colour.DARK_BLUE)]

    def broken(self) -> None:
        raise ZeroDivisionError("a mistake")

    def anything(self, value: Any) -> Any:
        return value


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path / "q.sock")
    yield made
    made.monitor.close()
    made.reactor.close()
    assert not made.path.exists()


@pytest.fixture
def wire(served: Served) -> Iterator[Wire]:
    made = Wire(served.path)
    yield made
    made.close()


def test_a_client_is_greeted_and_has_to_negotiate_once(served: Served) -> None:
    wire = Wire(served.path, negotiate=False)
    version = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "vmlab"}
    assert wire.greeting == {"QMP": {"version": version, "capabilities": []}}
    refused = wire.ask("query-commands")["error"]
    assert refused["class"] == "CommandNotFound"
    assert "negotiation" in refused["desc"]
    assert "no capability" in wire.error("qmp_capabilities", enable=["oob"])[1]
    assert "unexpected" in wire.error("qmp_capabilities", x=1)[1]
    assert wire.ask("qmp_capabilities", arguments={"enable": []}) == {"return": {}}
    assert "already complete" in wire.error("qmp_capabilities")[1]
    assert wire.ask("query-commands", id=[1, "a"])["id"] == [1, "a"]
    wire.close()


def test_arguments_become_what_the_function_takes(served: Served, wire: Wire) -> None:
    block = {"node-name": "a", "file": {"filename": "/x", "read-only": True}, "sizes": [1, 2]}
    assert wire.ask("block-add", arguments={"block": block}) == {"return": {}}
    assert served.calls == [Block("a", File("/x", True), [1, 2])]
    answer = wire.ask("double", arguments={"number": 4, "times": 3})
    assert answer == {
        "return": [
            {
                "node-name": "n",
                "file": {"filename": "f", "read-only": False},
                "sizes": [12],
                "colour": "dark-blue",
            }
        ]
    }
    assert wire.ask("anything", arguments={"value": {"a": [None]}}) == {"return": {"a": [None]}}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "Parameter 'block' is missing"),
        ({"block": 1}, "Invalid parameter type for 'block', expected: object"),
        ({"block": {}}, "Parameter 'block.node-name' is missing"),
        ({"block": {"node_name": "a"}}, "Parameter 'block.node_name' is unexpected"),
        (
            {"block": {"node-name": 1}},
            "Invalid parameter type for 'block.node-name', expected: string",
        ),
        (
            {"block": {"node-name": "a", "file": {"filename": "f", "read-only": 1}}},
            "Invalid parameter type for 'block.file.read-only', expected: boolean",
        ),
        (
            {"block": {"node-name": "a", "file": {"filename": "f"}, "sizes": 1}},
            "Invalid parameter type for 'block.sizes', expected: array",
        ),
        (
            {"block": {"node-name": "a", "file": {"filename": "f"}, "sizes": [1, True]}},
            "Invalid parameter type for 'block.sizes[1]', expected: integer",
        ),
        (
            {"block": {"node-name": "a", "file": {"filename": "f"}, "sizes": [1 << 64]}},
            "Invalid parameter type for 'block.sizes[0]', expected: integer",
        ),
        (
            {
                "block": {
                    "node-name": "a",
                    "file": {"filename": "f"},
                    "sizes": [],
                    "colour": "green",
                }
            },
            "Parameter 'block.colour' does not accept value 'green'",
        ),
        (
            {"block": {"node-name": "a", "file": {"filename": "f"}, "sizes": [], "colour": 1}},
            "Invalid parameter type for 'block.colour', expected: string",
        ),
    ],
)
def test_a_wrong_argument_is_named(
    served: Served, wire: Wire, arguments: dict[str, Any], told: str
) -> None:
    assert wire.error("block-add", **arguments) == ("GenericError", told)
    assert served.calls == []


def test_what_is_no_command_is_refused_and_the_next_one_is_answered(wire: Wire) -> None:
    wire.socket.sendall(b'nonsense\n{"execute": 1}{"arguments": {}}{"execute": "x", "y": 1}')
    wire.socket.sendall(b'{"execute": "x", "arguments": [1]}{"execute": "x", "id": 7}')
    told = [wire.read() for _ in range(6)]
    assert [each["error"]["desc"] for each in told] == [
        "JSON parse error, expecting value",
        "QMP input member 'execute' must be a string",
        "QMP input lacks member 'execute'",
        "QMP input member 'y' is unexpected",
        "QMP input member 'arguments' must be an object",
        "The command x has not been found",
    ]
    assert told[-1]["id"] == 7
    assert told[-1]["error"]["class"] == "CommandNotFound"
    assert wire.error("double", number=-1) == ("DeviceNotFound", "a number from 0 on is wanted")


def test_a_mistake_of_the_engine_is_told_to_both_sides(served: Served, wire: Wire) -> None:
    assert wire.error("broken") == ("GenericError", "internal error: ZeroDivisionError: a mistake")
    assert "return" in wire.ask("query-commands")
    assert [type(each) for each in served.faults] == [ZeroDivisionError]


def test_commands_wait_for_each_other_and_their_place(served: Served, wire: Wire) -> None:
    served.waiting = []
    wire.socket.sendall(b'{"execute":"query-commands","id":1}{"execute":"query-commands","id":2}')
    other = Wire(served.path, negotiate=False)
    other.socket.sendall(b'{"execute":"qmp_capabilities","id":3}')
    while len(served.waiting) < 2:
        threading.Event().wait(0.01)
    for work in served.waiting[:2]:
        work()
    assert [wire.read()["id"], other.read()["id"]] == [1, 3]
    while len(served.waiting) < 3:
        threading.Event().wait(0.01)
    (last,) = served.waiting[2:]
    last()
    assert wire.read()["id"] == 2
    other.close()


def test_events_reach_all_who_negotiated(served: Served, wire: Wire) -> None:
    stranger = Wire(served.path, negotiate=False)
    served.monitor.emit("STOP", Stopped("paused"))
    served.monitor.emit("RESET")
    first, second = wire.read(), wire.read()
    assert first["event"] == "STOP"
    assert first["data"] == {"reason": "paused"}
    assert set(first["timestamp"]) == {"seconds", "microseconds"}
    assert (second["event"], "data" in second) == ("RESET", False)
    assert stranger.ask("qmp_capabilities") == {"return": {}}
    stranger.close()
    with pytest.raises(TypeError, match="the data of STOP"):
        served.monitor.emit("STOP")


def test_a_client_that_does_not_read_is_let_go(served: Served, wire: Wire) -> None:
    long = Stopped("x" * 200_000)
    for _ in range(50):
        served.monitor.emit("STOP", long)
    received = 0
    while piece := wire.socket.recv(1 << 20):
        received += len(piece)
    assert received < 50 * 200_000
    late = Wire(served.path)
    late.close()


def test_a_client_that_sends_far_ahead_gets_every_answer_in_order(wire: Wire) -> None:
    count = 500
    asked = b"".join(b'{"execute":"anything","arguments":{"value":%d}}' % n for n in range(count))
    sender = threading.Thread(target=wire.socket.sendall, args=(asked,))
    sender.start()
    assert [wire.read()["return"] for _ in range(count)] == list(range(count))
    sender.join()


def test_closing_sends_what_was_answered(tmp_path: Path) -> None:
    served = Served(tmp_path / "q.sock")
    wire = Wire(served.path)
    served.monitor.emit("RESET")
    served.monitor.close()
    assert wire.read()["event"] == "RESET"
    assert wire.lines.readline() == b""
    wire.close()
    served.reactor.close()


def test_closing_is_the_end_of_the_stream_to_a_client_that_asks_meanwhile(tmp_path: Path) -> None:
    served = Served(tmp_path / "q.sock")
    wire = Wire(served.path)
    served.reactor.stop()  # nobody reads it any more
    wire.socket.sendall(b'{"execute": "query-commands"}')
    served.monitor.close()
    assert wire.lines.readline() == b""
    wire.close()
    served.reactor.close()


def test_a_path_that_is_taken_is_an_error(served: Served) -> None:
    with pytest.raises(VmlabError, match="in use"):
        Monitor(served.path, served.reactor, Commands(), (0, 0, 0))


def test_qemu_s_own_client_drives_it(served: Served) -> None:
    async def drive() -> None:
        client = QMPClient("test")
        await client.connect(str(served.path))
        names = {each["name"] for each in await client.execute("query-commands")}
        assert {"qmp_capabilities", "query-qmp-schema", "double"} <= names
        with pytest.raises(ExecuteError, match="a number from 0 on"):
            await client.execute("double", {"number": -5})
        with client.listener("RESET") as listener:
            served.monitor.emit("RESET")
            assert (await listener.get())["event"] == "RESET"
        await client.disconnect()

    asyncio.run(asyncio.wait_for(drive(), 250))


def test_the_schema_tells_every_command_event_and_type(wire: Wire) -> None:
    schema = {entry["name"]: entry for entry in wire.ask("query-qmp-schema")["return"]}
    listed = {each["name"] for each in wire.ask("query-commands")["return"]}
    assert listed == {name for name, entry in schema.items() if entry["meta-type"] == "command"}
    double = schema["double"]
    assert schema[double["arg-type"]]["members"] == [
        {"name": "number", "type": "int"},
        {"name": "times", "type": "number", "default": None},
    ]
    array = schema[double["ret-type"]]
    assert array["meta-type"] == "array"
    members = {each["name"]: each for each in schema[array["element-type"]]["members"]}
    assert set(members) == {"node-name", "file", "sizes", "colour"}
    assert schema[members["colour"]["type"]]["values"] == ["red", "dark-blue"]
    assert schema["broken"]["ret-type"] == schema["RESET"]["arg-type"]
    assert schema[schema["RESET"]["arg-type"]]["members"] == []
    assert schema[schema["STOP"]["arg-type"]]["members"][1]["default"] is None
    # Whatever is named is there.
    for entry in schema.values():
        for part in [entry, *entry.get("members", [])]:
            for key in ("arg-type", "ret-type", "element-type", "type"):
                assert part.get(key, "str") in schema

"""`query-qmp-schema` tells the truth: what it describes is accepted, what is not is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.engine.process import programs

from vmlab.engine.configuration import Boot, Configuration, DiskFile, Gdb, Nic, SocketPort
from vmlab.engine.monitor.commands import Command, CommandError, Commands
from vmlab.engine.process import Process

Schema = dict[str, dict[str, Any]]
# JSON values by the types that the schema knows; "value" is any of them.
VALUES = {"string": "text", "int": 7, "number": 0.5, "boolean": True, "null": None, "value": [1]}


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """The commands of a process whose machine has one of everything."""
    (tmp_path / "kernel").write_bytes(programs.IDLE)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    made = Process(
        Configuration(
            name="vm",
            memory=8 << 20,
            qmp=str(tmp_path / "q.sock"),
            harts=2,
            boot=Boot(kernel=str(tmp_path / "kernel")),
            serial=SocketPort(str(tmp_path / "s.sock")),
            channels=[SocketPort(str(tmp_path / "c.sock"), "org.test")],
            disks=[DiskFile("data", str(tmp_path / "disk"))],
            nics=[Nic("net", "52:54:00:00:00:01")],
            gdb=Gdb(str(tmp_path / "g.sock")),
            paused=True,
        )
    )
    yield made._control.commands
    made._monitor.close()
    assert made._gdb is not None
    made._gdb.close()
    made._machine.close()
    made._reactor.close()


@pytest.fixture
def schema(commands: Commands) -> Schema:
    told = json.loads(json.dumps(commands.find("query-qmp-schema").call({})))
    assert len({entry["name"] for entry in told}) == len(told), "each is told once"
    return {entry["name"]: entry for entry in told}


def example(schema: Schema, name: str, *, whole: bool) -> Any:
    """A value of a type; `whole` with what may be left out."""
    entry = schema[name]
    match entry["meta-type"]:
        case "builtin":
            return VALUES[entry["json-type"]]
        case "enum":
            return entry["values"][-1]
        case "array":
            return [example(schema, entry["element-type"], whole=whole)]
    assert entry["meta-type"] == "object", entry
    return {
        member["name"]: example(schema, member["type"], whole=whole)
        for member in entry["members"]
        if whole or "default" not in member
    }


def wrong_ones(schema: Schema, name: str) -> Iterator[tuple[Any, str]]:
    """Values that are none of a type, and what is said of them."""
    entry = schema[name]
    match entry["meta-type"]:
        case "builtin" if entry["json-type"] != "value":
            yield {"no": "such"}, "Invalid parameter type"
            yield None, "Invalid parameter type"
        case "enum":
            yield "no such", "does not accept value"
            yield 3, "Invalid parameter type"
        case "array":
            yield "text", "Invalid parameter type"
            for value, said in wrong_ones(schema, entry["element-type"]):
                yield [value], said
        case "object":
            yield [], "Invalid parameter type"
            yield from wrong_objects(schema, name)


def wrong_objects(schema: Schema, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects with a member too many, one too few, or a wrong one."""
    right = example(schema, name, whole=True)
    yield {**right, "no-such": 1}, "is unexpected"
    for member in schema[name]["members"]:
        if "default" not in member:
            yield {key: right[key] for key in right if key != member["name"]}, "is missing"
        for value, said in wrong_ones(schema, member["type"]):
            yield {**right, member["name"]: value}, said


def answers_to(schema: Schema, name: str, value: Any, place: str) -> None:
    """Check that an answer is of a type."""
    entry = schema[name]
    match entry["meta-type"]:
        case "builtin":
            kinds = {"string": str, "int": int, "number": (int, float), "boolean": bool}
            kind = kinds.get(entry["json-type"])
            assert kind is None or isinstance(value, kind), (place, value)
            assert entry["json-type"] == "boolean" or not isinstance(value, bool), place
        case "enum":
            assert value in entry["values"], place
        case "array":
            assert isinstance(value, list), place
            for index, each in enumerate(value):
                answers_to(schema, entry["element-type"], each, f"{place}[{index}]")
        case "object":
            members = {member["name"]: member for member in entry["members"]}
            assert set(value) <= set(members), place
            for key, member in members.items():
                if key in value:
                    answers_to(schema, member["type"], value[key], f"{place}.{key}")
                else:
                    assert "default" in member, f"{place}.{key} is missing"


def unexecuted(command: Command, taken: list[dict[str, Any]]) -> Command:
    """A command that notes what it would be called with."""
    return replace(command, function=lambda **arguments: taken.append(arguments))


def names(schema: Schema) -> list[str]:
    return [name for name, entry in schema.items() if entry["meta-type"] == "command"]


def test_what_it_describes_is_accepted(commands: Commands, schema: Schema) -> None:
    assert "blockdev-add" in names(schema) and "x-trace-start" in names(schema)
    for name in names(schema):
        for whole in (False, True):
            taken: list[dict[str, Any]] = []
            arguments = example(schema, schema[name]["arg-type"], whole=whole)
            assert unexecuted(commands.find(name), taken).call(arguments) == {}
            assert len(taken[0]) == len(arguments), name


def test_what_it_does_not_describe_is_refused(commands: Commands, schema: Schema) -> None:
    refused = 0
    for name in names(schema):
        for arguments, said in wrong_objects(schema, schema[name]["arg-type"]):
            with pytest.raises(CommandError, match=said):
                unexecuted(commands.find(name), []).call(arguments)
            refused += 1
    assert refused > 100


def test_answers_are_what_it_says(commands: Commands, schema: Schema) -> None:
    asked = [name for name in names(schema) if "query" in name]
    assert len(asked) > 15
    for name in asked:
        entry = schema[name]
        assert example(schema, entry["arg-type"], whole=False) == {}, f"{name} needs arguments"
        answer = json.loads(json.dumps(commands.find(name).call({})))
        answers_to(schema, entry["ret-type"], answer, name)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_names_no_file_is_refused(commands: Commands, text: str) -> None:
    """It must not come to be a mistake of the engine's, which ends the machine."""
    file = {"driver": "file", "filename": text}
    with pytest.raises(CommandError, match="no text that a file could be named by"):
        commands.find("blockdev-add").call({"node-name": "n", "driver": "raw", "file": file})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("block_resize", {"node-name": "data", "size": -1}),
        ("x-block-fail", {"node-name": "data", "failures": [{"operation": "read", "errno": -5}]}),
        ("x-trace-start", {"file": "/dev/null", "count": -1}),
        ("x-trace-start", {"file": "/dev/null", "hart": 2}),
        ("balloon", {"value": 0}),
        ("set_link", {"name": "none", "up": True}),
        ("device_del", {"id": "data"}),
        ("blockdev-del", {"node-name": "data"}),
    ],
)
def test_what_the_schema_cannot_say_is_refused_as_well(
    commands: Commands, name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(CommandError):
        commands.find(name).call(arguments)

"""The commands and events of a monitor, their types, and the schema that tells them.

A command is a function: its annotations say what it takes and gives, they check what a client
sends, and `query-qmp-schema` is made of them (QEMU, docs/devel/qapi-code-gen, "Client JSON
Protocol introspection"). Dashes stand in QMP where Python has underscores.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Final, Union

_BUILTIN: Final[dict[object, tuple[str, str]]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
    type(None): ("null", "null"),
    Any: ("any", "value"),
}
"""Of Python's types, the names of QAPI's and of JSON's."""
_EXPECTED: Final = {"string": "string", "int": "integer", "number": "number", "boolean": "boolean"}
_EMPTY: Final = "q_empty"
_LARGEST: Final = 1 << 63


class CommandError(Exception):
    """A command was refused or failed; the client is told.

    Args:
        description: A sentence for people.
        kind: The class of the error, which clients may look at (QMP specification, 2.4.2).
    """

    def __init__(self, description: str, kind: str = "GenericError") -> None:
        super().__init__(description)
        self.kind = kind


@dataclass(frozen=True)
class _Member:
    """A parameter of a command, or a field of a structure."""

    name: str
    key: str
    hint: Any
    optional: bool


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What clients call it.
        members: What it takes.
        returns: The type of what it gives; None gives nothing.
        function: What it does.
    """

    name: str
    members: tuple[_Member, ...]
    returns: Any
    function: Callable[..., Any]

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Run it with arguments from a client; its answer as JSON has it.

        Raises:
            CommandError: an argument is wrong, or the command fails.
        """
        answer = self.function(**_taken(self.members, arguments, ""))
        return {} if answer is None else as_json(answer)


class Commands:
    """The commands and events that a monitor has."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}
        self._events: dict[str, type | None] = {}
        self.add("qmp_capabilities", self.qmp_capabilities)
        self.add("query-commands", self.query_commands)
        self.add("query-qmp-schema", self.query_qmp_schema)

    def add(self, name: str, function: Callable[..., Any]) -> None:
        """Have `function` as a command; its parameters and what it returns are annotated."""
        hints = typing.get_type_hints(function)
        members = tuple(
            _Member(_dashed(key), key, hints[key], parameter.default is not parameter.empty)
            for key, parameter in inspect.signature(function).parameters.items()
        )
        self._commands[name] = Command(name, members, hints["return"], function)

    def add_event(self, name: str, data: type | None = None) -> None:
        """Have an event, whose data is a dataclass, if it has any."""
        self._events[name] = data

    def find(self, name: str) -> Command:
        """The command of that name.

        Raises:
            CommandError: there is none.
        """
        command = self._commands.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        return command

    def event(self, name: str, data: object | None) -> dict[str, Any]:
        """An event as it is sent, but for its time; it was added with data of this type."""
        kind = self._events[name]
        if type(data) is not (kind or type(None)):
            raise TypeError(f"the data of {name} is {kind}, not {data!r}")
        message: dict[str, Any] = {"event": name}
        if data is not None:
            message["data"] = as_json(data)
        return message

    def qmp_capabilities(self, enable: list[str] | None = None) -> None:
        """Refuse to negotiate a second time; the first time never comes here."""
        raise CommandError(
            "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
        )

    def query_commands(self) -> list[CommandInfo]:
        """The names of all commands."""
        return [CommandInfo(name) for name in sorted(self._commands)]

    def query_qmp_schema(self) -> list[Any]:
        """All commands and events, and the types of what they take and give."""
        schema = _Schema()
        for command in self._commands.values():
            schema.add(
                command.name,
                "command",
                {
                    "arg-type": schema.members(f"{command.name}-arg", command.members),
                    "ret-type": _EMPTY
                    if command.returns is type(None)
                    else schema.name_of(command.returns),
                },
            )
        for name, data in self._events.items():
            arguments = schema.name_of(data) if data is not None else _EMPTY
            schema.add(name, "event", {"arg-type": arguments})
        return schema.entries


@dataclass(frozen=True)
class CommandInfo:
    """One entry of query-commands."""

    name: str


# -------------------------------------------------------------------------- values of those types


def _dashed(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _members_of(structure: type) -> tuple[_Member, ...]:
    hints = typing.get_type_hints(structure)
    return tuple(
        _Member(
            _dashed(field.name),
            field.name,
            hints[field.name],
            field.default is not MISSING or field.default_factory is not MISSING,
        )
        for field in fields(structure)
    )


def _without_none(hint: Any) -> Any:
    """The type of what is given, of a parameter that may be None, which stands for nothing."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (given,) = [each for each in typing.get_args(hint) if each is not type(None)]
        return given
    return hint


def _taken(members: tuple[_Member, ...], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Arguments for Python of a JSON object."""
    known = {member.name for member in members}
    for name in given:
        if name not in known:
            raise CommandError(f"Parameter '{path}{name}' is unexpected")
    taken = {}
    for member in members:
        if member.name in given:
            hint = _without_none(member.hint)
            taken[member.key] = _checked(hint, given[member.name], f"{path}{member.name}")
        elif not member.optional:
            raise CommandError(f"Parameter '{path}{member.name}' is missing")
    return taken


def _checked(hint: Any, value: Any, path: str) -> Any:
    """A JSON value as one of the type `hint`."""
    if hint is Any:
        return value
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise _wrong(path, "array")
        (element,) = typing.get_args(hint)
        return [_checked(element, each, f"{path}[{at}]") for at, each in enumerate(value)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        if not isinstance(value, str):
            raise _wrong(path, "string")
        if value not in [each.value for each in hint]:
            raise CommandError(f"Parameter '{path}' does not accept value '{value}'")
        return hint(value)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(path, "object")
        assert isinstance(hint, type), "annotations are types"
        return hint(**_taken(_members_of(hint), value, f"{path}."))
    expected = _EXPECTED[_BUILTIN[hint][1]]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint or (hint is int and not -_LARGEST <= value < 2 * _LARGEST):
        raise _wrong(path, expected)
    return value


def _wrong(path: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{path}', expected: {expected}")


def as_json(value: Any) -> Any:
    """A value of those types as JSON has it; what is None in a structure is left out."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((_dashed(field.name), getattr(value, field.name)) for field in fields(value))
        return {name: as_json(part) for name, part in pairs if part is not None}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value


class _Schema:
    """The entries of query-qmp-schema, each type once."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self._names: set[str] = set()
        self.add(_EMPTY, "object", {"members": []})

    def add(self, name: str, meta: str, rest: Mapping[str, Any]) -> None:
        """Have an entry, unless there is one of that name."""
        if name not in self._names:
            self._names.add(name)
            self.entries.append({"name": name, "meta-type": meta, **rest})

    def members(self, name: str, members: tuple[_Member, ...]) -> str:
        """The name of the type of an object of those members."""
        if not members:
            return _EMPTY
        self.add(name, "object", {"members": list(self._told(members))})
        return name

    def _told(self, members: tuple[_Member, ...]) -> Iterator[dict[str, Any]]:
        for member in members:
            told = {"name": member.name, "type": self.name_of(_without_none(member.hint))}
            yield {**told, "default": None} if member.optional else told

    def name_of(self, hint: Any) -> str:
        """The name of a type, which gets its entry."""
        if typing.get_origin(hint) is list:
            (element,) = typing.get_args(hint)
            inner = self.name_of(element)
            self.add(f"[{inner}]", "array", {"element-type": inner})
            return f"[{inner}]"
        if isinstance(hint, type) and issubclass(hint, Enum):
            values = [each.value for each in hint]
            told = {"members": [{"name": value} for value in values], "values": values}
            self.add(hint.__name__, "enum", told)
            return hint.__name__
        if is_dataclass(hint):
            assert isinstance(hint, type), "annotations are types"
            return self.members(hint.__name__, _members_of(hint))
        name, json_type = _BUILTIN[hint]
        self.add(name, "builtin", {"json-type": json_type})
        return name

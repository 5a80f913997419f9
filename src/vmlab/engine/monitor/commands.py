"""The commands and events of a monitor, their types, and the schema that tells them.

A command is a function: its annotations say what it takes and gives, they check what a client
sends, and `query-qmp-schema` is made of them (QEMU, docs/devel/qapi-code-gen, "Client JSON
Protocol introspection"). Dashes stand in QMP where Python has underscores.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any, Final

from vmlab.engine.structures import (
    Member,
    WrongData,
    as_json,
    dashed,
    members_of,
    taken_from,
    without_none,
)

_BUILTIN: Final[dict[object, tuple[str, str]]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
    type(None): ("null", "null"),
    Any: ("any", "value"),
}
"""Of Python's types, the names of QAPI's and of JSON's."""
_EMPTY: Final = "q_empty"


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
class Command:
    """One command.

    Attributes:
        name: What clients call it.
        members: What it takes.
        returns: The type of what it gives; None gives nothing.
        function: What it does.
    """

    name: str
    members: tuple[Member, ...]
    returns: Any
    function: Callable[..., Any]

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Run it with arguments from a client; its answer as JSON has it.

        Raises:
            CommandError: an argument is wrong, or the command fails.
        """
        try:
            taken = taken_from(self.members, arguments, "")
        except WrongData as wrong:
            raise CommandError(str(wrong)) from None
        answer = self.function(**taken)
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
            Member(dashed(key), key, hints[key], parameter.default is not parameter.empty)
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

    def members(self, name: str, members: tuple[Member, ...]) -> str:
        """The name of the type of an object of those members."""
        if not members:
            return _EMPTY
        self.add(name, "object", {"members": list(self._told(members))})
        return name

    def _told(self, members: tuple[Member, ...]) -> Iterator[dict[str, Any]]:
        for member in members:
            told = {"name": member.name, "type": self.name_of(without_none(member.hint))}
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
            return self.members(hint.__name__, members_of(hint))
        name, json_type = _BUILTIN[hint]
        self.add(name, "builtin", {"json-type": json_type})
        return name

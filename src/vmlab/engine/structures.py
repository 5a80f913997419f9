"""Plain data (from JSON or TOML) into the dataclasses that functions take, and back.

The annotations of a dataclass say what is right; what is wrong is named by its path. Dashes stand
in data where Python has underscores.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Final, TypeVar, Union

S = TypeVar("S")

_EXPECTED: Final = {str: "string", int: "integer", float: "number", bool: "boolean"}
_LARGEST: Final = 1 << 63
_KEY: Final = "key"


class WrongData(Exception):
    """Something in the data is missing, unexpected or of the wrong type; the message names it.

    Args:
        message: As QEMU says it.
        path: Where it is.
        value: What stands there; None for nothing.
        expected: What would be right.
    """

    def __init__(self, message: str, path: str, value: object, expected: str) -> None:
        super().__init__(message)
        self.path = path
        self.value = value
        self.expected = expected


@dataclass(frozen=True)
class Member:
    """A field of a structure, or a parameter of a function."""

    name: str
    key: str
    hint: Any
    optional: bool


def dashed(key: str) -> str:
    """The name in data of what Python calls `key`."""
    return key.rstrip("_").replace("_", "-")


def spelled(name: str) -> Any:
    """A field that is called `name` in data, where that has underscores."""
    return field(metadata={_KEY: name})


def _key_of(part: Field[Any]) -> str:
    return str(part.metadata.get(_KEY, dashed(part.name)))


def members_of(structure: type) -> tuple[Member, ...]:
    """The fields of a dataclass."""
    hints = typing.get_type_hints(structure)
    return tuple(
        Member(
            _key_of(part),
            part.name,
            hints[part.name],
            part.default is not MISSING or part.default_factory is not MISSING,
        )
        for part in fields(structure)
    )


def without_none(hint: Any) -> Any:
    """The type of what is given, of a parameter that may be None, which stands for nothing."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (given,) = [each for each in typing.get_args(hint) if each is not type(None)]
        return given
    return hint


def taken_from(members: tuple[Member, ...], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Arguments for Python of a table whose place is `path`.

    Raises:
        WrongData: something is missing, unexpected or of the wrong type.
    """
    known = {member.name for member in members}
    for name in given:
        if name not in known:
            right = f"none of that name; there are {', '.join(sorted(known)) or 'none'}"
            raise WrongData(f"Parameter '{path}{name}' is unexpected", path + name, None, right)
    taken: dict[str, Any] = {}
    for member in members:
        if member.name in given:
            hint = without_none(member.hint)
            taken[member.key] = _checked(hint, given[member.name], f"{path}{member.name}")
        elif not member.optional:
            place = path + member.name
            raise WrongData(f"Parameter '{place}' is missing", place, None, "it is needed")
    return taken


def _checked(hint: Any, value: Any, path: str) -> Any:
    """A JSON value as one of the type `hint`."""
    if hint is Any:
        return value
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise _wrong(path, value, "array")
        (element,) = typing.get_args(hint)
        return [_checked(element, each, f"{path}[{at}]") for at, each in enumerate(value)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        if not isinstance(value, str):
            raise _wrong(path, value, "string")
        values = [each.value for each in hint]
        if value not in values:
            message = f"Parameter '{path}' does not accept value '{value}'"
            raise WrongData(message, path, value, f"one of {', '.join(values)}")
        return hint(value)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(path, value, "object")
        assert isinstance(hint, type), "annotations are types"
        return hint(**taken_from(members_of(hint), value, f"{path}."))
    expected = _EXPECTED[hint]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint or (hint is int and not -_LARGEST <= value < 2 * _LARGEST):
        raise _wrong(path, value, expected)
    if hint is str and not _is_text(value):
        message = f"Parameter '{path}' is no text that a file could be named by"
        raise WrongData(message, path, value, "text without NUL and lone surrogates")
    return value


def _is_text(value: str) -> bool:
    """Whether a file system, a socket or a kernel would take it."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _wrong(path: str, value: object, expected: str) -> WrongData:
    message = f"Invalid parameter type for '{path}', expected: {expected}"
    return WrongData(message, path, value, f"a value of the type {expected}")


def as_json(value: Any) -> Any:
    """A value of those types as JSON has it; what is None in a structure is left out."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((_key_of(part), getattr(value, part.name)) for part in fields(value))
        return {name: as_json(part) for name, part in pairs if part is not None}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value


def structure(kind: type[S], data: Mapping[str, Any]) -> S:
    """The dataclass of that kind that a table describes.

    Raises:
        WrongData: something in it is missing, unexpected or of the wrong type.
    """
    return kind(**taken_from(members_of(kind), data, ""))


def described(structure: type, place: str = "") -> list[str]:
    """Every member of a dataclass, and of those in it, with its type; a line for each."""
    lines = []
    for member in members_of(structure):
        hint, name = without_none(member.hint), f"{place}{member.name}"
        if is_list := typing.get_origin(hint) is list:
            (hint,) = typing.get_args(hint)
            name += "[]"
        needed = "" if member.optional else ", needed"
        if is_dataclass(hint):
            assert isinstance(hint, type), "annotations are types"
            what = "any number of tables" if is_list else "table"
            lines += [f"{name}: {what}{needed}", *described(hint, f"{name}.")]
        elif isinstance(hint, type) and issubclass(hint, Enum):
            lines.append(f"{name}: one of {', '.join(each.value for each in hint)}{needed}")
        else:
            lines.append(f"{name}: {_EXPECTED[hint]}{needed}")
    return lines

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
    """Something in the data is missing, unexpected or of the wrong type; the message names it."""


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
            raise WrongData(f"Parameter '{path}{name}' is unexpected")
    taken: dict[str, Any] = {}
    for member in members:
        if member.name in given:
            hint = without_none(member.hint)
            taken[member.key] = _checked(hint, given[member.name], f"{path}{member.name}")
        elif not member.optional:
            raise WrongData(f"Parameter '{path}{member.name}' is missing")
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
            raise WrongData(f"Parameter '{path}' does not accept value '{value}'")
        return hint(value)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(path, "object")
        assert isinstance(hint, type), "annotations are types"
        return hint(**taken_from(members_of(hint), value, f"{path}."))
    expected = _EXPECTED[hint]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint or (hint is int and not -_LARGEST <= value < 2 * _LARGEST):
        raise _wrong(path, expected)
    return value


def _wrong(path: str, expected: str) -> WrongData:
    return WrongData(f"Invalid parameter type for '{path}', expected: {expected}")


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

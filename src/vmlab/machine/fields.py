"""The kinds of field that documents have: whole numbers, flags, names, paths, short forms.

Stricter than pydantic is by itself: `true` is no number, "2" is no number, 1 is no flag. A
specification that means something else than it says is found when it is read, not when it fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    ValidationInfo,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic.types import AllowInfNan
from pydantic_core import CoreSchema, core_schema

Whole = Annotated[int, Strict()]
"""A whole number, written as one."""

Number = Annotated[float, Strict(), AllowInfNan(False)]
"""A finite number, whole or not."""

Flag = Annotated[bool, Strict()]
"""true or false."""

LARGEST = (1 << 63) - 1
"""The largest number that every reader of TOML and JSON has to know (TOML 1.0, Integer)."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
NAME_RULE = "1 to 63 letters, digits, '.', '_' or '-', the first one a letter or a digit"
NAME = re.compile(NAME_PATTERN)


class Wrong(ValueError):
    """What a validator of a whole table says of one of its fields.

    Args:
        field: The field, seen from the table: "size", "nodes.0.cpus".
        value: What stands there.
        expected: What would be right.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class Text:
    """In `Annotated[str, Text(...)]`: text of which all has to match a pattern.

    Args:
        pattern: Regular expression, anchored at both ends.
        rule: The same in words.
    """

    def __init__(self, pattern: str, rule: str) -> None:
        self.pattern = pattern
        self.rule = rule
        self._matches = re.compile(pattern).fullmatch

    def check(self, value: object) -> object:
        """`value`, if it is such text.

        Raises:
            ValueError: the rule.
        """
        if not isinstance(value, str) or not self._matches(value):
            raise ValueError(self.rule)
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", "pattern": self.pattern}


class Shorthand:
    """In `Annotated[Table, Shorthand(...)]`: a bare value may stand for a table of one field.

    Args:
        field: The field of the table that the value is meant for.
        schema: JSON Schema of the bare value.
    """

    def __init__(self, field: str, schema: JsonSchemaValue) -> None:
        self.field = field
        self.schema = schema

    def widen(self, value: object) -> object:
        """The table that `value` is short for."""
        return {self.field: value} if isinstance(value, int | float | str) else value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.widen, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [self.schema, handler(schema)]}


DOCUMENT_DIRECTORY = "directory"
"""The key of a validation's context under which the directory of the document stands."""


def _check_path(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("the path of a file or directory of the host")
    if isinstance(value, str | Path) and info.context and DOCUMENT_DIRECTORY in info.context:
        return info.context[DOCUMENT_DIRECTORY] / value
    return value


HostPath = Annotated[Path, BeforeValidator(_check_path)]
"""A path on the host. A relative one is seen from the directory of the file that it stands in, and
from the working directory where it stands in none."""

Name = Annotated[str, Text(NAME_PATTERN, NAME_RULE)]
"""A name of a machine or of one of its parts: safe in a path, a host name and a QEMU id."""


def is_name(value: object) -> bool:
    """Whether `value` is a name as NAME_RULE says."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def one_of(known: Collection[str]) -> Callable[[object], object]:
    """A validator that accepts `known` texts and tells a close one where another stands."""

    def check(value: object) -> object:
        if isinstance(value, str) and value in known:
            return value
        raise ValueError(choice(value, known))

    return check


def choice(value: object, known: Collection[str]) -> str:
    """What would be right where `value` stands and one of `known` should: the close one, if any."""
    close = get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return "one of " + ", ".join(repr(name) for name in known) + meant

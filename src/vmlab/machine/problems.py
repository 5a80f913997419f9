"""What pydantic has to say of a document, in the words of who wrote the document.

Fields have the names that they have in the document, without the branches of pydantic's unions;
what would be right is said in plain words, without the names of Python's types.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from re import findall, fullmatch
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.fields import Wrong, choice

_SAYINGS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "bytes_type": "bytes",
    "dict_type": "a table of names and values",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "frozen_set_type": "a list",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "a table of names and values",
    "model_attributes_type": "a table of fields",
    "model_type": "a table of fields",
    "none_required": "nothing",
    "path_type": "a path, as text in quotes",
    "recursion_loop": "a table that does not hold itself",
    "set_type": "a list",
    "string_sub_type": "text in quotes",
    "string_type": "text in quotes",
    "string_unicode": "valid Unicode text",
    "tuple_type": "a list",
}
_MEASURES = {
    "greater_than": ("more than {}", "gt"),
    "greater_than_equal": ("at least {}", "ge"),
    "less_than": ("less than {}", "lt"),
    "less_than_equal": ("at most {}", "le"),
    "multiple_of": ("a multiple of {}", "multiple_of"),
    "string_too_long": ("at most {} characters", "max_length"),
    "string_too_short": ("at least {} characters", "min_length"),
    "string_pattern_mismatch": ("text like the pattern {}", "pattern"),
    "too_long": ("at most {} of them", "max_length"),
    "too_short": ("at least {} of them", "min_length"),
}

_values = reprlib.Repr()
_values.maxlevel, _values.maxlong, _values.maxother = 3, 60, 60


def invalid(
    error: ValidationError, model: type[BaseModel], *, source: str | None = None
) -> InvalidSpec:
    """The same complaint in vmlab's form: field, value, what would be right."""
    problems = described(error.errors(include_url=False), model)
    what = str(model.model_config.get("title") or _in_words(model.__name__))
    return InvalidSpec(problems, source=source, what=what)


def described(details: Sequence[Any], model: type[BaseModel]) -> list[SpecProblem]:
    """Pydantic's complaints about a `model`, as its `errors()` gave them, in vmlab's form."""
    return [_problem(detail, model) for detail in details]


def shortened(value: object, limit: int = 60) -> object:
    """`value`, or the beginning of its text when that is long."""
    if isinstance(value, str):
        return value if len(value) <= limit else value[: limit - 3] + "..."
    if value is None or isinstance(value, int | float):
        return value
    try:
        text = _values.repr(value)
    except (RecursionError, ValueError):
        # Nested too deeply, or holding a number that is too long to be written.
        return f"a {type(value).__name__}"
    return _Abridged(text[:limit]) if "..." in text or len(text) > limit else value


class _Abridged:
    """The beginning of a value's text, which is shown without quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _problem(detail: Any, model: type[BaseModel]) -> SpecProblem:
    """One of pydantic's complaints."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    location, candidates = _located(model, detail["loc"])
    if kind == "missing":
        return SpecProblem(_field(location), None, "this field has to be given")
    if kind == "union_tag_not_found":
        field = _field([*location, _plain_tag(context)])
        return SpecProblem(field, None, choice(None, _tags(candidates, _plain_tag(context))))
    if kind == "union_tag_invalid":
        tag = _plain_tag(context)
        value = value.get(tag) if isinstance(value, Mapping) else context.get("tag")
        expected = choice(value, _tags(candidates, tag))
        return SpecProblem(_field([*location, tag]), shortened(value), expected)
    wrong = context.get("error")
    if isinstance(wrong, Wrong):
        field = _field([*location, *wrong.field.split(".")])
        return SpecProblem(field, shortened(wrong.value), wrong.expected)
    if kind == "extra_forbidden":
        # Its name may look like anything, also like the branch of a union.
        unknown = detail["loc"][-1]
        location, candidates = _located(model, detail["loc"][:-1])
        location, expected = [*location, unknown], _unknown_field(unknown, candidates)
    elif kind in {"literal_error", "enum"}:
        expected = choice(value, findall(r"'([^']*)'", str(context.get("expected", ""))))
    elif kind == "tuple_type" and isinstance(value, Mapping):
        expected = f"a list; in TOML each of its tables begins with [[{_field(location)}]]"
    elif kind in _MEASURES:
        words, measure = _MEASURES[kind]
        limit = context[measure]
        expected = words.format(f"{limit:g}" if isinstance(limit, float) else limit)
    else:
        expected = _SAYINGS.get(kind, detail["msg"].removeprefix("Value error, "))
    return SpecProblem(_field(location), shortened(value), expected)


def _plain_tag(context: Mapping[str, Any]) -> str:
    return str(context["discriminator"]).strip("'")


def _tags(candidates: Sequence[Any], tag: str) -> list[str]:
    """The values that the field `tag` has in the members of a union."""
    fields = [one.model_fields.get(tag) for one in candidates if _is_model(one)]
    return [str(field.default) for field in fields if field is not None]


def _located(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[int | str], list[Any]]:
    """Where a complaint is: its path in the document, and the types that may stand there."""
    path: list[int | str] = []
    candidates: list[Any] = [model]
    for part in loc:
        kept, candidates = _step(candidates, part)
        if kept:
            path.append(part)
    return path, candidates


def _step(candidates: list[Any], part: int | str) -> tuple[bool, list[Any]]:
    """Whether `part` of a location stands in the document, and the types that come below it."""
    models = [one for one in candidates if _is_model(one)]
    if len(models) > 1:
        for one in models:
            if any(field.default == part for field in one.model_fields.values()):
                return False, [one]
    for one in models:
        for called, field in one.model_fields.items():
            if part == (field.alias or called):
                return True, _types_in(field.annotation)
    if part == "[key]":
        return False, candidates
    for one in candidates:
        arguments = get_args(one)
        if get_origin(one) is dict:
            return True, _types_in(arguments[1])
        if arguments and isinstance(part, int):
            return True, _types_in(arguments[0])
    wrapper = not models and str(part).startswith("function-")
    return not (wrapper or len(candidates) > 1), []


def _types_in(annotation: Any) -> list[Any]:
    """The members of a union, or the one type that an annotation is."""
    if get_origin(annotation) is Annotated:
        return _types_in(get_args(annotation)[0])
    if get_origin(annotation) in {Union, UnionType}:
        return [one for member in get_args(annotation) for one in _types_in(member)]
    return [] if annotation is type(None) else [annotation]


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def _unknown_field(name: int | str, candidates: Sequence[Any]) -> str:
    """What to say of a field that the tables which may stand there do not have."""
    known = [
        field.alias or called
        for one in candidates
        if _is_model(one)
        for called, field in one.model_fields.items()
    ]
    close = get_close_matches(str(name), known, n=1)
    if close:
        return f"no such field; did you mean {close[0]!r}?"
    return "no such field" + (f"; there are {', '.join(dict.fromkeys(known))}" if known else "")


def _field(location: Sequence[int | str]) -> str:
    """A location as text; keys that are no names are quoted."""
    parts = (
        str(part) if fullmatch(r"[\w-]+", str(part)) else repr(shortened(str(part)))
        for part in location
    )
    return ".".join(parts) or "document"


def _in_words(name: str) -> str:
    """The name of a class in words: "FaultSchedule" is a "fault schedule"."""
    return " ".join(findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name)).lower()

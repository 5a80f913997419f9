"""Reading TOML and JSON documents into models, with errors that a person can act on.

Every problem of a document is reported at once: file, field, value, what would be right.
"""

from __future__ import annotations

import json
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vmlab.machine.errors import InvalidSpec, SpecProblem

M = TypeVar("M", bound=BaseModel)


def read_document(model: type[M], source: Path) -> M:
    """The `model` that a TOML or JSON file holds; `.json` is JSON, anything else TOML.

    Raises:
        InvalidSpec: the file cannot be read, is not TOML or JSON, or has wrong fields.
    """
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = SpecProblem("file", str(source), f"a readable UTF-8 file ({reason})")
        raise InvalidSpec([problem], source=str(source), hint="check the path") from error
    form = "json" if source.suffix == ".json" else "toml"
    return parse_document(model, text, form=form, source=str(source))


def parse_document(
    model: type[M], text: str, *, form: str = "toml", source: str | None = None
) -> M:
    """The `model` that `text` holds, in `form` "toml" or "json".

    Raises:
        InvalidSpec: the text is not TOML or JSON, or has wrong fields.
    """
    try:
        data = json.loads(text) if form == "json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        problem = SpecProblem("document", _shorten(text), f"valid {form.upper()} ({error})")
        raise InvalidSpec([problem], source=source, hint=f"mend the {form.upper()}") from error
    return build(model, data, source=source)


def build(model: type[M], data: object, *, source: str | None = None) -> M:
    """The `model` of plain data.

    Raises:
        InvalidSpec: with one problem for each field that is wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid(error, model, source=source) from error


def invalid(
    error: ValidationError, model: type[BaseModel], *, source: str | None = None
) -> InvalidSpec:
    """The same complaint in vmlab's form: field, value, what would be right."""
    problems = []
    for detail in error.errors(include_url=False):
        location = [part for part in detail["loc"] if not _is_union_branch(part)]
        kind = detail["type"]
        value: object = detail["input"]
        expected = detail["msg"].removeprefix("Value error, ")
        if kind == "missing":
            value, expected = None, "this field has to be given"
        elif kind == "extra_forbidden":
            expected = _unknown_field(model, location)
        field = ".".join(str(part) for part in location) or "document"
        problems.append(SpecProblem(field, _shorten(value), expected))
    return InvalidSpec(problems, source=source)


def _is_union_branch(part: object) -> bool:
    """Whether pydantic put the name of a union's member into a location."""
    return isinstance(part, str) and (part.startswith("function-") or part.endswith("]"))


def _unknown_field(model: type[BaseModel], location: list[Any]) -> str:
    """What to say of a field that the model does not have."""
    known = _fields_at(model, location[:-1])
    close = get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"no such field; did you mean {close[0]!r}?"
    return "no such field" + (f"; there are {', '.join(sorted(known))}" if known else "")


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Names of the fields of the model that stands at `location` inside `model`."""
    current: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(str(part))
        current = _model_in(field.annotation) if field is not None else None
    return list(current.model_fields) if current is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model class inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _shorten(value: object, limit: int = 60) -> object:
    """`value`, or the beginning of its text when that is long."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= limit:
        return value
    return text[: limit - 3] + "..."

"""Reading TOML and JSON documents into models, with errors that a person can act on.

Every problem of a document is reported at once: file, field, value, what would be right. Whatever
stands in the document, nothing but InvalidSpec comes out.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from re import search
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.fields import DOCUMENT_DIRECTORY
from vmlab.machine.problems import invalid, shortened

__all__ = ["LARGEST_DOCUMENT", "build", "invalid", "parse_document", "read_document"]

M = TypeVar("M", bound=BaseModel)

LARGEST_DOCUMENT: Final = 16 << 20
"""Bytes of the largest document that is read; what is larger is not a specification."""


def read_document(model: type[M], source: Path) -> M:
    """The `model` that a TOML or JSON file holds; `.json` is JSON, anything else TOML.

    Raises:
        InvalidSpec: the file cannot be read, is not TOML or JSON, or has wrong fields.
    """
    try:
        with Path(source).open("rb") as file:
            data = file.read(LARGEST_DOCUMENT + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = SpecProblem("file", str(source), f"a file that can be read ({reason})")
        raise InvalidSpec([problem], source=str(source), hint="check the path") from error
    form = "json" if Path(source).suffix.lower() == ".json" else "toml"
    return parse_document(
        model, data, form=form, source=str(source), directory=Path(source).absolute().parent
    )


def parse_document(
    model: type[M],
    text: str | bytes,
    *,
    form: str = "toml",
    source: str | None = None,
    directory: Path | None = None,
) -> M:
    """The `model` that `text` holds, in `form` "toml" or "json"; bytes are UTF-8.

    Relative paths in it are seen from `directory`, or from the working directory.

    Raises:
        InvalidSpec: the text is not TOML or JSON, or has wrong fields.
    """
    if form not in {"toml", "json"}:
        raise InvalidSpec([SpecProblem("form", form, '"toml" or "json"')], source=source)
    if len(text) > LARGEST_DOCUMENT:
        expected = f"at most {LARGEST_DOCUMENT >> 20} MiB"
        problem = SpecProblem("document", f"{len(text)} bytes", expected)
        raise InvalidSpec([problem], source=source, hint="is this the right file?")
    try:
        # Editors of other systems begin a file with a byte order mark.
        text = (text.decode("utf-8") if isinstance(text, bytes) else text).removeprefix("\ufeff")
        data = _json(text) if form == "json" else tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        wrong = error.object[error.start : error.start + 4]
        problem = SpecProblem(f"line {line}", wrong, f"UTF-8 text ({error.reason})")
        raise InvalidSpec([problem], source=source, hint="save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        problem = _malformed(error, str(text), form)
        raise InvalidSpec([problem], source=source, hint=f"mend the {form.upper()}") from error
    return build(model, data, source=source, directory=directory)


def build(
    model: type[M], data: object, *, source: str | None = None, directory: Path | None = None
) -> M:
    """The `model` of plain data; relative paths in it are seen from `directory` if that is given.

    Raises:
        InvalidSpec: with one problem for each field that is wrong.
    """
    try:
        context = {DOCUMENT_DIRECTORY: directory} if directory is not None else None
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise invalid(error, model, source=source) from error
    except RecursionError as error:
        problem = SpecProblem("document", shortened(data), "tables and lists nested less deeply")
        raise InvalidSpec([problem], source=source) from error


def _json(text: str) -> Any:
    """JSON as RFC 8259 has it: Python's reader takes NaN, and the last of equal names."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} is used twice in one table")
        return found

    return json.loads(text, parse_constant=refuse, object_pairs_hook=table)


def _malformed(error: Exception, text: str, form: str) -> SpecProblem:
    """Where text is not TOML or JSON, and why."""
    if isinstance(error, RecursionError):
        return SpecProblem("document", shortened(text), "tables and lists nested less deeply")
    if isinstance(error, json.JSONDecodeError):
        line, reason = error.lineno, f"{error.msg} at column {error.colno}"
    elif found := search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error)):
        line, reason = int(found[2]), f"{found[1]} at column {found[3]}"
    elif found := search(r"^(.*) \(at end of document\)$", str(error)):
        line, reason = text.count("\n") + 1, f"{found[1]} at the end"
    else:
        # Python's words for a number too long to be read name its own settings.
        reason = "a number has too many digits" if "int_max_str" in str(error) else str(error)
        return SpecProblem("document", shortened(text), f"valid {form.upper()} ({reason})")
    lines = text.split("\n")
    there = lines[line - 1].strip() if line <= len(lines) else ""
    return SpecProblem(f"line {line}", shortened(there), f"valid {form.upper()} ({reason})")

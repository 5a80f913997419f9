"""Printing: tables for people, the same rows as JSON for programs, errors with their hint.

Results go to stdout, notes and errors to stderr, so that ``vmlab ... --json | jq`` always works.
Colours only where the stream is a terminal and neither ``--no-color`` nor ``NO_COLOR`` forbids
them (https://no-color.org). rich is imported when the first table is printed, not before.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Column",
    "JsonFlag",
    "configure",
    "console",
    "note",
    "print_error",
    "print_json",
    "print_table",
    "to_json",
]

# The one spelling of `--json` for every command that prints rows.
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print the same as JSON, for programs to read.")
]

# Wide enough that no table of ours is cut where nobody's window limits it (a pipe, a CI log).
_UNLIMITED_COLUMNS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: the rows' key, the title above it, and how it lies."""

    key: str
    title: str
    justify: Literal["left", "right", "center"] = "left"
    style: str | None = None
    no_wrap: bool = False


@dataclasses.dataclass(slots=True)
class _Settings:
    color: bool = True
    verbose: int = 0


_settings = _Settings()


def configure(*, color: bool, verbose: int) -> None:
    """Take the global options: `verbose` 0 shows warnings, 1 what is done, 2 every detail."""
    _settings.color = color
    _settings.verbose = verbose
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logger = logging.getLogger("vmlab")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout (or stderr) that keeps to the global options."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream,
        no_color=True if not _settings.color else None,
        width=None if stream.isatty() else _UNLIMITED_COLUMNS,
        highlight=False,
        emoji=False,
    )


def print_table(
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, object]],
    *,
    as_json: bool,
    title: str | None = None,
    empty: str = "nothing to show",
) -> None:
    """Print `rows` as a table, or as one JSON array with everything the rows hold.

    Args:
        columns: Which keys the table shows, in order; a key that a row lacks shows as "-".
        rows: One mapping per row, with the values themselves: numbers, lists, None.
        as_json: The command's ``--json``.
        title: Printed above the table.
        empty: Printed instead of a table without rows; JSON prints ``[]``.
    """
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        print(empty)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(
        title=title,
        title_justify="left",
        # In a pipe, only words: a rule as wide as the longest hint says nothing there.
        box=box.SIMPLE_HEAD if out.is_terminal else None,
        padding=(0, 2 if not out.is_terminal else 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        table.add_column(
            column.title, justify=column.justify, style=column.style, no_wrap=column.no_wrap
        )
    for row in rows:
        # Text, not str: a "[" in somebody's machine name is no markup.
        table.add_row(*(Text(_cell(row.get(column.key))) for column in columns))
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as captured:
        out.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_json(value: object) -> None:
    """Print `value` as JSON, two spaces deep, on stdout."""
    print(to_json(value))


def to_json(value: object) -> str:
    """`value` as JSON text: models, dataclasses, enums, paths and times included.

    Raises TypeError for an object that has no JSON form.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain)


def note(message: str) -> None:
    """Tell the person at the terminal something that is not the result."""
    print(message, file=sys.stderr)


def print_error(message: str, *, hint: str | None = None, notes: Sequence[str] = ()) -> None:
    """Print ``error: ...``, a ``note: ...`` for each note, and ``hint: ...`` on stderr."""
    stream = sys.stderr
    print(f"{_paint('error:', '1;31', stream)} {message}", file=stream)
    for note in notes:
        print(f"{_paint('note:', '1', stream)} {note}", file=stream)
    if hint:
        print(f"{_paint('hint:', '1;36', stream)} {hint}", file=stream)


def _paint(text: str, code: str, stream: TextIO) -> str:
    if not _settings.color or os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def _cell(value: object) -> str:
    """How a value reads in a table."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}"
        case enum.Enum():
            return str(value.value)
        case Mapping():
            return ", ".join(f"{key}={_cell(item)}" for key, item in value.items()) or "-"
        case list() | tuple() | set() | frozenset():
            items = (
                sorted(map(_cell, value))
                if isinstance(value, set | frozenset)
                else map(_cell, value)
            )
            return ", ".join(items) or "-"
        case _:
            return str(value)


def _plain(value: object) -> object:
    """What JSON has instead of `value`; json.dumps asks for what it does not know itself."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")

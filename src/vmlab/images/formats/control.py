"""Debian's control files: paragraphs of `Field: value`, deb822(5).

Shared by package control files, Release files and apt's `.sources` files.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmlab.images.errors import FormatError


def paragraph(text: str, *, source: str) -> dict[str, str]:
    """The fields of the first paragraph of `text`; names keep their case, values their lines.

    Raises:
        FormatError: a line is neither a field nor a continuation, or a field comes twice.
    """
    for fields in paragraphs(text, source=source):
        return fields
    return {}


def paragraphs(text: str, *, source: str) -> Iterator[dict[str, str]]:
    """The paragraphs of `text`, one after the other.

    Raises:
        FormatError: a line is neither a field nor a continuation, or a field comes twice.
    """
    fields: dict[str, list[str]] = {}
    last: list[str] | None = None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield _joined(fields)
            fields, last = {}, None
        elif line[0] in " \t":
            if last is None:
                raise FormatError(f"{source} line {number} continues a field that never began")
            last.append(line[1:])
        else:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip() or " " in name:
                raise FormatError(f"{source} line {number} is not 'Field: value': {line[:80]!r}")
            if name in fields:
                raise FormatError(f"{source} line {number} has the field {name!r} twice")
            last = fields[name] = [value.strip()]
    if fields:
        yield _joined(fields)


def _joined(fields: dict[str, list[str]]) -> dict[str, str]:
    return {name: "\n".join(lines) for name, lines in fields.items()}

"""The report as JSON: the document of record, `vmlab.report/1`, with its published schema.

Reading refuses what it cannot trust: another format or version, a field of the wrong kind, totals
and outcomes that the tests do not bear out. Fields that this version does not know are ignored.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from vmlab.machine.errors import VmlabError
from vmlab.report.journal import REPORT, has_journal, read_journals
from vmlab.report.model import SCHEMA, Run, schema

__all__ = ["parse", "read_run", "render", "render_schema"]


def render(run: Run) -> bytes:
    """`run` as an indented JSON document in UTF-8, with a newline at its end."""
    return run.model_dump_json(indent=1).encode() + b"\n"


def render_schema() -> bytes:
    """The JSON Schema as it is published, in UTF-8."""
    return json.dumps(schema(), indent=2, ensure_ascii=False).encode() + b"\n"


def parse(data: bytes | str, *, source: str = "report") -> Run:
    """The run that a JSON document states; `source` names the document in errors.

    Raises:
        VmlabError: It is no JSON, no report of this version, or contradicts itself; the message
            names each field that is wrong, up to five.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise VmlabError(
            f"{source} is not JSON: {error}",
            hint="it may be torn; the run's directory can be read even then",
        ) from error
    stated = document.get("schema") if isinstance(document, dict) else None
    if stated != SCHEMA:
        raise VmlabError(
            f"{source} is not a report that can be read here: schema = {stated!r}, not {SCHEMA!r}",
            hint="another version of vmlab wrote it, or it is another kind of document",
        )
    try:
        return Run.model_validate(document, extra="ignore")
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [
            f"  {'.'.join(str(part) for part in problem['loc']) or 'report'}: "
            f"{problem['msg'].removeprefix('Value error, ')}{_value(problem['input'])}"
            for problem in problems[:5]
        ]
        if len(problems) > len(lines):
            lines.append(f"  and {len(problems) - len(lines)} more")
        raise VmlabError(
            f"{source} is not a valid report:\n" + "\n".join(lines),
            hint="it was changed after it was written, or its writer is broken: do not trust it",
        ) from error


def _value(value: object) -> str:
    return f" (it is {value!r})" if isinstance(value, str | int | float | bool) else ""


def read_run(path: Path | str) -> Run:
    """The run in `path`: a report file, or a run's directory, finished or not.

    A directory's `report.json` is read where there is one, else its journals.

    Raises:
        VmlabError: There is no run, or its report cannot be trusted.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / REPORT).exists() and has_journal(path):
            return read_journals(path)
        path = path / REPORT
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VmlabError(
            f"cannot read a report from {path}: {error.strerror or error}",
            hint="name the directory of a run, or its report.json",
        ) from error
    return parse(data, source=str(path))

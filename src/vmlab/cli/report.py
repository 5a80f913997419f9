"""``vmlab report``: a run's results on the terminal, in other formats, against another run's."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    from vmlab.report import Run
    from vmlab.report.difference import Difference, TestChange
    from vmlab.report.shelf import RunSummary

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

_Report = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]",
        help="A run's directory, its report.json, or a directory of runs, whose last is meant; "
        "your own last run, if left out. A run that was killed can be read too.",
        show_default=False,
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write it there, not to stdout."),
]
_Force = Annotated[bool, typer.Option("--force", "-f", help="Replace FILE if it exists.")]


@app.callback()
def report() -> None:
    """Read a run's results: on the terminal, as a page, for other programs, against another run.

    A run that died is read as far as it got: what had not ended is pending.
    """


def _read(path: Path | None) -> tuple[Run, Path]:
    """The run, and its directory."""
    from vmlab.report import read_run
    from vmlab.report.place import find_report

    found = find_report(path)
    return read_run(found), found if found.is_dir() else found.parent


@app.command()
def show(
    report: _Report = None,
    *,
    as_json: output.JsonFlag = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 unless the run passed.")
    ] = False,
) -> ExitCode:
    """Show a run: sums, what is wrong and on which machines, what was skipped and why."""
    run, _ = _read(report)
    if as_json:
        _print(_document(run, "json"))
    elif output.console().no_color:
        _print(_document(run, "text"))
    else:
        from vmlab.report import show as print_run

        print_run(run)
    return ExitCode.FAILED if check and not run.outcome.ok else ExitCode.OK


@app.command()
def html(report: _Report = None, to: _Output = None, force: _Force = False) -> None:
    """Write one HTML page that needs no network: filter, search, timelines, consoles, charts."""
    _write(report, "html", to, force=force)


@app.command()
def junit(report: _Report = None, to: _Output = None, force: _Force = False) -> None:
    """Write JUnit XML, which every CI system reads."""
    _write(report, "junit", to, force=force)


@app.command()
def ctrf(report: _Report = None, to: _Output = None, force: _Force = False) -> None:
    """Write the Common Test Report Format (https://ctrf.io)."""
    _write(report, "ctrf", to, force=force)


@app.command()
def json(report: _Report = None, to: _Output = None, force: _Force = False) -> None:
    """Write the whole report as JSON, vmlab.report/1 (`vmlab schema report`)."""
    _write(report, "json", to, force=force)


@app.command()
def results(report: _Report = None, to: _Output = None, force: _Force = False) -> None:
    """Write a short JSON document of sums: counts by suite, metrics, success rate."""
    _write(report, "results", to, force=force)


def _document(run: Run, format: str) -> bytes:
    from vmlab.report import find_writer

    return find_writer(Path(), format).document(run)


def _print(document: bytes) -> None:
    sys.stdout.buffer.write(document)


def _write(report: Path | None, format: str, to: Path | None, *, force: bool) -> None:
    from vmlab.report import find_writer, write_atomically

    run, directory = _read(report)
    writer = find_writer(Path(), format)
    if to is None:
        _print(writer.document(run, directory=directory))
        return
    if to.exists() and not force:
        raise VmlabError(
            f"{to} exists already", hint="name another file, or replace it with --force"
        )
    write_atomically(to, writer.document(run, to, directory))
    output.note(f"wrote {to}")


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A run, as for `show`.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The run to compare with it.")],
    *,
    as_json: output.JsonFlag = False,
) -> ExitCode:
    """Say what is different in run B: outcomes, tests that are new or gone, metrics that moved.

    Exits with 1 if something got worse: a test that was ok is not or is gone, a new one is not
    ok, or a metric got worse for certain. `vmlab baseline compare` compares several runs.
    """
    from vmlab.report.difference import difference

    first, second = _read(before)[0], _read(after)[0]
    found = difference(first, second)
    if as_json:
        output.print_json({"a": first.id, "b": second.id, **_difference(found)})
    else:
        _show_difference(found)
    return ExitCode.FAILED if found.worse else ExitCode.OK


_Place = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIRECTORY]",
        help="A directory of runs; your own, if left out.",
        show_default=False,
    ),
]


@app.command("list")
def list_runs(
    place: _Place = None,
    *,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="How many of the newest are told.")
    ] = 20,
    as_json: output.JsonFlag = False,
) -> None:
    """List runs, the newest first, with how they ended."""
    from itertools import islice

    from vmlab.machine.places import reports_directory
    from vmlab.report.shelf import run_directories, summarize

    runs = [summarize(path) for path in islice(run_directories(place), limit)]
    rows = [_run_row(run, as_json=as_json) for run in runs]
    columns = [
        output.Column("name", "RUN", no_wrap=True),
        output.Column("outcome", "OUTCOME"),
        output.Column("tests", "TESTS", justify="right"),
        output.Column("bad", "NOT OK", justify="right"),
        output.Column("took", "TOOK", justify="right"),
        output.Column("tool", "TOOL"),
        output.Column("problem", ""),
    ]
    where = place or reports_directory()
    output.print_table(columns, rows, as_json=as_json, empty=f"there is no run in {where}")


def _run_row(run: RunSummary, *, as_json: bool) -> dict[str, object]:
    from vmlab.report.model import Outcome

    bad = sum(count for outcome, count in run.counts.items() if not Outcome(outcome).ok)
    row: dict[str, object] = {**dataclasses.asdict(run), "bad": bad}
    if as_json:
        return row
    if run.problem:
        return {"name": run.name, "problem": run.problem}
    return {**row, "took": "did not end" if run.took is None else f"{run.took:.1f} s"}


@app.command()
def prune(
    place: _Place = None,
    *,
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="How many of the newest stay, whatever their age.")
    ] = 20,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than",
            metavar="TIME",
            help='Only runs that began longer ago, such as "30d" or "12h".',
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be removed, and remove nothing.")
    ] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Remove old runs: their reports with all consoles and other files.

    A run that has not ended stays, and so does the last one.
    """
    from vmlab.cli.given import duration
    from vmlab.report.shelf import throw_away

    older = duration("--older-than", older_than, command="report prune")
    gone = throw_away(place, keep=keep, older=older, dry_run=dry_run)
    if as_json:
        output.print_json({"dry_run": dry_run, "runs": [str(path) for path in gone]})
        return
    for path in gone:
        print(path)
    output.note(f"{len(gone)} {'run' if len(gone) == 1 else 'runs'} {'would be ' * dry_run}removed")


def _difference(found: Difference) -> dict[str, object]:
    def tests(changes: Sequence[TestChange]) -> list[dict[str, object]]:
        return [{**vars(change), "worse": change.worse} for change in changes]

    return {
        "worse": found.worse,
        "changed": tests(found.changed),
        "appeared": tests(found.appeared),
        "vanished": tests(found.vanished),
        "unchanged": found.unchanged,
        "metrics": [{**vars(metric.metric), **vars(metric.comparison)} for metric in found.metrics],
    }


def _show_difference(found: Difference) -> None:
    from vmlab.report import escape_controls

    def row(change: TestChange) -> dict[str, object]:
        reason = change.reason.strip().partition("\n")[0]
        return {
            "test": escape_controls(change.id),
            "before": change.before,
            "after": change.after,
            "verdict": "worse" if change.worse else "",
            "reason": escape_controls(reason),
        }

    rows = [row(change) for change in (*found.changed, *found.appeared, *found.vanished)]
    columns = [
        output.Column("test", "TEST"),
        output.Column("before", "A"),
        output.Column("after", "B"),
        output.Column("verdict", ""),
        output.Column("reason", "REASON"),
    ]
    output.print_table(columns, rows, as_json=False, empty="no outcome changed")
    print("1 test" if found.unchanged == 1 else f"{found.unchanged} tests", "ended as before")
    if not found.metrics:
        return
    from vmlab.cli.figures import COLUMNS, figures

    print()
    moved = [figures(change.metric, change.comparison) for change in found.moved]
    output.print_table(COLUMNS, moved, as_json=False, empty="no metric moved")

"""``vmlab clean``: removes what dead runs left on this host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from vmlab.hypervisors.reaper import ReapItem, ReapReport

__all__ = ["clean"]

_COLUMNS = (
    output.Column("run", "run"),
    output.Column("kind", "what"),
    output.Column("subject", "where"),
    output.Column("outcome", "outcome"),
)

_DONE = {"kill": "killed", "unmount": "unmounted", "remove": "removed"}


def clean(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be removed, and remove nothing.")
    ] = False,
    as_json: output.JsonFlag = False,
) -> ExitCode:
    """Remove what dead runs left: processes, mounts, sockets, files.

    Runs that are alive and stores are left alone. Every run does the same when it begins.
    """
    from vmlab.hypervisors.ownership import Home
    from vmlab.hypervisors.reaper import reap_dead_runs

    report = reap_dead_runs(Home.open(), dry_run=dry_run)
    if as_json:
        output.print_json(_record(report))
    else:
        rows = [
            {**_fields(item), "subject": item.subject, "outcome": _outcome(item, dry_run)}
            for item in report.items
        ]
        output.print_table(_COLUMNS, rows, as_json=False, empty="nothing to clean")
        print(_summary(report))
    return ExitCode.CANNOT if report.failed else ExitCode.OK


def _fields(item: ReapItem) -> dict[str, object]:
    return {
        "run": item.run,
        "kind": item.kind,
        "action": item.action,
        "path": item.path,
        "pid": item.pid,
        "error": item.error,
    }


def _record(report: ReapReport) -> dict[str, object]:
    """The report as data."""
    return {
        "home": report.home,
        "dry_run": report.dry_run,
        "dead": report.dead,
        "live": report.live,
        "items": [_fields(item) for item in report.items],
    }


def _outcome(item: ReapItem, dry_run: bool) -> str:
    if item.error is not None:
        return f"failed: {item.error}"
    return f"would be {_DONE[item.action]}" if dry_run else _DONE[item.action]


def _summary(report: ReapReport) -> str:
    cleared = "would be cleared" if report.dry_run else "cleared"
    text = f"{_count(len(report.dead), 'dead run')} {cleared}, {len(report.live)} alive"
    if report.failed:
        text += f"; {_count(len(report.failed), 'thing')} could not be removed"
    return f"{text} ({report.home})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""``vmlab baseline``: what runs measured, kept under a name, and compared with other runs."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmlab.report import Run
    from vmlab.report.difference import MetricChange
    from vmlab.report.history import RunSamples
    from vmlab.report.interleaved import Turn

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The baseline.", show_default=False)]


@app.callback()
def baseline() -> None:
    """Keep what runs measured under a name, and tell whether other runs are better or worse.

    One run is one sample of each metric: below four runs on each side nothing can be told. The
    file is `vmlab/history.sqlite` in the user's data directory, or what VMLAB_HISTORY names.
    """


@app.command()
def save(
    name: _Name,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs, as for `vmlab report show`.")
    ],
    *,
    note: Annotated[str, typer.Option(help="A line for people.")] = "",
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a baseline of that name.")
    ] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Keep what these runs measured as a baseline."""
    from vmlab.report.history import History

    with History() as history:
        saved = history.save(name, _read(runs), note=note, replace=force)
    if as_json:
        output.print_json(saved)
    else:
        counted = "1 run" if len(saved.runs) == 1 else f"{len(saved.runs)} runs"
        print(f"baseline {saved.name}: {counted}")


@app.command("list")
def list_(*, as_json: output.JsonFlag = False) -> None:
    """List the baselines."""
    from vmlab.report.history import History

    with History() as history:
        rows = [{**vars(each), "count": len(each.runs)} for each in history.baselines()]
    columns = [
        output.Column("name", "NAME"),
        output.Column("count", "RUNS", justify="right"),
        output.Column("created", "CREATED"),
        output.Column("note", "NOTE"),
    ]
    output.print_table(columns, rows, as_json=as_json, empty="there is no baseline")


@app.command()
def remove(name: _Name, *, as_json: output.JsonFlag = False) -> None:
    """Remove a baseline, and the runs that no other baseline has."""
    from vmlab.report.history import History

    with History() as history:
        history.remove(name)
    if as_json:
        output.print_json({"removed": name})
    else:
        print(f"removed baseline {name}")


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME RUN... | -- COMMAND-A -- COMMAND-B",
            help="A baseline and runs to compare with it; or, with --run, two commands.",
        ),
    ],
    *,
    run: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Run two commands N times each, in turn, and compare them."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="What the order of the runs is drawn from; made up if left out."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the reports of --run there, in a new directory."),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="How often equal things may be called different."),
    ] = 0.05,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, metavar="SHARE", help="Smaller shifts of the median do not matter."),
    ] = 0.05,
    as_json: output.JsonFlag = False,
) -> ExitCode:
    """Tell whether runs are better or worse than a baseline, or one command than another.

    A verdict is better, worse, same, different (of a metric that gets neither better nor worse)
    or cannot tell. Exits with 1 if a metric got worse for certain, not if it cannot be told.

    Two commands run in turn, so that what the host does meanwhile happens to both. `{report}` in
    a command becomes a directory for its report; without it pytest and `vmlab test` are told:

        vmlab baseline compare --run 8 -- vmlab test old/ -- vmlab test new/
    """
    from vmlab.report.baseline import any_worse, compare_runs

    if run is None:
        before, after = _baseline_and_runs(words)
        facts: dict[str, object] = {}
    else:
        seed = secrets.randbelow(1 << 32) if seed is None else seed
        before, after = _interleaved(_two_commands(words), run, seed, keep)
        facts = {"seed": seed}
    changes = compare_runs(before, after, alpha=alpha, tolerance=tolerance)
    worse = any_worse(changes)
    if as_json:
        output.print_json({**facts, **_record(before, after, changes), "worse": worse})
    else:
        _show(before, after, changes)
    return ExitCode.FAILED if worse else ExitCode.OK


def _read(paths: Sequence[Path]) -> list[Run]:
    from vmlab.report import read_run
    from vmlab.report.place import find_report

    return [read_run(find_report(path)) for path in paths]


def _baseline_and_runs(words: Sequence[str]) -> tuple[list[RunSamples], list[RunSamples]]:
    from vmlab.report.history import History, samples_of_run

    if "--" in words:
        raise typer.BadParameter("commands are run with --run N", param_hint="'--'")
    name, *paths = words
    if not paths:
        raise typer.BadParameter(f"name runs to compare with {name!r}", param_hint="RUN")
    with History() as history:
        before = history.samples(name)
    return before, [samples_of_run(each) for each in _read([Path(path) for path in paths])]


def _two_commands(words: Sequence[str]) -> tuple[list[str], list[str]]:
    if words.count("--") == 1:
        middle = words.index("--")
        first, second = list(words[:middle]), list(words[middle + 1 :])
        if first and second:
            return first, second
    raise typer.BadParameter(
        "--run takes two commands: compare --run N -- COMMAND-A -- COMMAND-B",
        param_hint="COMMAND",
    )


@contextmanager
def _place(keep: Path | None) -> Iterator[Path]:
    from vmlab.machine.errors import VmlabError

    if keep is None:
        with tempfile.TemporaryDirectory(prefix="vmlab-compare-") as directory:
            yield Path(directory)
        return
    try:
        keep.mkdir(parents=True)
    except OSError as error:
        raise VmlabError(
            f"cannot make {keep}: {error.strerror or error}",
            hint="--keep names a directory that does not exist yet",
        ) from error
    yield keep


def _interleaved(
    commands: tuple[list[str], list[str]], rounds: int, seed: int, keep: Path | None
) -> tuple[list[RunSamples], list[RunSamples]]:
    from vmlab.report.interleaved import interleave

    def told(turn: Turn) -> None:
        status = "" if turn.status == 0 else f", exit status {turn.status}"
        which = "AB"[turn.side]
        output.note(f"round {turn.round} of {rounds}, {which}: {turn.seconds:.2f} s{status}")

    output.note(f"{rounds} runs of each, in an order drawn from --seed {seed}")
    with _place(keep) as directory:
        return interleave(commands, rounds, directory=directory, seed=seed, on_turn=told)


def _failed(runs: Sequence[RunSamples]) -> int:
    return sum(1 for each in runs if each.outcome in ("fail", "error", "pending"))


def _record(
    before: Sequence[RunSamples], after: Sequence[RunSamples], changes: Sequence[MetricChange]
) -> dict[str, object]:
    def side(runs: Sequence[RunSamples]) -> dict[str, object]:
        return {"runs": [each.id for each in runs], "not_ok": _failed(runs)}

    return {
        "a": side(before),
        "b": side(after),
        "metrics": [{**vars(each.metric), **vars(each.comparison)} for each in changes],
    }


def _show(
    before: Sequence[RunSamples], after: Sequence[RunSamples], changes: Sequence[MetricChange]
) -> None:
    from vmlab.cli.figures import COLUMNS, figures

    rows = [figures(each.metric, each.comparison) for each in changes]
    output.print_table(COLUMNS, rows, as_json=False, empty="both sides measured nothing in common")
    for name, runs in (("A", before), ("B", after)):
        if failed := _failed(runs):
            output.note(f"warning: {failed} of {len(runs)} runs of {name} did not pass")

"""`vmlab test`: runs tests with machines, in Python and in plan files, and says what came of it."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    from vmlab.cli.test_story import Story
    from vmlab.report import Run

__all__ = ["app", "test"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_TALKING: Final = re.compile(
    r"--(pdb|trace|vm-sit|capture=no|co|collect-only|help|version|markers|fixtures(-per-test)?|"
    r"setup-plan|debug|cache-show)(=.*)?|-s|-h|-V|--pdbcls=.*"
)
"""Options with which pytest talks to a person, and gets the terminal to itself."""

_SECTION: Final = re.compile(rb"^([=!])\1{2,} (.*?) \1{3,}\s*$", re.MULTILINE)
_STARTS: Final = b"test session starts"
_OURS: Final = re.compile(rb"^-{3,} vmlab -{3,}.*", re.MULTILINE | re.DOTALL)
_MOST_HELD: Final = 64 << 20

# What pytest's exit status means: https://docs.pytest.org/en/stable/reference/exit-codes.html
_FAILED, _INTERRUPTED, _INTERNAL, _USAGE, _NOTHING = 1, 2, 3, 4, 5


@app.command("test", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def test(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATHS] [OPTIONS OF PYTEST]",
            help="Files and directories with tests and *.vmlab.toml, and whatever pytest takes.",
        ),
    ] = None,
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON; progress stays on stderr.")
    ] = False,
) -> int:
    """Run tests with machines: Python's and plan files (*.vmlab.toml).

    Every option of pytest's works, also those of vmlab's plugin: `vmlab test -k boot
    --vm-hypervisor qemu -n 2`. With --pdb, -s or --vm-sit pytest has the terminal to itself.
    """
    if find_spec("pytest") is None:
        raise VmlabError(
            "tests are run by pytest, which is not installed", hint="pip install 'vmlab[test]'"
        )
    given = arguments or []
    _refuse_missing(given)
    if not as_json and any(_TALKING.fullmatch(word) for word in given):
        from vmlab.cli.test_child import run_in_foreground

        status, number = run_in_foreground(given)
        return 128 + number if number is not None else _exit_code(status, [])
    return _watched(given, as_json=as_json)


def _refuse_missing(arguments: Sequence[str]) -> None:
    """A path that is not there is told before pytest is started for nothing.

    Raises:
        BadParameter: the first word is no path, and cannot be an option's value.
    """
    if not arguments or arguments[0].startswith("-"):
        return
    path = arguments[0].partition("::")[0]
    if not Path(path).exists() and "--pyargs" not in arguments:
        raise typer.BadParameter(f"there is no file or directory {path!r}", param_hint="PATHS")


def _watched(arguments: Sequence[str], *, as_json: bool) -> int:
    """Run pytest, show its progress, and tell what came of it."""
    from vmlab.cli.test_child import PytestChild
    from vmlab.cli.test_display import shown
    from vmlab.cli.test_story import Story

    said = bytearray()
    with shown() as display:
        story = Story(display.news)

        def printed(stream: str, data: bytes) -> None:
            if stream == "stderr":
                display.printed(data.decode("utf-8", "backslashreplace"))
            else:
                said.extend(data[: max(0, _MOST_HELD - len(said))])

        def turn() -> None:
            story.turn()
            display.turn(story)

        child = PytestChild(arguments, on_event=story.event, on_output=printed, on_turn=turn)
        status = child.run()
        turn()
    run = _run_of(story)
    if as_json:
        output.print_json(_record(story, run, status))
    else:
        _print_told(bytes(said), everything=status in {_INTERNAL, _USAGE})
        _print_summary(story, run)
    if child.interrupted is not None:
        output.note(_where("interrupted: what was found until then is in", story))
        return 128 + child.interrupted
    if status < 0:
        raise VmlabError(
            f"pytest was ended by signal {-status} ({signal.Signals(-status).name})",
            hint=_where("results so far are in", story) + "; `vmlab clean` clears what is left",
        )
    return _exit_code(status, story.wrong)


def _exit_code(status: int, wrong: Sequence[str]) -> int:
    """vmlab's exit status for pytest's."""
    if status == _INTERRUPTED:
        # pytest calls it an interruption, too, when files cannot be collected.
        return ExitCode.USAGE if wrong else ExitCode.INTERRUPTED
    known = {
        0: ExitCode.OK,
        _FAILED: ExitCode.FAILED,
        _INTERNAL: ExitCode.INTERNAL,
        _USAGE: ExitCode.USAGE,
    }
    if status == _NOTHING:
        output.print_error(
            "no test was found",
            hint="tests are in test_*.py and in *.vmlab.toml; name their files or directories",
        )
        return ExitCode.USAGE
    return known.get(status, ExitCode.FAILED)


def _run_of(story: Story) -> Run | None:
    """The run's report, as far as it got; None where no test asked for a machine."""
    if story.directory is None:
        return None
    from vmlab.report import read_run

    try:
        return read_run(story.directory)
    except VmlabError as error:
        output.print_error(str(error), hint=error.hint)
        return None


def _where(words: str, story: Story) -> str:
    if story.directory is None:
        return "there is no report, since no test has asked for a machine"
    return f"{words} {story.directory}"


def _print_told(said: bytes, *, everything: bool) -> None:
    """What pytest told of failures and warnings, without its own progress and headings."""
    sections = [found for found in _SECTION.finditer(said) if found[2] != _STARTS]
    if everything:
        told = said
    elif len(sections) > 1:
        # The last line sums up what is summed up below.
        told = _OURS.sub(b"", said[sections[0].start() : sections[-1].start()])
    else:
        return
    text = told.decode("utf-8", "backslashreplace").strip("\n")
    if text:
        sys.stdout.write(text + "\n\n")
        sys.stdout.flush()


def _print_summary(story: Story, run: Run | None) -> None:
    if run is None:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(story.outcomes.items()))
        if counts:
            print(f"{counts}; no test asked for a machine")
        return
    from vmlab.report import show

    show(run)
    assert story.directory is not None
    for name in ("report.html", "report.json", "report.xml"):
        if (story.directory / name).exists():
            print(f"report: {story.directory / name}")


def _record(story: Story, run: Run | None, status: int) -> dict[str, Any]:
    """The results as data."""
    record: dict[str, Any] = {
        "pytest_status": status,
        "report": None if story.directory is None else str(story.directory),
        "not_collected": story.wrong,
    }
    if run is None:
        return {**record, "outcome": None, "counts": dict(story.outcomes), "tests": []}
    return {
        **record,
        "outcome": run.outcome,
        "seed": run.seed,
        "duration_s": run.duration_s,
        "totals": run.totals,
        "tests": [
            {
                "suite": test.suite,
                "name": test.name,
                "hypervisor": test.hypervisor,
                "outcome": test.outcome,
                "duration_s": test.duration_s,
                "reason": test.reason,
            }
            for test in run.tests()
        ],
    }

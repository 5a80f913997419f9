"""`vmlab conformance`: run the suite that every hypervisor must pass, and say what came of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError

if TYPE_CHECKING:
    from vmlab.conformance.results import CheckResult
    from vmlab.conformance.session import Session

__all__ = ["conformance"]


def conformance(
    hypervisors: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Hypervisors; several are compared."),
    ] = None,
    *,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Open the hypervisors with an option; NAME:KEY=VALUE is for one of them.",
        ),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Machines of this specification, not the built-in one."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Source of everything random.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Walk at random from N seeds instead, and ask that every failure is clean.",
        ),
    ] = 0,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only checks whose id matches, as 'snapshot.*'."),
    ] = None,
    junitxml: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results as JUnit XML.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the results as JSON (vmlab.report/1)."),
    ] = None,
    list_checks: Annotated[
        bool, typer.Option("--list", help="List the checks with their clauses and do nothing.")
    ] = False,
) -> ExitCode:
    """Run the suite that every hypervisor must pass.

    It adapts to what a hypervisor declares: a declared capability that does not work fails, one
    that works undeclared is reported, and what was skipped is listed with the reason.
    """
    if list_checks:
        return _list(select or [])
    if not hypervisors:
        raise typer.BadParameter("name at least one hypervisor", param_hint="NAME")
    from vmlab.conformance.session import Session, Settings
    from vmlab.hypervisors.ownership import Run

    options = _options(option or [])
    _require_pytest()
    # Killed at whatever moment, the next run finds and clears what this one has left.
    with Run.begin() as stay:
        settings = Settings(
            hypervisors=tuple(dict.fromkeys(hypervisors)),
            options=options,
            spec=spec,
            seed=seed,
            patterns=tuple(select or ()),
            walks=seeds,
            place=stay.owner.runtime or stay.directory,
        )
        session = Session(settings)
        command = ["vmlab", "conformance", *_again(settings.hypervisors, option, spec, seed)]
        command += [f"--select={pattern}" for pattern in settings.patterns]
        command += [f"--seeds={seeds}"] if seeds else []
        return _run(session, command, stay.directory / "report", json=json, junitxml=junitxml)


def _run(
    session: Session,
    command: Sequence[str],
    directory: Path,
    *,
    json: Path | None,
    junitxml: Path | None,
) -> ExitCode:
    from vmlab.conformance.plugin import run_suite
    from vmlab.report import show, write

    session.on_result = _progress if sys.stderr.isatty() else _tell_failure
    run = run_suite(session, directory, command)
    if json is not None:
        write(run, json, "json")
    if junitxml is not None:
        write(run, junitxml, "junit")
    show(run)
    if session.settings.walks:
        print(f"walked from seeds {session.settings.seed} to {_last_seed(session)}")
    else:
        _print_capabilities(session)
        _print_timings(session)
    if not run.outcome.ok:
        print(f"again: {shlex.join(command)}")
        return ExitCode.FAILED
    if not run.totals.passed:
        print("nothing was proven: every check was skipped")
        return ExitCode.FAILED
    return ExitCode.OK


def _last_seed(session: Session) -> int:
    return session.settings.seed + session.settings.walks - 1


def _progress(number: int, count: int, result: CheckResult) -> None:
    """One line on the terminal that is written over."""
    end = "\n" if number == count else ""
    print(f"\r\x1b[K[{number}/{count}] {result.id}", end=end, file=sys.stderr, flush=True)


def _tell_failure(number: int, count: int, result: CheckResult) -> None:
    """One line for what is wrong, at once: a long run may be worth ending then."""
    if not result.outcome.ok:
        output.note(f"[{number}/{count}] {result.id} ({result.hypervisor}): {result.reason}")


def _print_capabilities(session: Session) -> None:
    rows = []
    for standing in session.standings():
        for what, names in (
            ("proven", standing.proven),
            ("FAILED", standing.disproven),
            ("declared, not checked", standing.unproven),
            ("works, not declared", standing.undeclared_working),
            ("MISSING", standing.missing),
        ):
            if names:
                rows.append({"hypervisor": standing.hypervisor, "what": what, "names": names})
    columns = [
        output.Column("hypervisor", "HYPERVISOR", no_wrap=True),
        output.Column("what", "CAPABILITIES", no_wrap=True),
        output.Column("names", ""),
    ]
    print()
    output.print_table(columns, rows, as_json=False, empty="no capability was declared")


def _print_timings(session: Session) -> None:
    """Usual times of operations, hypervisors beside each other."""
    table = session.timings()
    if not table:
        return
    names = [subject.name for subject in session.subjects]
    columns = [output.Column("operation", "SECONDS (median)", no_wrap=True)]
    columns += [output.Column(name, name, justify="right") for name in names]
    rows = [{"operation": operation, **by_name} for operation, by_name in table.items()]
    print()
    output.print_table(columns, rows, as_json=False)


def _list(patterns: Sequence[str]) -> ExitCode:
    from vmlab.conformance.audits import AUDITS
    from vmlab.conformance.registry import select
    from vmlab.conformance.together import CLAUSE, TOGETHER

    rows: list[dict[str, object]] = [
        {"id": check.id, "clause": check.clause, "needs": [need.value for need in check.needs]}
        for check in select(patterns)
    ]
    if not patterns:
        rows.append({"id": TOGETHER, "clause": CLAUSE, "needs": ["several hypervisors"]})
        rows += [
            {"id": id_, "clause": clause, "needs": ["made after every check"]}
            for id_, clause in AUDITS.items()
        ]
    columns = [
        output.Column("id", "CHECK", no_wrap=True),
        output.Column("clause", "CLAUSE"),
        output.Column("needs", "NEEDS"),
    ]
    output.print_table(columns, rows, as_json=False, empty="no check matches")
    return ExitCode.OK


def _options(texts: Sequence[str]) -> dict[str, str]:
    """The options of the command line by key.

    Raises:
        InvalidSpec: one is not KEY=VALUE.
    """
    options = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            problem = SpecProblem("--option", text, 'KEY=VALUE, such as "profile=performance"')
            raise InvalidSpec([problem], what="command line", hint="write KEY=VALUE")
        options[key] = value
    return options


def _again(
    names: Sequence[str], options: Sequence[str] | None, spec: Path | None, seed: int
) -> list[str]:
    """The arguments that give the same run again."""
    words = [*names, *(f"--option={text}" for text in options or ())]
    if spec is not None:
        words.append(f"--spec={spec}")
    return [*words, f"--seed={seed}"]


def _require_pytest() -> None:
    try:
        import pytest  # noqa: F401  # only whether it is there
    except ImportError as error:
        raise VmlabError(
            "the conformance suite is run by pytest, which is not installed",
            hint="pip install 'vmlab[test]'",
        ) from error

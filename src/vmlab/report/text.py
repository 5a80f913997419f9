"""The report as a compact text for people: what is wrong, what was skipped and why, the sums.

Plain text into files and pipes; colours and a table through rich on a terminal. Whatever a guest
printed is shown with its control characters written out, so that it cannot command the terminal.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO

from vmlab.report.escape import escape_controls
from vmlab.report.model import Outcome, Run, Severity, Test
from vmlab.report.parts import describe_fault, describe_machine, describe_phase

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["render", "show"]

_COLUMNS: Final = (
    Outcome.PASS,
    Outcome.FAIL,
    Outcome.ERROR,
    Outcome.SKIP,
    Outcome.XFAIL,
    Outcome.PENDING,
)
_STYLES: Final = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.ERROR: "bold red",
    Outcome.SKIP: "yellow",
    Outcome.XFAIL: "yellow",
    Outcome.PENDING: "bold magenta",
}
_REASON_LINES: Final = 6
_SHOWN_TESTS: Final = 3
_SHOWN_MARKS: Final = 4  # of a machine's timeline: the end of it


@dataclass(frozen=True)
class _Note:
    """Something to tell beside the table: about one test, or about several with one reason."""

    outcome: Outcome
    title: str
    lines: tuple[str, ...]


def render(run: Run) -> bytes:
    """`run` as plain text in UTF-8."""
    lines = [_heading(run), "", *_plain_table(run)]
    for note in _notes(run):
        lines += ["", f"{note.outcome.value.upper():<8}{note.title}"]
        lines += [f"        {line}" for line in note.lines]
    lines += ["", *(f"warning: {text}" for text in _warnings(run)), *_closing(run)]
    return "".join(f"{line}\n" for line in lines).encode()


def show(run: Run, stream: TextIO | None = None) -> None:
    """Print `run` to `stream` (standard output if None), in colour if that is a terminal."""
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.write(render(run).decode())
        return
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    for part in _rich_parts(run):
        console.print(part)


def _shown(text: str) -> str:
    return escape_controls(text).replace("\n", " ").replace("\t", " ")


def _heading(run: Run) -> str:
    seed = "" if run.seed is None else f", seed {run.seed}"
    return _shown(f"{run.tool} {run.version}, run {run.id}{seed}")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _rows(run: Run) -> list[tuple[str, ...]]:
    """Head, one row for each suite, and the sums where there are several suites."""
    rows: list[tuple[str, ...]] = [
        ("suite", "tests", *(outcome.value for outcome in _COLUMNS), "time")
    ]
    sums = [(suite.name, suite.totals, suite.duration_s) for suite in run.suites]
    if len(sums) != 1:
        sums.append(("all", run.totals, sum(suite.duration_s for suite in run.suites)))
    for name, totals, seconds in sums:
        counts = [str(totals[outcome]) for outcome in _COLUMNS]
        rows.append((_shown(name), str(totals.tests), *counts, _seconds(seconds)))
    return rows


def _plain_table(run: Run) -> Iterator[str]:
    rows = _rows(run)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others])


def _reason_lines(reason: str) -> tuple[str, ...]:
    lines = [escape_controls(line) for line in reason.splitlines() if line.strip()]
    if len(lines) > _REASON_LINES:
        lines[_REASON_LINES - 1 :] = [f"... {len(lines) - _REASON_LINES + 1} more lines"]
    return tuple(lines)


def _circumstances(test: Test) -> Iterator[str]:
    """What a test that is not ok ran on, how far it came, and what was done to it."""
    for machine in test.machines:
        yield _shown(f"machine {describe_machine(machine)}")
        for mark in machine.timeline[-_SHOWN_MARKS:]:
            text = f": {mark.text}" if mark.text else ""
            yield _shown(f"    {mark.at_s:8.2f} s  {mark.kind}{text}")
    for phase in test.phases:
        yield _shown(f"phase {describe_phase(phase)}")
    for fault in test.faults:
        yield _shown(f"fault {describe_fault(fault)}")


def _notes(run: Run) -> Iterator[_Note]:
    """What is not ok, worst first; then flaky tests; then what did not run, by reason."""
    tests = list(run.tests())
    for outcome in (Outcome.ERROR, Outcome.FAIL, Outcome.PENDING):
        for test in tests:
            if test.outcome is outcome:
                spent = "" if test.duration_s is None else f"  {_seconds(test.duration_s)}"
                lines = (*_reason_lines(test.reason), *_circumstances(test))
                yield _Note(outcome, _shown(test.id) + spent, lines)
    for test in tests:
        if test.flaky and test.outcome.ok:
            story = ", then ".join(attempt.outcome.value for attempt in test.attempts)
            yield _Note(test.outcome, _shown(test.id), (f"flaky: {story}",))
    for outcome in (Outcome.SKIP, Outcome.XFAIL):
        grouped: dict[str, list[Test]] = {}
        for test in tests:
            if test.outcome is outcome:
                grouped.setdefault(test.reason, []).append(test)
        for reason, group in grouped.items():
            names = ", ".join(_shown(test.id) for test in group[:_SHOWN_TESTS])
            if len(group) > _SHOWN_TESTS:
                names += f" and {len(group) - _SHOWN_TESTS} more"
            yield _Note(outcome, names, _reason_lines(reason))


def _warnings(run: Run) -> list[str]:
    return [_shown(m.text) for m in run.messages if m.severity is not Severity.INFO]


def _sums(run: Run) -> Iterator[str]:
    """How many machines, phases and faults there were; nothing where there were none."""
    attempts = [attempt for test in run.tests() for attempt in test.attempts]
    machines = Counter(
        "/".join(filter(None, (machine.hypervisor, machine.accelerator, machine.architecture)))
        for attempt in attempts
        for machine in attempt.machines
    )
    if machines:
        kinds = ", ".join(f"{count} on {kind}" for kind, count in sorted(machines.items()))
        yield _shown(f"machines: {machines.total()} ({kinds})")
    phases = Counter(phase.outcome for attempt in attempts for phase in attempt.phases)
    if phases:
        counts = ", ".join(f"{phases[o]} {o.value}" for o in _COLUMNS if phases[o])
        yield f"phases: {phases.total()} ({counts})"
    faults = [fault for attempt in attempts for fault in attempt.faults]
    if faults:
        refused = sum(1 for fault in faults if fault.refused)
        yield f"faults: {len(faults) - refused} injected, {refused} refused"


def _closing(run: Run) -> Iterator[str]:
    yield from _sums(run)
    yield _verdict(run)
    if run.command:
        yield f"run again: {_shown(run.command_line)}"


def _verdict(run: Run) -> str:
    totals = run.totals
    counts = ", ".join(f"{totals[o]} {o.value}" for o in _COLUMNS if totals[o]) or "nothing ran"
    tests = "1 test" if totals.tests == 1 else f"{totals.tests} tests"
    duration = f"in {_seconds(run.duration_s)}" if run.finished else "so far; the run did not end"
    return f"{run.outcome.value.upper()}: {tests} ({counts}) {duration}"


def _rich_parts(run: Run) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    yield Text(_heading(run), style="bold")
    head, *rows = _rows(run)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column, column_title in enumerate(head):
        table.add_column(column_title, justify="right" if column else "left")
    for row in rows:
        cells = [Text(cell) for cell in row]
        for outcome, cell in zip(_COLUMNS, cells[2:-1], strict=True):
            cell.stylize("dim" if cell.plain == "0" else _STYLES[outcome])
        table.add_row(*cells)
    yield table
    for note in _notes(run):
        title = Text.assemble(
            (f"{note.outcome.value.upper():<8}", _STYLES[note.outcome]), note.title
        )
        yield Text("\n").join([title, *(Text(f"        {line}") for line in note.lines)])
    for warning in _warnings(run):
        yield Text(f"warning: {warning}", style="yellow")
    verdict = _verdict(run)
    for line in _closing(run):
        yield Text(line, style=_STYLES[run.outcome] if line == verdict else "dim")

"""Runs two commands in turn, several times, and reads the report that each time wrote.

Each round runs both, in an order drawn from the seed: a host that gets slower, warmer or busier
meanwhile does so for both. A command says where its report goes by `{report}`, which becomes a new
directory; without it pytest and `vmlab test` are told through `PYTEST_ADDOPTS`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmlab.machine.errors import VmlabError
from vmlab.report.difference import MetricKey
from vmlab.report.history import RunSamples, samples_of_run
from vmlab.report.journal import REPORT, has_journal
from vmlab.report.json_report import read_run
from vmlab.report.parts import Direction

__all__ = ["PLACEHOLDER", "WALL_CLOCK", "Turn", "interleave"]

PLACEHOLDER: Final = "{report}"

WALL_CLOCK: Final = MetricKey("whole command", "s", "")
"""How long the command took, which needs no report."""

_SHOWN_LINES: Final = 12
_GRACE_S: Final = 30.0
"""Seconds that an interrupted command has to clear up before it is killed."""


@dataclass(frozen=True)
class Turn:
    """One execution of one of the commands."""

    round: int
    side: int  # 0 or 1
    status: int
    seconds: float
    samples: RunSamples


def interleave(
    commands: tuple[Sequence[str], Sequence[str]],
    rounds: int,
    *,
    directory: Path,
    seed: int,
    on_turn: Callable[[Turn], None] = lambda turn: None,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[RunSamples], list[RunSamples]]:
    """Run both commands `rounds` times each.

    Args:
        commands: Two command lines, program first.
        rounds: How often each runs.
        directory: Reports and what the commands printed go there, each below `round-N-a` or `-b`.
        seed: What the order within each round is drawn from.
        on_turn: Told of each execution when it has ended.
        environment: Of the commands; this process's if None.

    Returns:
        What each run of the first command measured, and of the second, with `WALL_CLOCK`.

    Raises:
        VmlabError: A command cannot be started, or wrote no report; what it printed last is told.
    """
    dice = random.Random(seed)
    sides: tuple[list[RunSamples], list[RunSamples]] = ([], [])
    for number in range(1, rounds + 1):
        order = [0, 1]
        dice.shuffle(order)
        for side in order:
            place = directory / f"round-{number}-{'ab'[side]}"
            turn = _turn(commands[side], number, side, place, environment)
            sides[side].append(turn.samples)
            on_turn(turn)
    return sides


def _turn(
    command: Sequence[str],
    number: int,
    side: int,
    place: Path,
    environment: Mapping[str, str] | None,
) -> Turn:
    reports = place / "report"
    place.mkdir(parents=True)
    words = [word.replace(PLACEHOLDER, str(reports)) for word in command]
    variables = dict(os.environ if environment is None else environment)
    if words == list(command):
        added = f"{variables.get('PYTEST_ADDOPTS', '')} --vm-report={_quoted(str(reports))}"
        variables["PYTEST_ADDOPTS"] = added.strip()
    log = place / "output.log"
    began = time.monotonic()
    status = _run(words, variables, log)
    seconds = time.monotonic() - began
    found = _report_in(reports)
    if found is None:
        raise VmlabError(
            f"{words[0]!r} ended with status {status} and wrote no report in {reports}",
            hint=f"say in the command where its report goes with {PLACEHOLDER}, as "
            f"`pytest --vm-report {PLACEHOLDER}`; it printed:\n{_tail(log)}",
        )
    samples = samples_of_run(read_run(found))
    samples = RunSamples(
        samples.id,
        samples.outcome,
        {WALL_CLOCK: [seconds], **samples.values},
        {WALL_CLOCK: Direction.LOWER, **samples.directions},
    )
    return Turn(number, side, status, seconds, samples)


def _quoted(word: str) -> str:
    """As pytest's shlex.split takes it back."""
    import shlex

    return shlex.quote(word)


def _run(words: Sequence[str], variables: Mapping[str, str], log: Path) -> int:
    process: subprocess.Popen[bytes] | None = None
    with log.open("wb") as file:
        try:
            with _interruption_afterwards():
                process = subprocess.Popen(
                    words, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
            return process.wait()
        except OSError as error:
            raise VmlabError(
                f"cannot run {words[0]!r}: {error.strerror or error}",
                hint="name a program that is installed, and its arguments, after --",
            ) from error
        except BaseException:
            if process is not None:
                process.terminate()
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            raise


@contextmanager
def _interruption_afterwards() -> Iterator[None]:
    """Ctrl-C that comes while a process is being started comes when it is known."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _report_in(reports: Path) -> Path | None:
    """The report that was written: there, or in the one directory of a run below."""
    for place in [reports, *sorted(path for path in reports.glob("*") if not path.is_symlink())]:
        if (place / REPORT).exists() or has_journal(place):
            return place
    return reports if reports.is_file() else None


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", "backslashreplace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:]) or "    nothing"

"""Two commands in turn: real processes that write real reports."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from vmlab.machine.errors import VmlabError
from vmlab.report.interleaved import WALL_CLOCK, Turn, interleave

# Writes a report with one metric to the directory argv[1], and notes that it ran in argv[3].
WRITES = """
import sys
from pathlib import Path
from vmlab.report import Direction, Recorder
with Recorder.create(sys.argv[1], tool="t") as recorder:
    attempt = recorder.start("s", "t")
    attempt.metric("level", float(sys.argv[2]), direction=Direction.LOWER)
    attempt.finish("pass")
with Path(sys.argv[3]).open("a") as log:
    log.write(sys.argv[2] + "\\n")
"""


def _command(level: float, log: Path) -> list[str]:
    return [sys.executable, "-c", WRITES, "{report}", str(level), str(log)]


def test_both_run_once_a_round_in_an_order_that_the_seed_gives(tmp_path: Path) -> None:
    log, turns = tmp_path / "log", list[Turn]()
    a, b = interleave(
        (_command(1, log), _command(2, log)),
        3,
        directory=tmp_path / "runs",
        seed=5,
        on_turn=turns.append,
    )
    dice, expected = random.Random(5), []
    for number in (1, 2, 3):
        order = [0, 1]
        dice.shuffle(order)
        expected += [(number, side) for side in order]
    assert [(turn.round, turn.side) for turn in turns] == expected
    assert [float(line) for line in log.read_text().split()] == [side + 1 for _, side in expected]
    for level, runs in ((1, a), (2, b)):
        assert len({run.id for run in runs}) == 3
        for run in runs:
            (name,) = [key for key in run.values if key != WALL_CLOCK]
            assert (str(name), run.values[name]) == ("level", [level])
            assert run.values[WALL_CLOCK][0] > 0


def test_a_report_in_a_directory_of_its_own_below_is_found(tmp_path: Path) -> None:
    command = _command(1, tmp_path / "log")
    command[3] = "{report}/20260101T000000Z-1"
    a, _ = interleave((command, command), 1, directory=tmp_path / "runs", seed=0)
    assert len(a) == 1


def test_pytest_is_told_by_its_own_variable(tmp_path: Path) -> None:
    """As pytest takes PYTEST_ADDOPTS: split like a shell's words, here with a blank in a path."""
    script = tmp_path / "fake"
    script.write_text(
        f"#!{sys.executable}\nimport os, shlex, sys\n"
        "words = shlex.split(os.environ['PYTEST_ADDOPTS'])\n"
        "assert words[0] == '-q', words\n"
        "sys.argv[1:] = [words[1].removeprefix('--vm-report='), '1', os.devnull]\n" + WRITES
    )
    script.chmod(0o755)
    a, b = interleave(
        ([str(script)], [str(script)]),
        1,
        directory=tmp_path / "with blank",
        seed=0,
        environment={**os.environ, "PYTEST_ADDOPTS": "-q"},
    )
    assert len(a) == len(b) == 1


def test_a_command_without_a_report_says_what_it_printed(tmp_path: Path) -> None:
    silent = [sys.executable, "-c", "import sys; print('no such option'); sys.exit(4)"]
    with pytest.raises(VmlabError, match="ended with status 4 and wrote no report") as refused:
        interleave((silent, silent), 1, directory=tmp_path, seed=0)
    assert "no such option" in str(refused.value.hint)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(VmlabError, match="cannot run '/no/such/program'"):
        interleave((["/no/such/program"], ["/no/such/program"]), 1, directory=tmp_path, seed=1)


INTERRUPTED = """
import sys
from pathlib import Path
from vmlab.report.interleaved import interleave
command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
interleave((command, command), 1, directory=Path(sys.argv[1]), seed=0)
"""


def test_an_interrupt_ends_the_command_that_runs(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], stderr=subprocess.PIPE
    )
    try:
        beat = threading.Event()
        while not any("up" in log.read_text() for log in tmp_path.glob("*/output.log")):
            assert process.poll() is None
            beat.wait(0.05)
        (command,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=280)
        assert b"KeyboardInterrupt" in errors
        assert not psutil.pid_exists(command.pid)
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_while_the_command_is_just_being_started_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = subprocess.Popen, list[subprocess.Popen[bytes]]()

    class Interrupted(start):  # type: ignore[type-arg,valid-type,misc]  # the class of before
        def __init__(self, *words: object, **options: object) -> None:
            super().__init__(*words, **options)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(KeyboardInterrupt):
        interleave((command, command), 1, directory=tmp_path, seed=0)
    assert [process.returncode for process in started] == [-signal.SIGTERM]

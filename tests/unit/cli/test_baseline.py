"""``vmlab baseline``: saved, listed, compared, removed; two commands in turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.report import Direction, Recorder

WRITES = """
import sys
from vmlab.report import Direction, Recorder
with Recorder.create(sys.argv[1], tool="t") as recorder:
    attempt = recorder.start("s", "t", hypervisor="qemu")
    attempt.metric("level", float(sys.argv[2]), "s", direction=Direction.LOWER)
    attempt.finish(sys.argv[3])
"""


@pytest.fixture(autouse=True)
def _own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMLAB_HISTORY", str(tmp_path / "history.sqlite"))


def _runs(directory: Path, level: float, count: int = 5) -> list[str]:
    paths = []
    for number in range(count):
        path = directory / f"{level}-{number}"
        with Recorder.create(path, tool="t") as recorder:
            attempt = recorder.start("s", "t", hypervisor="qemu")
            attempt.metric("boot", level + number / 100, "s", direction=Direction.LOWER)
            attempt.finish("pass" if number else "fail")
        paths.append(str(path))
    return paths


def test_slower_runs_than_the_baseline_s_are_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["baseline", "save", "main", *_runs(tmp_path, 1)]) == ExitCode.OK
    assert capsys.readouterr().out == "baseline main: 5 runs\n"
    slower = _runs(tmp_path, 2)
    assert main(["baseline", "compare", "main", *slower]) == ExitCode.FAILED
    shown = capsys.readouterr()
    (line,) = [line for line in shown.out.splitlines() if line.startswith("boot")]
    words = "boot (s) on qemu 1.02 2.02 +98.0 % worse large (+1.00) 0.00794 5, 5"
    assert " ".join(line.split()) == words
    assert "warning: 1 of 5 runs of B did not pass" in shown.err
    assert main(["baseline", "compare", "main", *slower, "--json"]) == ExitCode.FAILED
    document = json.loads(capsys.readouterr().out)
    assert document["worse"] is True
    assert document["metrics"][0]["verdict"] == "worse"
    assert (len(document["a"]["runs"]), document["b"]["not_ok"]) == (5, 1)


def test_too_few_runs_tell_nothing_and_do_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["baseline", "save", "main", *_runs(tmp_path, 1, 1)])
    assert main(["baseline", "compare", "main", *_runs(tmp_path, 2, 1)]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "baseline main: 1 run\n" in out
    assert "cannot tell" in out and "1 and 1 samples are too few" in out


def test_baselines_are_listed_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["baseline", "list"]) == ExitCode.OK
    assert capsys.readouterr().out == "there is no baseline\n"
    runs = _runs(tmp_path, 1, 2)
    assert main(["baseline", "save", "one", *runs, "--note=a line", "--json"]) == ExitCode.OK
    saved = json.loads(capsys.readouterr().out)
    assert (saved["name"], len(saved["runs"]), saved["note"]) == ("one", 2, "a line")
    assert main(["baseline", "list"]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["one", "2"]
    assert main(["baseline", "list", "--json"]) == ExitCode.OK
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["count"], row["note"]) == ("one", 2, "a line")
    assert main(["baseline", "save", "one", *runs]) == ExitCode.CANNOT
    assert "there is a baseline 'one' already" in capsys.readouterr().err
    assert main(["baseline", "save", "one", *runs, "--force"]) == ExitCode.OK
    assert main(["baseline", "remove", "one"]) == ExitCode.OK
    assert main(["baseline", "remove", "one"]) == ExitCode.CANNOT
    assert "no baseline 'one'" in capsys.readouterr().err
    main(["baseline", "save", "two", *runs])
    capsys.readouterr()
    assert main(["baseline", "remove", "two", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"removed": "two"}


def _writer(level: float, outcome: str = "pass") -> list[str]:
    return [sys.executable, "-c", WRITES, "{report}", str(level), outcome]


def test_two_commands_are_run_in_turn_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", "4", "--seed", "3", "--json", "--keep", str(tmp_path / "kept")]
    commands = ["--", *_writer(1), "--", *_writer(2, "fail")]
    assert main(["baseline", "compare", *options, *commands]) == ExitCode.FAILED
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    level = next(each for each in document["metrics"] if each["name"] == "level")
    assert (level["verdict"], level["n"], level["medians"]) == ("worse", [4, 4], [1, 2])
    assert "whole command" in [each["name"] for each in document["metrics"]]
    assert document["seed"] == 3
    assert (document["a"]["not_ok"], document["b"]["not_ok"]) == (0, 4)
    assert shown.err.count("round ") == 8
    assert len(list((tmp_path / "kept").glob("round-*/report/report.json"))) == 8


def test_it_is_shown_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["--", *_writer(1), "--", *_writer(1)]
    main(["baseline", "compare", "--run", "1", *commands])
    shown = capsys.readouterr()
    assert "level (s) on qemu" in shown.out and "cannot tell" in shown.out
    assert "in an order drawn from --seed " in shown.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--run", "2", "--", "true"], "takes two commands"),
        (["--run", "2", "--", "true", "--"], "takes two commands"),
        (["--run", "2", "--", "a", "--", "b", "--", "c"], "takes two commands"),
        (["--run", "0", "--", "a", "--", "b"], "0"),
        (["main"], "name runs to compare with 'main'"),
        (["--", "true", "--", "true"], "commands are run with --run N"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["baseline", "compare", *arguments]) == ExitCode.USAGE
    assert problem in capsys.readouterr().err


def test_a_directory_that_exists_is_not_used_for_keeping(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run", "1", "--keep", str(tmp_path), "--", *_writer(1), "--", *_writer(1)]
    assert main(["baseline", "compare", *arguments]) == ExitCode.CANNOT
    assert f"cannot make {tmp_path}" in capsys.readouterr().err

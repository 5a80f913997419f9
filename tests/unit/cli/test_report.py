"""``vmlab report``: reading a run, finished or killed, writing it, comparing two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from junitparser import JUnitXml

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.report import Direction, Recorder, parse, schema


def _record(directory: Path, *, outcome: str = "pass", boot: float = 1.0, more: str = "") -> Path:
    with Recorder.create(directory, tool="t", command=["t", "--seed=1"], seed=1) as recorder:
        attempt = recorder.start("s", "boots", hypervisor="qemu")
        for step in range(4):
            attempt.metric("boot", boot + step / 10, "s", direction=Direction.LOWER)
        attempt.attach("console.log", "hello\n")
        attempt.finish(outcome, reason="a\x1b[31mreason" if outcome != "pass" else None)
        if more:
            recorder.start("s", more).finish("pass")
    return directory


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return _record(tmp_path / "run")


def test_a_run_is_shown(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (ran, ran / "report.json"):
        assert main(["report", "show", str(place)]) == ExitCode.OK
        shown = capsys.readouterr().out
        assert "PASS: 1 test (1 pass)" in shown
        assert "run again: t --seed=1" in shown


def test_the_json_is_the_document(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "show", str(ran), "--json"]) == ExitCode.OK
    shown = capsys.readouterr().out
    jsonschema.validate(json.loads(shown), schema())
    assert shown.encode() == (ran / "report.json").read_bytes()
    assert main(["report", "json", str(ran)]) == ExitCode.OK
    assert capsys.readouterr().out == shown


def test_a_run_that_was_killed_is_read_as_far_as_it_got(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder.create(tmp_path, tool="t")
    recorder.plan("s", ["first", "second"])
    recorder.start("s", "first").finish("pass")
    assert main(["report", "show", str(tmp_path)]) == ExitCode.OK
    assert "PENDING: 2 tests (1 pass, 1 pending) so far; the run did not end" in (
        capsys.readouterr().out
    )
    assert main(["report", "show", "--check", str(tmp_path)]) == ExitCode.FAILED
    assert main(["report", "junit", str(tmp_path)]) == ExitCode.OK
    recorder.close()


def test_check_says_whether_it_passed(ran: Path, tmp_path: Path) -> None:
    assert main(["report", "show", "--check", str(ran)]) == ExitCode.OK
    failed = _record(tmp_path / "failed", outcome="fail")
    assert main(["report", "show", str(failed)]) == ExitCode.OK
    assert main(["report", "show", "--check", str(failed)]) == ExitCode.FAILED


def test_the_last_run_is_meant_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["report", "show"]) == ExitCode.CANNOT
    error = capsys.readouterr().err
    assert "there is no report yet in" in error and "vmlab test" in error
    runs = tmp_path / "vmlab" / "reports"
    _record(runs / "one")
    (runs / "latest").symlink_to("one")
    assert main(["report", "show"]) == ExitCode.OK
    assert main(["report", "show", str(runs)]) == ExitCode.OK
    assert capsys.readouterr().out.count("PASS: 1 test") == 2


def test_of_runs_that_never_ended_the_last_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorders = [
        Recorder.create(tmp_path / name, tool="t", run_id=name) for name in ("20260102", "20260101")
    ]
    (tmp_path / "other").mkdir()
    assert main(["report", "show", str(tmp_path)]) == ExitCode.OK
    assert "run 20260102" in capsys.readouterr().out
    for recorder in recorders:
        recorder.close()


def test_without_colour_there_is_none(
    ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    try:
        assert main(["--no-color", "report", "show", str(ran)]) == ExitCode.OK
        assert "\x1b[" not in capsys.readouterr().out
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        assert main(["report", "show", str(ran)]) == ExitCode.OK
        assert "\x1b[" in capsys.readouterr().out
    finally:
        output.configure(color=True, verbose=0)


@pytest.mark.parametrize("format", ["html", "junit", "ctrf", "json", "results"])
def test_every_format_goes_to_stdout_or_to_a_file(
    format: str, ran: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["report", format, str(ran)]) == ExitCode.OK
    printed = capsysbinary.readouterr().out
    target = ran / "new" / "document"
    assert main(["report", format, str(ran), "--output", str(target)]) == ExitCode.OK
    written = capsysbinary.readouterr()
    assert written.out == b"" and b"wrote " in written.err
    if format == "html":
        assert printed.startswith(b"<!doctype html>")
        assert b'href="../artifacts/' in target.read_bytes(), "its files are found from there"
        assert b'href="artifacts/' in printed
    else:
        assert target.read_bytes() == printed
    if format == "junit":
        assert JUnitXml.fromstring(printed).tests == 1
    if format == "json":
        assert parse(printed).totals.passed == 1


def test_a_file_that_exists_is_replaced_only_by_force(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "r.xml"
    target.write_text("mine")
    assert main(["report", "junit", str(ran), "-o", str(target)]) == ExitCode.CANNOT
    assert target.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert main(["report", "junit", str(ran), "-o", str(target), "--force"]) == ExitCode.OK
    assert target.read_bytes().startswith(b"<?xml")


def test_a_place_without_a_run_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "html", str(tmp_path)]) == ExitCode.CANNOT
    assert capsys.readouterr().err.startswith("error: cannot read a report from ")


def test_diff_says_what_got_worse(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = _record(tmp_path / "worse", outcome="fail", boot=2.0, more="new")
    assert main(["report", "diff", str(ran), str(worse)]) == ExitCode.FAILED
    shown = capsys.readouterr().out.splitlines()
    (changed,) = [line.split() for line in shown if "s::boots" in line]
    assert changed == ["s::boots[qemu]", "pass", "fail", "worse", "a\\x1b[31mreason"]
    (new,) = [line.split() for line in shown if "s::new" in line]
    assert new == ["s::new", "-", "pass"]
    (metric,) = [line for line in shown if line.startswith("boot (s) on qemu")]
    assert "worse" in metric and "large (+1.00)" in metric and "4, 4" in metric

    assert main(["report", "diff", str(ran), str(worse), "--json"]) == ExitCode.FAILED
    document = json.loads(capsys.readouterr().out)
    assert document["worse"] is True
    assert document["changed"] == [
        {
            "id": "s::boots[qemu]",
            "before": "pass",
            "after": "fail",
            "reason": "a\x1b[31mreason",
            "worse": True,
        }
    ]
    assert [test["id"] for test in document["appeared"]] == ["s::new"]
    assert document["metrics"][0]["verdict"] == "worse"
    assert (document["metrics"][0]["name"], document["metrics"][0]["hypervisor"]) == (
        "boot",
        "qemu",
    )


def test_diff_of_a_run_with_itself_is_nothing(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "diff", str(ran), str(ran)]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert "no outcome changed\n1 test ended as before\n" in shown


def test_output_that_nobody_reads_ends_quietly(ran: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vmlab", "report", "html", str(ran)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=280, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (ExitCode.BROKEN_PIPE, b"")


def test_runs_are_listed_and_old_ones_thrown_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "runs"
    assert main(["report", "list", str(place)]) == ExitCode.OK
    assert f"there is no run in {place}" in capsys.readouterr().out.replace("\n", "")
    old = _record(place / "20260101T000000Z-old", outcome="fail", more="later")
    new = _record(place / "20260102T000000Z-new")
    assert main(["report", "list", str(place)]) == ExitCode.OK
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in shown[1:]] == [
        [new.name, "pass", "1", "0"],
        [old.name, "fail", "2", "1"],
    ]
    assert main(["report", "list", str(place), "--json", "-n", "1"]) == ExitCode.OK
    [told] = json.loads(capsys.readouterr().out)
    assert (told["name"], told["counts"]["pass"], told["directory"]) == (new.name, 1, str(new))

    prune = ["report", "prune", str(place), "--keep", "1"]
    assert main([*prune, "--dry-run", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"dry_run": True, "runs": [str(old)]}
    assert main([*prune, "--older-than", "soon"]) == ExitCode.USAGE
    assert '"30m" or "7d"' in capsys.readouterr().err
    assert old.is_dir()
    assert main(prune) == ExitCode.OK
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{old}\n", "1 run removed\n")
    assert (old.exists(), new.exists()) == (False, True)

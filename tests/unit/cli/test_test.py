"""`vmlab test` on tests that need no machine: statuses, signals, what is shown and what is said."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.live import Live

from vmlab.cli import test_display
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.cli.test_child import PytestChild, run_in_foreground
from vmlab.cli.test_display import LivePicture, PlainLines
from vmlab.cli.test_story import Follower, News, Story, outcome_of
from vmlab.report import read_run

pytestmark = pytest.mark.timeout(300)

HANGS = """
import pathlib, time

def test_hangs(tmp_path):
    try:
        pathlib.Path("begun").touch()
        # A signal that comes just before a sleep begins is looked at when the sleep is over.
        while True:
            time.sleep(0.05)
    finally:
        pathlib.Path("cleared").touch()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path


Captured = pytest.CaptureFixture[str]


def test_tests_that_pass_are_status_0_and_are_counted(project: Path, capsys: Captured) -> None:
    (project / "test_a.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    assert main(["test"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert out == "2 pass; no test asked for a machine\n"
    assert "collected 2 tests" in err
    assert "PASS      test_a.py::test_b" in err


def test_tests_that_fail_are_status_1_with_why(project: Path, capsys: Captured) -> None:
    (project / "test_a.py").write_text(
        "import pytest\ndef test_a():\n    x = 1\n    assert x == 2\n"
        "def test_b(): pytest.skip('not now')\n"
        "@pytest.fixture\ndef broken(): raise OSError('gone')\ndef test_c(broken): pass\n"
        "@pytest.mark.xfail\ndef test_d(): assert False\n"
    )
    assert main(["test", "test_a.py"]) == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert "assert 1 == 2" in out
    assert "OSError: gone" in out
    assert "test session starts" not in out
    assert out.endswith("1 error, 1 fail, 1 skip, 1 xfail; no test asked for a machine\n")
    for word in ("FAIL      test_a.py::test_a", "SKIP      test_a.py::test_b", "ERROR     test_a"):
        assert word in err


def test_options_are_pytest_s(project: Path, capsys: Captured) -> None:
    (project / "test_x.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    assert main(["test", "-k", "test_a", "-v", "test_x.py"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("1 pass;")
    assert main(["test", "--no-such-option"]) == ExitCode.USAGE
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


def test_what_is_not_there_is_wrong_usage(project: Path, capsys: Captured) -> None:
    assert main(["test", "nowhere"]) == ExitCode.USAGE
    assert "there is no file or directory 'nowhere'" in capsys.readouterr().err
    assert main(["test"]) == ExitCode.USAGE
    assert "error: no test was found" in capsys.readouterr().err


def test_a_plan_that_is_wrong_is_told_by_field_and_is_wrong_usage(
    project: Path, capsys: Captured
) -> None:
    (project / "a.vmlab.toml").write_text('[[phases]]\nname = "a"\nrum = "x"\n')
    (project / "b.vmlab.toml").write_text("[[phases]\n")
    assert main(["test"]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert "phases.0.rum = 'x': no such field; did you mean 'run'?" in out
    assert "b.vmlab.toml has 1 problem:\n  line 1" in out
    assert "Traceback" not in out + err
    assert "a.vmlab.toml cannot be collected" in err


def test_the_same_as_data(project: Path, capsys: Captured) -> None:
    (project / "test_a.py").write_text("def test_a(): print('x')\ndef test_b(): assert False\n")
    assert main(["test", "--json", "-s"]) == ExitCode.FAILED
    data = json.loads(capsys.readouterr().out)
    assert data["counts"] == {"pass": 1, "fail": 1}
    assert data["report"] is None
    assert data["pytest_status"] == 1


def test_pytest_has_the_terminal_where_it_talks_to_somebody(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "test_a.py").write_text("def test_a(): print('said')\n")
    assert main(["test", "-s"]) == ExitCode.OK
    assert "said" in capfd.readouterr().out
    assert main(["test", "--collect-only", "-q"]) == ExitCode.OK
    assert "test_a.py::test_a" in capfd.readouterr().out


@pytest.mark.parametrize("talking", [(), ("-s",)], ids=["shown", "talking"])
def test_the_report_names_the_command_that_gives_the_same_run(
    talking: tuple[str, ...], project: Path, capfd: Captured
) -> None:
    (project / "test_x.py").write_text("def test_a(vm): pass\n")
    words = [*talking, "--vm-hypervisor=simulated", "--vm-report=reports", "--vm-seed=7"]
    assert main(["test", *words]) == ExitCode.OK
    again = read_run(project / "reports" / "latest").command
    assert list(again) == ["vmlab", "test", *words]


def test_a_project_s_own_plugins_are_loaded_and_its_children_know_nothing(
    project: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "own_plugin.py").write_text("def pytest_configure(config): config.own = True\n")
    (project / "test_a.py").write_text(
        "import os\ndef test_a(pytestconfig):\n    assert pytestconfig.own\n"
        "    assert os.environ['PYTEST_PLUGINS'] == 'own_plugin'\n"
        "    assert not [name for name in os.environ if name.startswith('VMLAB_TELL')]\n"
    )
    monkeypatch.setenv("PYTEST_PLUGINS", "own_plugin")
    monkeypatch.setenv("PYTHONPATH", str(project))
    assert main(["test"]) == ExitCode.OK, capsys.readouterr()


def test_workers_are_told_of_too(project: Path, capsys: Captured) -> None:
    (project / "test_a.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(6))\ndef test_a(n): assert n < 5\n"
    )
    assert main(["test", "-n", "2"]) == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert out.endswith("1 fail, 5 pass; no test asked for a machine\n")
    assert "collected 6 tests" in err


# ------------------------------------------------------------------------------------- signals


def begun(project: Path) -> subprocess.Popen[bytes]:
    """`vmlab test` in the midst of a test."""
    (project / "test_hangs.py").write_text(HANGS)
    process = subprocess.Popen(
        [sys.executable, "-m", "vmlab", "test"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    while not (project / "begun").exists():
        assert process.poll() is None, process.communicate()
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_tests_clear_up(project: Path, number: signal.Signals) -> None:
    process = begun(project)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 128 + number, err
    assert (project / "cleared").exists()
    assert b"interrupted: " not in err or b"there is no report" in err
    assert b"Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_what_is_killed_takes_pytest_with_it(project: Path) -> None:
    process = begun(project)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.communicate(timeout=280)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_signal_that_comes_while_pytest_is_just_being_started_is_passed_on(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "test_hangs.py").write_text(HANGS)
    start = subprocess.Popen

    def interrupted(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = start(*words, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    heard: list[object] = []
    child = PytestChild([], on_event=heard.append, on_output=lambda *_: None, on_turn=lambda: None)
    assert child.run() != 0
    assert child.interrupted == signal.SIGINT
    assert run_in_foreground(["-q"])[1] == signal.SIGINT


def test_pytest_that_is_killed_is_no_success(project: Path, capfd: Captured) -> None:
    (project / "test_a.py").write_text(
        "import os, signal\ndef test_a(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert main(["test"]) == ExitCode.CANNOT
    assert "pytest was ended by signal 9 (SIGKILL)" in capfd.readouterr().err


# --------------------------------------------------------------------------- what is shown


def journal(directory: Path, *entries: dict[str, object]) -> None:
    directory.mkdir(exist_ok=True)
    with (directory / "main.jsonl").open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def told(tmp_path: Path) -> tuple[Story, list[News]]:
    """A story of one test with a machine, in the midst of a phase."""
    news: list[News] = []
    clock = iter(range(100))
    story = Story(news.append, clock=lambda: float(next(clock)))
    story.event({"event": "collected", "tests": 3})
    story.event({"event": "report", "directory": str(tmp_path)})
    story.event({"event": "begin", "id": "a.toml::plan[q]"})
    journal(
        tmp_path / "journal",
        {"event": "open", "run": {}},
        {"event": "start", "n": 1, "suite": "a.toml", "name": "plan[q]"},
        {"event": "machine", "n": 1,
         "machine": {"name": "vm", "hypervisor": "q", "image": "tiny"}},
        {"event": "machine", "n": 1, "machine": {"name": "vm", "hypervisor": "q"}},
        {"event": "mark", "n": 1, "machine": "vm", "mark": {"kind": "boot", "duration_s": 2.5}},
        {"event": "phase", "n": 1, "phase": {"name": "setup", "outcome": "pass"}},
        {"event": "phase", "n": 1,
         "phase": {"name": "one", "outcome": "fail", "duration_s": 1, "message": "why\nmore"}},
        {"event": "phase", "n": 1, "phase": {"name": "two", "outcome": "pending"}},
        {"event": "fault", "n": 1, "fault": {"kind": "kill", "machine": "vm"}},
    )  # fmt: skip
    story.turn()
    return story, news


def test_machines_boots_phases_and_faults_are_news(tmp_path: Path) -> None:
    story, news = told(tmp_path)
    test = "a.toml::plan[q]"
    assert news == [
        News("collected", "", "3 tests"),
        News("begin", test, ""),
        News("machine", test, "vm on q, tiny"),
        News("mark", test, "vm boot 2.5 s"),
        News("phase", test, "one fail 1.0 s (why)"),
        News("phase", test, "two begins"),
        News("fault", test, "kill: vm"),
    ]
    assert (story.machines, story.boots, story.running[test].phase) == (1, 1, "two")
    assert story.running[test].machines["vm"].doing == "boot"


def test_a_test_has_the_outcome_of_its_worst_part(tmp_path: Path) -> None:
    news: list[News] = []
    story = Story(news.append)
    for number, outcomes in enumerate((("passed", "passed"), ("passed", "failed"), ("skipped",))):
        story.event({"event": "begin", "id": str(number)})
        for when, outcome in zip(("setup", "call"), outcomes, strict=False):
            story.event({"event": "part", "id": str(number), "when": when, "outcome": outcome})
        story.event({"event": "part", "id": str(number), "when": "teardown", "outcome": "passed"})
        story.event({"event": "end", "id": str(number)})
    story.event(
        {"event": "part", "id": "1", "when": "call", "outcome": "passed", "guest_test": "x"}
    )
    assert story.outcomes == {"pass": 1, "fail": 1, "skip": 1}
    assert (news[-1].kind, news[-1].test) == ("pass", "1::x")


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        ({"outcome": "passed", "when": "call"}, "pass"),
        ({"outcome": "failed", "when": "call"}, "fail"),
        ({"outcome": "failed", "when": "call", "died": True}, "error"),
        ({"outcome": "failed", "when": "setup"}, "error"),
        ({"outcome": "skipped", "when": "setup"}, "skip"),
        ({"outcome": "skipped", "when": "call", "xfail": True}, "xfail"),
    ],
)
def test_outcomes_have_the_report_s_names(event: dict[str, object], outcome: str) -> None:
    assert outcome_of(event) == outcome


def test_journals_are_followed_by_whole_lines(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "journal")
    assert list(follower.entries()) == []
    (tmp_path / "journal").mkdir()
    file = tmp_path / "journal" / "gw0.jsonl"
    file.write_text('{"n": 1}\n{"n": ')
    assert list(follower.entries()) == [("gw0", {"n": 1})]
    with file.open("a") as more:
        more.write('2}\ntorn\n[1]\n{"n": 3}\n{"x": "' + "x" * (3 << 20))
    assert list(follower.entries()) == [("gw0", {"n": 2}), ("gw0", {"n": 3})]
    with file.open("a") as more:
        more.write('"}\n')
    ((_, last),) = follower.entries()
    assert len(str(last["x"])) == 3 << 20
    assert list(follower.entries()) == []


def test_plain_lines_command_no_terminal(capsys: Captured) -> None:
    lines = PlainLines()
    lines.news(News("phase", "t", "one pass \x1b[2J 1.0 s"))
    lines.news(News("fail", "t\x07", "2.0 s"))
    err = capsys.readouterr().err
    assert "phase     one pass \\x1b[2J 1.0 s [t]" in err
    assert "FAIL      t\\x07 2.0 s" in err


def test_the_picture_has_tests_machines_and_phases(tmp_path: Path) -> None:
    story, news = told(tmp_path)
    for number in range(test_display._MOST_SHOWN):
        story.event({"event": "begin", "id": f"more{number}"})
    console = Console(file=io.StringIO(), force_terminal=True, width=100, no_color=True)
    with Live(console=console, auto_refresh=False) as live:
        picture = LivePicture(console, live)
        for one in news:
            picture.news(one)
        picture.news(News("fail", "b.py::test_b", "1.0 s"))
        picture.turn(story)
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    for words in (
        "0/3 tests", "1 machine, 1 boot", "a.toml::plan[q]", "phase two", "vm (q) boot",
        "and 1 more", "FAIL  b.py::test_b", "FAULT a.toml::plan[q]  kill: vm",
    ):  # fmt: skip
        assert words in shown
    assert "begin" not in shown


def working(step: str, done: int, *, finished: bool = False) -> dict[str, object]:
    return {
        "event": "progress", "step": step, "done": done, "total": 4 << 20, "unit": "bytes",
        "finished": finished,
    }  # fmt: skip


def test_work_on_an_image_is_a_line_for_each_step_and_a_bar_while_it_lasts() -> None:
    news: list[News] = []
    story = Story(news.append)
    story.event({"event": "said", "text": "the image tiny is made ready first: fetching"})
    for done in (0, 1 << 20, 2 << 20):
        story.event(working("fetching \x1b[2J", done))
    assert news == [
        News("note", "", "the image tiny is made ready first: fetching"),
        News("image", "", "fetching \x1b[2J (4.0 MiB)"),
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, no_color=True)
    assert isinstance(console.file, io.StringIO)
    with Live(console=console, auto_refresh=False) as live:
        picture = LivePicture(console, live)
        picture.news(news[0])
        picture.turn(story)
        shown = console.file.getvalue()
        assert re.search(r"NOTE  \S*the image tiny is made ready", shown)
        assert "fetching \\x1b[2J" in shown and "2.0/4.0 MiB" in shown
        story.event(working("fetching \x1b[2J", 4 << 20, finished=True))
        before = len(console.file.getvalue())
        picture.turn(story)
        assert "fetching" not in console.file.getvalue()[before:]


def test_on_a_terminal_there_is_a_picture(project: Path) -> None:
    (project / "test_a.py").write_text("def test_a(): pass\n")
    controller, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vmlab", "test"],
        cwd=project, stdin=terminal, stdout=terminal, stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    while True:
        try:
            data = os.read(controller, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(controller)
    assert process.wait(280) == ExitCode.OK
    assert b"1/1 tests" in seen
    assert b"1 pass; no test asked for a machine" in seen

"""The frame of the command line: help without imports, suggestions, errors, exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath

import pytest
import typer

from vmlab import __version__
from vmlab.cli import main as frame
from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.machine.errors import HypervisorUnavailable, InvalidSpec, SpecProblem, VmlabError

HEAVY = ("pydantic", "llvmlite", "fastapi", "rich", "psutil", "pytest", "filelock", "qemu")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Put one command, `probe`, in the place of the table."""

    def install(target: object) -> None:
        entry = frame.CommandEntry("probe", "vmlab.cli.probe", "probe", "A probe.", "Test")
        module = type(sys)("vmlab.cli.probe")
        module.probe = target  # a module made here
        monkeypatch.setitem(sys.modules, "vmlab.cli.probe", module)
        monkeypatch.setattr(frame.CommandTable, "entries", (entry,))

    return install


def test_help_imports_no_command_and_nothing_heavy() -> None:
    done = run_python(
        "import sys\n"
        "from vmlab.cli.main import main\n"
        "status = main(['--help'])\n"
        "print(*sorted(sys.modules), sep='\\n', file=sys.stderr)\n"
        "sys.exit(status)"
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.split())
    assert "vmlab.cli.main" in imported
    assert not imported & set(HEAVY)
    assert not imported & {entry.module for entry in frame.COMMANDS}


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["--help"]) == ExitCode.OK
    text = " ".join(capsys.readouterr().out.split())
    for entry in frame.COMMANDS:
        assert f"{entry.name} {entry.help}" in text


@pytest.mark.parametrize("entry", frame.COMMANDS, ids=lambda entry: entry.name)
def test_every_command_of_the_table_is_there_and_explains_itself(
    entry: frame.CommandEntry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frame.main([entry.name, "--help"]) == ExitCode.OK
    printed = capsys.readouterr().out
    assert f"Usage: vmlab {entry.name}" in printed
    assert "completion" not in printed


def test_no_command_prints_the_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main([]) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Usage: vmlab")


@pytest.mark.parametrize(
    ("typed", "meant"), [("confrmance", "conformance"), ("hypervisor", "hypervisors")]
)
def test_unknown_command_suggests_the_one_that_was_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frame.main([typed]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"error: there is no command {typed!r}; did you mean {meant!r}")
    assert "hint: `vmlab --help`" in error


def test_unknown_command_like_no_other_suggests_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["zzzzzz"]) == ExitCode.USAGE
    assert "did you mean" not in capsys.readouterr().err


def test_unknown_option_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["--bogus"]) == ExitCode.USAGE
    assert "--bogus" in capsys.readouterr().err


def test_shell_completes_commands_and_imports_only_those_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("_VMLAB_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "vmlab sch")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = run_python(
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\n"
        "from vmlab.cli.main import main\n"
        "sys.exit(main([]))"
    )
    assert done.stdout.split() == ["schema"]
    assert "vmlab.cli.schema" in done.stderr.split()
    assert "vmlab.cli.doctor" not in done.stderr.split()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out == f"vmlab {__version__}\n"


def test_error_is_printed_with_its_hint_and_without_traceback(
    command: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def probe() -> None:
        error = VmlabError("it cannot be done", hint="do something else", machine="web1")
        error.add_note("undoing it failed too")
        raise error

    command(probe)
    assert frame.main(["probe"]) == ExitCode.CANNOT
    assert capsys.readouterr() == (
        "",
        "error: it cannot be done (machine 'web1')\n"
        "note: undoing it failed too\nhint: do something else\n",
    )


def test_debug_adds_the_traceback(
    command: Callable[[object], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def probe() -> None:
        raise VmlabError("it cannot be done")

    command(probe)
    monkeypatch.setenv("VMLAB_DEBUG", "1")
    assert frame.main(["probe"]) == ExitCode.CANNOT
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: it cannot be done\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HypervisorUnavailable("no qemu here"), ExitCode.UNAVAILABLE),
        (InvalidSpec([SpecProblem("cpus", 0, "at least 1")]), ExitCode.USAGE),
        (RuntimeError("oops"), ExitCode.INTERNAL),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (typer.Exit(17), 17),
        (BrokenPipeError(), ExitCode.BROKEN_PIPE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_status_says_what_kind_of_end_it_was(
    error: BaseException, status: int, command: Callable[[object], None], capfd: object
) -> None:
    def probe() -> None:
        raise error

    command(probe)
    assert frame.main(["probe"]) == status


def test_returned_status_is_the_exit_status(command: Callable[[object], None]) -> None:
    def probe() -> ExitCode:
        return ExitCode.FAILED

    command(probe)
    assert frame.main(["probe"]) == ExitCode.FAILED


def test_internal_error_asks_for_a_report(
    command: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def probe() -> None:
        raise RuntimeError("oops")

    command(probe)
    assert frame.main(["probe"]) == ExitCode.INTERNAL
    error = capsys.readouterr().err
    assert "RuntimeError: oops" in error
    assert "a mistake in vmlab" in error


def test_wrong_value_names_the_option(
    command: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def probe(count: int) -> None:
        print(count)

    command(probe)
    assert frame.main(["probe", "many"]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert "'many'" in error
    assert "'count'" in error
    assert "integer" in error
    assert "hint: `vmlab probe --help` shows what it takes" in error


def test_typer_app_is_a_command_with_subcommands(
    command: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def one() -> None:
        print("this is one")

    @app.command()
    def two() -> None:
        print("this is two")

    command(app)
    assert frame.main(["probe", "two"]) == ExitCode.OK
    assert capsys.readouterr().out == "this is two\n"


def test_group_without_a_command_prints_its_help(
    command: Callable[[object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

    @app.command()
    def one() -> None:
        print("this is one")

    @app.callback()
    def group() -> None:
        """A group of one."""

    command(app)
    assert frame.main(["probe"]) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("Usage: vmlab probe")


def test_global_options_reach_the_output(
    command: Callable[[object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    monkeypatch.setattr(
        output, "configure", lambda *, color, verbose: seen.append((color, verbose))
    )
    command(lambda: None)
    assert frame.main(["-vv", "--no-color", "probe"]) == ExitCode.OK
    assert seen[-1] == (False, 2)


def test_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys, typer\n"
        "from vmlab.cli import main as frame\n"
        "def probe() -> None:\n"
        "    for number in range(200_000): print('a line', number)\n"
        "module = type(sys)('vmlab.cli.probe'); module.probe = probe\n"
        "sys.modules['vmlab.cli.probe'] = module\n"
        "entry = frame.CommandEntry('probe', 'vmlab.cli.probe', 'probe', '', '')\n"
        "frame.CommandTable.entries = (entry,)\n"
        "sys.exit(frame.main(['probe']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"a line 0\n"
        child.stdout.close()
        assert child.wait(timeout=280) == ExitCode.BROKEN_PIPE
        assert child.stderr.read() == b""


def test_interrupt_ends_with_130_and_no_traceback() -> None:
    code = (
        "import sys, time\n"
        "from vmlab.cli import main as frame\n"
        "def probe() -> None:\n"
        "    print('ready', flush=True)\n"
        # A signal that comes just before a sleep begins is looked at when the sleep is over.
        "    while True: time.sleep(0.05)\n"
        "module = type(sys)('vmlab.cli.probe'); module.probe = probe\n"
        "sys.modules['vmlab.cli.probe'] = module\n"
        "entry = frame.CommandEntry('probe', 'vmlab.cli.probe', 'probe', '', '')\n"
        "frame.CommandTable.entries = (entry,)\n"
        "sys.exit(frame.main(['probe']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=280) == ExitCode.INTERRUPTED
        assert child.stderr.read() == b""


def test_help_costs_no_more_work_than_promised() -> None:
    """What 0.15 s of CPU are here, in calls of Python: the same number however busy the host is.

    The seconds are measured by benchmarks/cli_startup.py: 0.12 of them for 40,000 calls.
    """
    code = (
        "import sys\n"
        "calls = 0\n"
        "def count(frame, event, given):\n"
        "    global calls\n"
        "    calls += event == 'call'\n"
        "sys.setprofile(count)\n"
        "from vmlab.cli.main import main\n"
        "main(['--help'])\n"
        "sys.setprofile(None)\n"
        "print(calls, file=sys.stderr)"
    )
    # With what a user has, not with what a test run has added.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    assert 1000 < int(done.stderr) < 50_000


# -------------------------------------------------------------------------------------- output


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    where: PurePosixPath


COLUMNS = [
    output.Column("name", "machine"),
    output.Column("vcpus", "vCPUs", justify="right"),
    output.Column("tags", "tags"),
]
ROWS = [
    {"name": "web[1]", "vcpus": 2, "tags": ["a", "b"], "seconds": 0.123456},
    {"name": "db", "vcpus": None, "tags": [], "seconds": 1.0},
]


def test_table_shows_its_columns_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(COLUMNS, ROWS, as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["machine", "vCPUs", "tags"]
    assert lines[1:] == [["web[1]", "2", "a,", "b"], ["db", "-", "-"]]


def test_table_in_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    output.print_table(COLUMNS, [{"name": long, "vcpus": 1, "tags": []}], as_json=False)
    printed = capsys.readouterr().out
    assert long in printed
    assert all(line == line.rstrip() for line in printed.splitlines())


def test_json_has_everything_the_rows_hold(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(COLUMNS, ROWS, as_json=True)
    assert json.loads(capsys.readouterr().out) == ROWS


def test_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(COLUMNS, [], as_json=False, empty="no machines")
    output.print_table(COLUMNS, [], as_json=True, empty="no machines")
    assert capsys.readouterr().out == "no machines\n[]\n"


def test_json_of_what_json_does_not_know() -> None:
    from vmlab.machine.capabilities import Limits

    value = {
        "enum": Colour.RED,
        "point": Point(1, PurePosixPath("/srv")),
        "set": {3, 1, 2},
        "model": Limits(machines=3, memory=1 << 30),
        "bytes": b"a\xff",
    }
    data = json.loads(output.to_json(value))
    assert data["enum"] == "red"
    assert data["point"] == {"x": 1, "where": "/srv"}
    assert data["set"] == [1, 2, 3]
    assert data["model"]["machines"] == 3
    assert data["model"]["memory"] == "1G"
    assert data["bytes"] == "a\\xff"
    with pytest.raises(TypeError, match="object has no JSON form"):
        output.to_json(object())


@pytest.mark.parametrize("forbidden_by", ["nothing", "NO_COLOR", "--no-color"])
def test_errors_are_coloured_on_terminals_that_want_it(forbidden_by: str) -> None:
    leader, follower = os.openpty()
    environment = os.environ | ({"NO_COLOR": "1"} if forbidden_by == "NO_COLOR" else {})
    flags = ["--no-color"] if forbidden_by == "--no-color" else []
    printed = b""
    with subprocess.Popen(
        [sys.executable, "-m", "vmlab", *flags, "nonsense"], stderr=follower, env=environment
    ) as child:
        os.close(follower)
        # A terminal gives what it has been given so far: all of it is there at its end.
        with os.fdopen(leader, "rb", buffering=0) as terminal, suppress(OSError):
            while data := terminal.read(4096):
                printed += data
        child.wait(280)
    assert b"there is no command" in printed
    assert (b"\x1b[" in printed) == (forbidden_by == "nothing")

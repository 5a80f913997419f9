"""The text summary, and how a format is chosen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from vmlab.machine.errors import VmlabError
from vmlab.report import Attempt, Outcome, Run, Suite, Test, find_writer, show, text, write, writers
from vmlab.report.json_report import render as render_json
from vmlab.report.junit import render as render_junit

EXPECTED = """\
vmlab conformance 0.1.0, run 20261121T093000Z-0badcafe, seed 9223372036854775808

suite      tests  pass  fail  error  skip  xfail  pending    time
lifecycle      4     1     1      1     0      0        1  2.25 s
other          4     1     1      0     1      1        0  5.12 s
all            8     2     2      1     1      1        1  7.38 s

ERROR   lifecycle::test_fork  0.50 s
        the machine died: \\x1b[31mkernel panic\\x1b[0m \\xff

FAIL    lifecycle::test_pause  0.25 s
        check 'state': fail (expected paused, got running)

FAIL    other::test_broken_twice  3.00 s
        check 'state': fail (expected paused, got running)

PENDING lifecycle::test_never_begun
        planned, never begun

PASS    other::test_flaky
        flaky: fail, then pending, then pass

SKIP    other::test_gpu
        no GPU here

XFAIL   other::test_known_bug

warning: slow disk
ERROR: 8 tests (2 pass, 2 fail, 1 error, 1 skip, 1 xfail, 1 pending) in 7.00 s
run again: vmlab conformance qemu --seed 'it'"'"'s'
"""


WITH_MACHINES = """\
vmlab test 0.1.0, run 20261121T093000Z-0000feed, seed 7

suite  tests  pass  fail  error  skip  xfail  pending    time
net        3     1     1      0     0      0        1  5.50 s

FAIL    net::test_panic[qemu]  2.50 s
        web: kernel panic
        machine web: qemu, tcg, x86_64, debian-12
               -1.50 s  template
                0.00 s  boot: forked
                2.00 s  panic: Kernel panic - not syncing: <b>\\x1b[31m more
        phase boot: pass, 1.25 s
        phase build: fail, 1.00 s, exit status 2
        fault slow: disk-slow on web at 1.50 s, cleared at 1.75 s
        fault cut: power-cut on web refused: it cannot
        fault lag: net-delay on web at 2.00 s

PENDING net::test_begun[qemu]
        begun, never finished
        phase boot: pending

machines: 3 (1 on qemu/tcg, 2 on qemu/tcg/x86_64)
phases: 4 (2 pass, 1 fail, 1 pending)
faults: 2 injected, 1 refused
FAIL: 3 tests (1 pass, 1 fail, 1 pending) so far; the run did not end
run again: vmlab test --vm-seed 7
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_summary_tells_what_is_wrong_first(run: Run) -> None:
    assert text.render(run).decode() == EXPECTED


def test_a_pipe_gets_plain_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    show(run)
    assert capsys.readouterr().out == EXPECTED


def test_machines_phases_and_faults_are_shown(run_with_machines: Run) -> None:
    assert text.render(run_with_machines).decode() == WITH_MACHINES


def test_a_terminal_gets_the_same_in_colour(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    show(run, terminal)
    shown = terminal.getvalue()
    assert "\x1b[1;31m" in shown
    assert "\x1b[31mkernel panic" not in shown
    for words in (
        "lifecycle::test_fork",
        "expected paused, got running",
        "planned, never begun",
        "flaky: fail, then pending, then pass",
        "no GPU here",
        "slow disk",
        "run again: vmlab conformance qemu",
        "7.38 s",
    ):
        assert words in shown


def test_a_terminal_without_colour_gets_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    show(run, terminal)
    assert "\x1b" not in terminal.getvalue()
    assert "ERROR: 8 tests" in terminal.getvalue()


def _skipped(count: int, reason: str) -> list[Test]:
    return [
        Test(suite="s", name=f"t{n}", attempts=[Attempt(outcome="skip", skip_reason=reason)])
        for n in range(count)
    ]


def test_skips_are_grouped_by_reason_and_long_reasons_cut(run: Run) -> None:
    reason = "\n".join(f"line {number}" for number in range(9))
    facts = {"id": "r", "tool": "t", "version": "1", "started": run.started}
    skipped = Run(
        **facts, finished=run.started, suites=[Suite(name="s", tests=_skipped(5, reason))]
    )
    shown = text.render(skipped).decode()
    assert "SKIP    s::t0, s::t1, s::t2 and 2 more\n        line 0\n" in shown
    assert "        line 4\n        ... 4 more lines\n\nSKIP: 5 tests (5 skip) in -\n" in shown
    assert "line 5" not in shown
    assert "all " not in shown, "one suite needs no sums"


def test_an_unfinished_run_says_so(run: Run) -> None:
    facts = {"id": "r", "tool": "t", "version": "1", "started": run.started}
    shown = text.render(Run(**facts)).decode()
    assert shown.endswith("PENDING: 0 tests (nothing ran) so far; the run did not end\n")
    one = Run(**facts, suites=[Suite(name="s", tests=_skipped(1, "x"))])
    assert "PENDING: 1 test (1 skip) so far" in text.render(one).decode()


@pytest.mark.parametrize(
    ("name", "format", "chosen"),
    [
        ("r.json", None, "json"),
        ("R.JSON", None, "json"),
        ("junit.xml", None, "junit"),
        ("summary.txt", None, "text"),
        ("anything", "junit", "junit"),
        ("r.json", "text", "text"),
    ],
)
def test_the_format_is_named_or_follows_from_the_suffix(
    run: Run, tmp_path: Path, name: str, format: str | None, chosen: str
) -> None:
    assert write(run, tmp_path / "new" / name, format).name == chosen
    expected = {"json": render_json, "junit": render_junit, "text": text.render}[chosen](run)
    assert (tmp_path / "new" / name).read_bytes() == expected


@pytest.mark.parametrize(("name", "format"), [("r.pdf", None), ("r", None), ("r.json", "pdf")])
def test_an_unknown_format_names_those_known(
    run: Run, tmp_path: Path, name: str, format: str | None
) -> None:
    with pytest.raises(VmlabError) as refused:
        write(run, tmp_path / name, format)
    assert (format or name) in str(refused.value)
    for known in ("json", "junit", "text"):
        assert known in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with pytest.raises(VmlabError, match=r"cannot write .*r\.json"):
        write(run, tmp_path / "r.json")


PLUGIN = """
from vmlab.report import Writer
tap = Writer("tap", "TAP", (".tap", ".tap.json"), lambda run: f"1..{run.totals.tests}".encode())
json = Writer("json", "not that one", (".json",), lambda run: b"stolen")
other = "not a writer"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package with four entry points: one good, two broken, one with a taken name."""
    site = tmp_path / "site"
    (site / "tapwriter-1.dist-info").mkdir(parents=True)
    (site / "tapwriter-1.dist-info" / "METADATA").write_text("Name: tapwriter\nVersion: 1\n")
    (site / "tapwriter-1.dist-info" / "entry_points.txt").write_text(
        "[vmlab.report_writers]\n"
        "tap = vmlab_test_tapwriter:tap\n"
        "json = vmlab_test_tapwriter:json\n"
        "wrong = vmlab_test_tapwriter:other\n"
        "missing = vmlab_test_tapwriter_missing:x\n"
    )
    (site / "vmlab_test_tapwriter.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("installed")
def test_another_packages_writer_is_found_by_name_and_by_its_longer_suffix(
    run: Run, tmp_path: Path
) -> None:
    assert write(run, tmp_path / "a.tap").name == "tap"
    assert write(run, tmp_path / "b.tap.json").name == "tap"
    assert write(run, tmp_path / "c", "tap").name == "tap"
    assert (tmp_path / "c").read_bytes() == b"1..8"
    assert list(writers()) == ["json", "junit", "ctrf", "html", "results", "text", "tap"]


@pytest.mark.usefixtures("installed")
def test_a_built_in_format_cannot_be_taken_over(run: Run, tmp_path: Path) -> None:
    write(run, tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == render_json(run)
    assert find_writer(Path("x"), "json").render is render_json


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("format", "problem"),
    [("wrong", "is a str, not a vmlab.report.Writer"), ("missing", "ModuleNotFoundError")],
)
def test_a_broken_writer_says_what_is_wrong_when_it_is_asked_for(format: str, problem: str) -> None:
    with pytest.raises(VmlabError, match=problem):
        find_writer(Path("x"), format)
    with pytest.raises(VmlabError) as refused:
        find_writer(Path("x"), "none")
    assert (
        str(refused.value.hint)
        == "known are: json, junit, ctrf, html, results, text, missing, tap, wrong"
    )


def test_all_outcomes_have_a_colour() -> None:
    assert set(text._STYLES) == set(Outcome)

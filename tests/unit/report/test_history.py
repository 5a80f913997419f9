"""The history of metrics: one file, many writers, and runs against runs."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy
import pytest
from scipy import stats

from vmlab.machine.errors import VmlabError
from vmlab.report import Attempt, Direction, Metric, Run, Suite, Test
from vmlab.report.baseline import Verdict, any_worse, compare_runs
from vmlab.report.difference import MetricKey
from vmlab.report.history import History, RunSamples, history_path, samples_of_run

BOOT = MetricKey("boot", "s", "qemu")
STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def _run(id_: str, values: Sequence[float] = (1.0, 3.0, 2.0), *, hours: float = 0) -> Run:
    metrics = [Metric(name="boot", value=v, unit="s", direction=Direction.LOWER) for v in values]
    test = Test(
        suite="s", name="t", hypervisor="qemu", attempts=[Attempt(outcome="pass", metrics=metrics)]
    )
    started = STARTED + timedelta(hours=hours)
    return Run(
        id=id_,
        tool="t",
        version="1",
        started=started,
        finished=started,
        suites=[Suite(name="s", tests=[test])],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "history.sqlite"


def test_what_was_saved_is_there_for_the_next_process(path: Path) -> None:
    with History(path) as history:
        saved = history.save("main", [_run("b", hours=1), _run("a")], note="before the change")
        assert saved.runs == ("a", "b"), "oldest first"
    with History(path) as history:
        assert history.baselines() == [saved]
        assert (saved.name, saved.note) == ("main", "before the change")
        first, _ = history.samples("main")
        assert first == samples_of_run(_run("a"))
        assert first.values == {BOOT: [1.0, 3.0, 2.0]}
        assert first.directions == {BOOT: Direction.LOWER}
        assert (first.median(BOOT), first.median(MetricKey("x", "", ""))) == (2.0, None)


def test_a_name_is_taken_once(path: Path) -> None:
    with History(path) as history:
        history.save("main", [_run("a")])
        with pytest.raises(VmlabError, match="there is a baseline 'main' already"):
            history.save("main", [_run("b")])
        assert history.baseline("main").runs == ("a",)
        assert history.save("main", [_run("b"), _run("b")], replace=True).runs == ("b",)


def test_a_run_goes_with_the_last_baseline_that_has_it(path: Path) -> None:
    with History(path) as history:
        history.save("one", [_run("a"), _run("b")])
        history.save("two", [_run("b")])
        history.remove("one")
        assert [each.name for each in history.baselines()] == ["two"]
        assert history.samples("two")[0].values == {BOOT: [1.0, 3.0, 2.0]}
        history.remove("two")
    rows = sqlite3.connect(path)
    for table in ("runs", "samples", "baselines", "baseline_runs"):
        assert rows.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    rows.close()


def test_a_baseline_that_is_not_there_is_named_with_those_that_are(path: Path) -> None:
    with History(path) as history:
        for ask in (history.baseline, history.samples, history.remove):
            with pytest.raises(VmlabError, match="no baseline 'mian'") as refused:
                ask("mian")
            assert "there are: none" in str(refused.value.hint)
        history.save("main", [_run("a")])
        with pytest.raises(VmlabError) as refused:
            history.baseline("mian")
        assert "'main'" in str(refused.value.hint)


@pytest.mark.parametrize("name", ["", "two\nlines"])
def test_a_name_is_a_line(path: Path, name: str) -> None:
    with History(path) as history, pytest.raises(VmlabError, match="cannot name a baseline"):
        history.save(name, [_run("a")])


def test_runs_without_metrics_make_no_baseline(path: Path) -> None:
    with History(path) as history:
        with pytest.raises(VmlabError, match="would be empty: none of 1 runs has a metric"):
            history.save("main", [_run("a", [])])
        assert history.baselines() == []


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from vmlab.report import Attempt, Metric, Run, Suite, Test, history
from vmlab.report.history import History
history._PATIENCE_S = 500.0  # SQLite is not fair to who waits, and a disk may be slow
path, writer = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    metrics = [Metric(name="m", value=n) for n in range(50)]
    test = Test(suite="s", name="t", attempts=[Attempt(outcome="pass", metrics=metrics)])
    suites = [Suite(name="s", tests=[test])]
    run = Run(id=f"{writer}-{number}", tool="t", version="1",
              started=datetime(2026, 1, 1, tzinfo=UTC), suites=suites)
    with History(path) as history:
        history.save(f"{writer}-{number}", [run])
        history.save("shared", [run], replace=True)
"""


@pytest.mark.timeout(600)  # they take turns, and each waits for its disk
def test_several_processes_write_at_once_and_nothing_is_lost(path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in "abcd"
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        for writer in writers:  # the file is made by whoever comes first
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
        for writer in writers:
            _, errors = writer.communicate(timeout=500)
            assert (writer.returncode, errors) == (0, b"")
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    with History(path) as history:
        names = {each.name for each in history.baselines()}
        assert names == {"shared", *(f"{w}-{n}" for w in "abcd" for n in range(10))}
        for name in names:
            (samples,) = history.samples(name)
            assert list(samples.values.values()) == [[float(n) for n in range(50)]]


def test_who_read_first_and_writes_then_is_not_overtaken(path: Path) -> None:
    """Another writer comes between the two: it has to wait, and neither is refused."""
    overtaken = threading.Event()
    errors: list[BaseException] = []

    def other() -> None:
        try:
            with History(path) as history:
                history.save("other", [_run("b")])
        except BaseException as error:
            errors.append(error)
        overtaken.set()

    thread = threading.Thread(target=other)

    def between(statement: str) -> None:
        if statement.startswith("INSERT INTO baselines ") and thread.ident is None:
            thread.start()
            overtaken.wait(1)  # it cannot come through; were that possible, it would soon

    with History(path) as history:
        history._connection.set_trace_callback(between)
        history.save("main", [_run("a")])
        thread.join()
        assert errors == []
        assert [each.name for each in history.baselines()] == ["main", "other"]


def test_what_is_no_history_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 9)
    for bad in (tmp_path / "text", tmp_path, tmp_path / "text" / "below"):
        with pytest.raises(VmlabError, match="cannot be used") as refused:
            History(bad)
        assert str(bad) in str(refused.value)


def test_a_history_of_a_later_vmlab_is_left_alone(path: Path) -> None:
    History(path).close()
    rows = sqlite3.connect(path)
    rows.execute("PRAGMA user_version = 2")
    rows.close()
    with pytest.raises(VmlabError, match="of version 2, not 1"):
        History(path)


def test_the_setting_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert history_path({}) == tmp_path / "data" / "vmlab" / "history.sqlite"
    assert history_path({"VMLAB_HOME": "/h"}) == Path("/h/history.sqlite")
    configuration = tmp_path / "config" / "vmlab" / "config.toml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text('[images]\nstore = "/x"\n[report]\nhistory = "h.sqlite"\n')
    assert history_path({"VMLAB_HOME": "/h"}) == configuration.parent / "h.sqlite"
    assert history_path({"VMLAB_HISTORY": "/v"}) == Path("/v")
    other = tmp_path / "other.toml"
    for text, problem in [
        ("[report]\nhistory = 7\n", "report.history = 7 is no path"),
        ("report = 7\n", "report.history = 7 is no path"),
        ("[report\n", "cannot read"),
    ]:
        other.write_text(text)
        with pytest.raises(VmlabError, match=problem):
            history_path({"VMLAB_CONFIG": str(other)})
    monkeypatch.setenv("VMLAB_HISTORY", str(tmp_path / "mine.sqlite"))
    with History() as history:
        assert history.path == tmp_path / "mine.sqlite"


# ------------------------------------------------------------------------------- runs against runs


def _runs(dice: numpy.random.Generator, count: int, level: float) -> list[RunSamples]:
    """Runs that differ from each other by 5 %, each with ten samples that differ by 1 %."""
    runs = []
    for number in range(count):
        own = level * dice.normal(1, 0.05)
        runs.append(samples_of_run(_run(str(number), own * dice.normal(1, 0.01, 10))))
    return runs


def test_equal_runs_are_not_called_worse_although_their_samples_depend_on_each_other() -> None:
    dice = numpy.random.default_rng(11)
    trials = 300
    verdicts = [
        compare_runs(_runs(dice, 6, 1), _runs(dice, 6, 1))[0].comparison.verdict
        for _ in range(trials)
    ]
    wrong = trials - verdicts.count(Verdict.SAME) - verdicts.count(Verdict.CANNOT_TELL)
    assert wrong <= stats.binom.isf(1 / 1000, trials, 0.05)


def test_slower_runs_are_worse() -> None:
    dice = numpy.random.default_rng(11)
    changes = compare_runs(_runs(dice, 8, 1), _runs(dice, 8, 1.5))
    assert [(each.metric, each.comparison.verdict) for each in changes] == [(BOOT, Verdict.WORSE)]
    assert any_worse(changes)
    assert changes[0].comparison.n == (8, 8)
    better = compare_runs(_runs(dice, 8, 1.5), _runs(dice, 8, 1))
    assert better[0].comparison.verdict is Verdict.BETTER
    assert not any_worse(better)


def test_one_run_on_each_side_tells_nothing_however_many_samples_it_has() -> None:
    slow, fast = samples_of_run(_run("a", [2.0] * 50)), samples_of_run(_run("b", [1.0] * 50))
    (change,) = compare_runs([slow], [fast])
    assert change.comparison.verdict is Verdict.CANNOT_TELL
    assert change.comparison.reason == "1 and 1 samples are too few for any difference to show"


def test_only_what_both_sides_measured_is_compared() -> None:
    assert compare_runs([samples_of_run(_run("a"))], [samples_of_run(_run("b", []))]) == []
    assert compare_runs([], [samples_of_run(_run("b"))]) == []

"""The recorder: what is called is what is read back, from one process or from many."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from vmlab import __version__
from vmlab.machine.errors import VmlabError
from vmlab.report import (
    AttemptRecorder,
    Direction,
    Outcome,
    Recorder,
    Severity,
    Sync,
    read_run,
)
from vmlab.report import attempt as attempt_module


def test_a_run_says_what_it_was_told(tmp_path: Path) -> None:
    recorder = Recorder.create(
        tmp_path,
        tool="vmlab test",
        version="9",
        run_id="my-run",
        seed=7,
        command=["vmlab", "test"],
        environment={"accelerator": "tcg", "cpus": -1},
        labels={"branch": "main"},
    )
    recorder.message("disk is slow", severity=Severity.WARNING, source="host")
    recorder.attach("host.txt", "facts")
    run = recorder.close()
    assert run is not None
    assert (run.tool, run.version, run.id, run.seed) == ("vmlab test", "9", "my-run", 7)
    assert (run.command, run.labels) == (("vmlab", "test"), {"branch": "main"})
    assert (run.environment["accelerator"], run.environment["cpus"]) == ("tcg", -1)
    assert {"hostname", "kernel", "architecture", "python"} <= run.environment.keys()
    assert [(m.text, m.severity, m.source) for m in run.messages] == [
        ("disk is slow", Severity.WARNING, "host")
    ]
    assert [artifact.name for artifact in run.artifacts] == ["host.txt"]
    assert run == read_run(tmp_path)


def test_a_run_names_itself_and_its_version(tmp_path: Path) -> None:
    runs = [Recorder.create(tmp_path / name, tool="t").close() for name in "ab"]
    assert runs[0] and runs[1] and runs[0].id != runs[1].id
    assert runs[0].version == __version__


def test_an_attempt_says_what_it_was_told(recorder: Recorder, turnable: Any) -> None:
    attempt = recorder.start("s", "t", hypervisor="qemu", labels={"image": "tiny"})
    turnable.pass_(1.5)
    assert attempt.check("state", True, expected="paused", actual="paused")
    assert attempt.check("known", Outcome.XFAIL, "issue 7", expected=1, actual=b"\xff")
    attempt.metric("boot_s", 1.25, "s", direction=Direction.LOWER)
    attempt.message("warm", details="it was", source="image")
    attempt.output("stdout", "one ")
    attempt.output("stderr", b"oops \xff")
    attempt.output("stdout", "two")
    turnable.pass_(0.5)
    assert attempt.outcome is Outcome.PENDING
    assert attempt.finish() is Outcome.PASS
    test = recorder.snapshot().test("s", "t")
    assert (test.hypervisor, test.labels) == ("qemu", {"image": "tiny"})
    last = test.last
    assert last is not None
    assert (last.duration_s, last.worker) == (2.0, "main")
    assert last.finished is not None and last.started is not None
    assert last.finished - last.started == timedelta(seconds=2)
    assert [(c.name, c.outcome, c.expected, c.actual) for c in test.checks] == [
        ("state", "pass", "paused", "paused"),
        ("known", "xfail", "1", "\\xff"),
    ]
    (metric,) = test.metrics
    assert (metric.value, metric.unit, metric.direction, metric.at_s) == (1.25, "s", "lower", 1.5)
    assert [(m.text, m.details, m.source) for m in test.messages] == [("warm", "it was", "image")]
    assert [(o.stream, o.text) for o in test.output] == [
        ("stdout", "one two"),
        ("stderr", "oops \\xff"),
    ]


def test_a_planned_test_is_pending_until_it_ends(recorder: Recorder) -> None:
    recorder.plan("s", ["a", "b"], labels={"x": "y"})
    recorder.plan("s", [])
    assert [(t.name, t.outcome) for t in recorder.snapshot().tests()] == [
        ("a", "pending"),
        ("b", "pending"),
    ]
    begun = recorder.start("s", "b")
    assert recorder.snapshot().test("s", "b").reason == "begun, never finished"
    begun.finish("pass")
    assert recorder.snapshot().test("s", "b").outcome is Outcome.PASS
    assert recorder.snapshot().test("s", "b").labels == {"x": "y"}
    assert recorder.snapshot().test("s", "a").reason == "planned, never begun"


@pytest.mark.parametrize(
    ("checks", "stated", "recorded"),
    [
        ([], None, "pass"),
        ([True, True], None, "pass"),
        ([True, False], None, "fail"),
        ([False, Outcome.ERROR], None, "error"),
        ([Outcome.XFAIL], None, "xfail"),
        ([Outcome.XFAIL, True], None, "pass"),
        ([Outcome.SKIP], None, "skip"),
        ([Outcome.SKIP], "pass", "pass"),
        ([False], "pass", "fail"),
        ([False], "xfail", "xfail"),
        ([False], "skip", "skip"),
        ([True], "fail", "fail"),
        ([], "error", "error"),
    ],
)
def test_a_pass_that_a_check_contradicts_is_not_recorded(
    attempt: AttemptRecorder,
    recorder: Recorder,
    checks: list[Outcome | bool],
    stated: Any,
    recorded: str,
) -> None:
    for number, outcome in enumerate(checks):
        attempt.check(f"c{number}", outcome)
    assert attempt.finish(stated) == recorded
    assert attempt.finished
    assert attempt.outcome == recorded
    assert recorder.snapshot().test("s", "t").outcome == recorded


def test_reasons_are_kept_where_they_belong(recorder: Recorder) -> None:
    recorder.start("s", "fails").finish("fail", reason=b"wrong \xff", details="why")
    recorder.start("s", "passes").finish("pass", reason="by luck")
    recorder.skip("s", "skipped", "no KVM", hypervisor="qemu", labels={"a": "b"})
    recorder.start("s", "skipped without").finish("skip")
    unchecked = recorder.start("s", "all skipped")
    unchecked.check("c", Outcome.SKIP)
    unchecked.finish()
    run = recorder.snapshot()
    (failure,) = run.test("s", "fails").messages
    assert (failure.text, failure.severity, failure.details) == ("wrong \\xff", "error", "why")
    assert run.test("s", "passes").messages[0].severity is Severity.INFO
    assert [run.test("s", name).skip_reason for name in ("skipped", "skipped without")] == [
        "no KVM",
        "no reason was given",
    ]
    assert run.test("s", "all skipped").skip_reason == "all of its checks were skipped"
    assert run.test("s", "skipped").hypervisor == "qemu"


def test_a_block_that_raises_is_an_error_with_its_traceback(recorder: Recorder) -> None:
    with pytest.raises(OSError, match="gone"), recorder.start("s", "raises"):
        raise OSError("disk gone \udcff")
    with recorder.start("s", "ends"):
        pass
    with recorder.start("s", "ended") as ended:
        ended.finish("xfail")
    with pytest.raises(OSError, match="late"), recorder.start("s", "late") as late:
        late.finish("pass")
        raise OSError("late")
    run = recorder.snapshot()
    (message,) = run.test("s", "raises").messages
    assert message.text == "OSError: disk gone \\xff"
    assert 'raise OSError("disk gone' in message.details
    assert [run.test("s", name).outcome for name in ("raises", "ends", "ended", "late")] == [
        "error",
        "pass",
        "xfail",
        "pass",
    ]


def test_nothing_is_recorded_after_the_end(attempt: AttemptRecorder, recorder: Recorder) -> None:
    attempt.finish("pass")
    for call in (
        lambda: attempt.check("c", False),
        lambda: attempt.metric("m", 1),
        lambda: attempt.message("m"),
        lambda: attempt.output("stdout", "x"),
        lambda: attempt.attach("a", b""),
        lambda: attempt.ran_on("qemu"),
        lambda: attempt.finish("fail"),
    ):
        with pytest.raises(VmlabError, match="has ended already: pass") as refused:
            call()
        assert "before finish" in str(refused.value.hint)
    assert recorder.snapshot().test("s", "t").outcome is Outcome.PASS


def test_pending_is_no_end(attempt: AttemptRecorder) -> None:
    with pytest.raises(VmlabError, match="cannot end as pending"):
        attempt.finish(Outcome.PENDING)  # what a caller might try
    with pytest.raises(VmlabError, match="cannot be pending"):
        attempt.check("c", Outcome.PENDING)
    assert attempt.finish() is Outcome.PASS


def test_a_closed_recorder_says_so(tmp_path: Path) -> None:
    recorder = Recorder.create(tmp_path, tool="t")
    assert recorder.close() is not None
    assert recorder.closed
    assert recorder.close() is None
    with pytest.raises(VmlabError, match="is closed"):
        recorder.plan("s", ["t"])


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda r: r.start("", "t"), "suite = ''"),
        (lambda r: r.plan("s", ["ok", ""]), "name = ''"),
        (lambda r: r.start("s", "t").metric("m", float("nan")), "value = nan"),
        (lambda r: r.start("s", "t").metric("m", "fast"), "value = 'fast'"),
        (lambda r: r.start("s", "t").check("c", "green"), "outcome = 'green'"),
        (lambda r: r.message(3), "text = 3"),
    ],
)
def test_what_cannot_stand_in_a_report_is_refused_by_field_and_value(
    recorder: Recorder, call: Any, problem: str
) -> None:
    with pytest.raises(VmlabError, match="cannot be recorded") as refused:
        call(recorder)
    assert problem in str(refused.value)


def test_a_bad_run_id_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(VmlabError, match=r"id = '\.\./x'"):
        Recorder.create(tmp_path / "run", tool="t", run_id="../x")
    assert list(tmp_path.iterdir()) == []


def test_the_hypervisor_may_become_known_late(recorder: Recorder) -> None:
    recorder.plan("s", ["t", "u"])
    late = recorder.start("s", "t")
    late.ran_on("qemu")
    assert late.hypervisor == "qemu"
    late.finish("pass")
    with pytest.raises(VmlabError, match="hypervisor = ''"):
        recorder.start("s", "u").ran_on("")
    assert [(t.name, t.hypervisor) for t in recorder.snapshot().tests()] == [
        ("t", "qemu"),
        ("u", None),
    ]


def test_one_test_on_two_hypervisors_is_two_tests(recorder: Recorder) -> None:
    recorder.plan("s", ["t"])
    recorder.start("s", "t", hypervisor="qemu").finish("pass")
    recorder.start("s", "t", hypervisor="simulated").finish("fail")
    recorder.start("s", "t").finish("error")
    assert [(t.hypervisor, t.outcome) for t in recorder.snapshot().tests()] == [
        ("qemu", "pass"),
        ("simulated", "fail"),
        (None, "error"),
    ]


def test_a_plan_with_a_hypervisor_is_met_by_a_start_without(recorder: Recorder) -> None:
    recorder.plan("s", ["t"], hypervisor="qemu")
    recorder.start("s", "t").finish("pass")
    assert [(t.hypervisor, t.outcome) for t in recorder.snapshot().tests()] == [("qemu", "pass")]


def test_a_second_attempt_counts_and_the_first_is_kept(recorder: Recorder, turnable: Any) -> None:
    recorder.start("s", "t").finish("fail")
    turnable.pass_(1)
    recorder.start("s", "t").finish("pass")
    test = recorder.snapshot().test("s", "t")
    assert [attempt.outcome for attempt in test.attempts] == ["fail", "pass"]
    assert test.flaky


def test_files_are_kept_whole_under_safe_names(
    attempt: AttemptRecorder, recorder: Recorder, tmp_path: Path
) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(range(256)) * 10_000)
    kept = [
        attempt.attach("../../etc/passwd", b"x"),
        attempt.attach("console.log", "text \udcff ü"),
        attempt.attach("console.log", b"again"),
        attempt.attach("big.bin", big),
        attempt.attach("...", b""),
        attempt.attach("shot.png", b"", media_type="image/x-png"),
        attempt.attach("shot.png", bytearray(b"y")),
        recorder.attach("\udcff.json", b"{}"),
    ]
    for artifact in kept:
        file = recorder.directory / artifact.path
        assert file.resolve().parent == (recorder.directory / "artifacts").resolve()
        assert hashlib.sha256(file.read_bytes()).hexdigest() == artifact.sha256
        assert file.stat().st_size == artifact.size
    assert len({artifact.path for artifact in kept}) == len(kept)
    assert (recorder.directory / kept[1].path).read_text("utf-8") == "text \\xff ü"
    assert (recorder.directory / kept[3].path).read_bytes() == big.read_bytes()
    assert [artifact.media_type for artifact in kept] == [
        "application/octet-stream",
        "text/plain",
        "text/plain",
        "application/octet-stream",
        "application/octet-stream",
        "image/x-png",
        "image/png",
        "application/json",
    ]
    assert list(recorder.snapshot().test("s", "t").artifacts) == kept[:-1]


def test_a_file_that_cannot_be_read_is_named(attempt: AttemptRecorder, tmp_path: Path) -> None:
    with pytest.raises(VmlabError, match=r"cannot keep .*none\.log"):
        attempt.attach("x", tmp_path / "none.log")
    assert not (tmp_path / "run" / "artifacts").exists()
    assert attempt.finish() is Outcome.PASS


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file whose reading fails")
def test_a_file_that_cannot_be_stored_leaves_no_part_of_it(
    attempt: AttemptRecorder, recorder: Recorder
) -> None:
    with pytest.raises(VmlabError, match="Input/output error"):
        attempt.attach("x", Path("/proc/self/mem"))
    assert list((recorder.directory / "artifacts").iterdir()) == []
    assert recorder.snapshot().test("s", "t").artifacts == ()


def test_long_output_keeps_its_ends_and_says_what_is_missing(
    attempt: AttemptRecorder, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "OUTPUT_LIMIT", 10)
    attempt.output("stdout", "0123")
    attempt.output("stdout", "456789abcdef")
    attempt.output("stdout", "more")
    attempt.output("stderr", "0123456789")
    attempt.finish()
    stdout, stderr = recorder.snapshot().test("s", "t").output
    assert stdout.text == "0123456\n[... 6 characters left out ...]\ndef"
    assert stdout.omitted == 10
    assert (stderr.text, stderr.omitted) == ("0123456789", 0)


def test_a_clock_that_goes_back_changes_no_duration_and_is_remarked(
    tmp_path: Path, turnable: Any
) -> None:
    recorder = Recorder.create(tmp_path, tool="t", clock=turnable.clock)
    attempt = recorder.start("s", "t")
    turnable.pass_(2)
    turnable.time -= timedelta(hours=1)
    attempt.finish("pass")
    recorder.start("s", "t").finish("fail")
    run = recorder.close()
    assert run is not None
    assert [attempt.outcome for attempt in run.test("s", "t").attempts] == ["pass", "fail"]
    assert run.test("s", "t").duration_s == 2
    assert run.duration_s == 2
    (warning,) = run.messages
    assert warning.text.startswith("the host's clock went back by 3598 s")


def test_a_monotonic_clock_that_fails_gives_no_negative_duration(
    attempt: AttemptRecorder, recorder: Recorder, turnable: Any
) -> None:
    turnable.seconds -= 5
    attempt.finish("pass")
    assert recorder.snapshot().test("s", "t").duration_s == 0


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    Recorder.create(tmp_path, tool="t").close()
    for _ in range(2):
        with pytest.raises(VmlabError, match="holds a run already") as refused:
            Recorder.create(tmp_path, tool="t")
        assert "Recorder.join" in str(refused.value.hint)
        (tmp_path / "journal" / "main.jsonl").unlink(missing_ok=True)


def test_of_two_that_create_a_run_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder.create(tmp_path, tool="t")._journal.close()
    monkeypatch.setattr("vmlab.report.recorder.has_journal", lambda directory: False)
    with pytest.raises(VmlabError, match="holds a run already"):
        Recorder.create(tmp_path, tool="t")


@pytest.mark.parametrize("name", ["", "main", "a/b", "..", "gw 0", "x" * 65])
def test_a_worker_needs_a_name_that_is_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(VmlabError, match="cannot name a worker"):
        Recorder.join(tmp_path, name)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VmlabError, match=r"cannot write .*main\.jsonl.*Not a directory"):
        Recorder.create(tmp_path / "file" / "run", tool="t")


def test_workers_write_journals_of_their_own_and_merge_in_a_stable_order(tmp_path: Path) -> None:
    owner = Recorder.create(tmp_path, tool="t")
    owner.plan("s", ["one", "two"])
    for worker in ("gw10", "gw2", "gw2", "gw1"):
        with Recorder.join(tmp_path, worker) as joined:
            assert joined.close() is None
        with Recorder.join(tmp_path, f"{worker}x") as joined:
            joined.start("s", f"{joined.worker} only").finish("pass")
            joined.start("s", "two").finish("pass")
    run = owner.close()
    assert run is not None
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == sorted(
        f"{name}.jsonl"
        for name in (
            *("main", "gw1", "gw10", "gw2", "gw2-2"),
            *("gw1x", "gw10x", "gw2x", "gw2x-2"),
        )
    )
    assert [test.name for test in run.tests()] == [
        "one",
        "two",
        "gw1x only",
        "gw2x only",
        "gw2x-2 only",
        "gw10x only",
    ]
    two = run.test("s", "two")
    assert [a.worker for a in two.attempts] == ["gw10x", "gw2x", "gw2x-2", "gw1x"], "as they began"


def test_threads_share_a_recorder(tmp_path: Path) -> None:
    recorder = Recorder.create(tmp_path, tool="t", sync=Sync.NEVER)

    def work(thread: int) -> None:
        for number in range(50):
            with recorder.start("s", f"{thread}-{number}") as attempt:
                attempt.metric("n", number)
                attempt.output("stdout", f"{thread}-{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run = recorder.close()
    assert run is not None
    assert run.totals.passed == 400
    assert not run.messages
    for test in run.tests():
        assert test.output[0].text == test.name
        assert test.metrics[0].value == int(test.name.split("-")[1])


WORKER = """
import sys
from vmlab.report import Recorder
with Recorder.join(sys.argv[1], sys.argv[2]) as recorder:
    for number in range(100):
        with recorder.start("s", f"{sys.argv[2]}-{number:03}") as attempt:
            attempt.check("ok", number != 50)
"""


def test_processes_write_at_once(tmp_path: Path) -> None:
    owner = Recorder.create(tmp_path, tool="t")
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), f"gw{number}"])
        for number in range(3)
    ]
    assert [process.wait(280) for process in processes] == [0, 0, 0]
    run = owner.close()
    assert run is not None
    assert (run.totals.passed, run.totals.failed, run.totals.tests) == (297, 3, 300)
    assert [test.name for test in run.tests()] == sorted(test.name for test in run.tests())


FORKED = """
import os, sys
from vmlab.machine.errors import VmlabError
from vmlab.report import Recorder
recorder = Recorder.create(sys.argv[1], tool="t")
child = os.fork()
if child == 0:
    try:
        recorder.plan("s", ["from the child"])
    except VmlabError as error:
        print(error, "|", error.hint, flush=True)
        Recorder.join(sys.argv[1], "child").skip("s", "t", "from the child")
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
print(recorder.close().test("s", "t").skip_reason)
"""


def test_a_forked_child_is_told_to_join(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=280,
    )
    first, second = done.stdout.splitlines()
    assert "belongs to process" in first and "Recorder.join" in first
    assert second == "from the child"


def test_ten_thousand_tests_are_merged_and_written(tmp_path: Path) -> None:
    recorder = Recorder.create(tmp_path, tool="t", sync=Sync.NEVER)
    recorder.plan("s", [f"test_{number}" for number in range(10_000)])
    for number in range(10_000):
        with recorder.start("s", f"test_{number}", hypervisor="simulated") as attempt:
            attempt.check("c", True)
    run = recorder.close()
    assert run is not None
    assert (run.totals.passed, run.totals.tests) == (10_000, 10_000)
    assert json.loads((tmp_path / "report.json").read_bytes())["totals"]["pass"] == 10_000

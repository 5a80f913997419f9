"""The journal after a death: kill -9 at many moments, torn and damaged lines, a full disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vmlab.machine.errors import VmlabError
from vmlab.report import Clock, Outcome, Recorder, Sync, durable, host, read_run
from vmlab.report.durable import AppendFile, write_atomically
from vmlab.report.journal import read_journals

# Says each step on standard output once it is done, and then waits to be killed.
STEPWISE = """
import sys
from vmlab.report import Recorder
def reached(step):
    print(step, flush=True)
    if step == sys.argv[2]:
        sys.stdin.read()
recorder = Recorder.create(sys.argv[1], tool="t", seed=7)
reached("created")
recorder.plan("s", ["first", "second", "third"])
reached("planned")
recorder.start("s", "first").finish("pass")
reached("first finished")
second = recorder.start("s", "second")
reached("second started")
second.check("state", False, expected="paused", actual="running")
second.attach("console.log", "panic")
reached("second checked")
second.finish()
reached("second finished")
recorder.skip("s", "third", "no GPU")
reached("third skipped")
recorder.close()
reached("closed")
"""

PENDING = ["pending"] * 3
AFTER = {
    "created": [],
    "planned": PENDING,
    "first finished": ["pass", "pending", "pending"],
    "second started": ["pass", "pending", "pending"],
    "second checked": ["pass", "pending", "pending"],
    "second finished": ["pass", "fail", "pending"],
    "third skipped": ["pass", "fail", "skip"],
    "closed": ["pass", "fail", "skip"],
}


@contextmanager
def _child(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("step", AFTER)
def test_after_a_kill_what_was_known_is_read(tmp_path: Path, step: str) -> None:
    with _child(STEPWISE, str(tmp_path), step) as child:
        assert child.stdout is not None
        while child.stdout.readline().strip() != step:
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        assert child.wait(280) == -signal.SIGKILL
    run = read_run(tmp_path)
    assert [test.outcome for test in run.tests()] == AFTER[step]
    assert run.seed == 7
    assert (run.finished is not None) == (step == "closed")
    assert run.messages == ()
    if step == "second checked":
        second = run.test("s", "second")
        assert second.reason == (
            "begun, never finished; check 'state': fail (expected paused, got running)"
        )
        assert second.checks[0].actual == "running"
        assert (tmp_path / second.artifacts[0].path).read_text() == "panic"
    if step != "closed":
        assert not run.outcome.ok


# Records as fast as it can, and says so after each result is recorded.
ENDLESS = """
import itertools, sys
from vmlab.report import Recorder
recorder = Recorder.create(sys.argv[1], tool="t")
for number in itertools.count():
    with recorder.start("s", f"t{number}") as attempt:
        attempt.output("stdout", "x" * 3000)
        attempt.check("odd", number % 2 == 1)
    print(number, flush=True)
"""


@pytest.mark.parametrize("results", [1, 2, 5, 17, 40, 99])
def test_a_kill_in_the_middle_of_recording_loses_nothing_that_was_said(
    tmp_path: Path, results: int
) -> None:
    with _child(ENDLESS, str(tmp_path)) as child:
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(results)]
        child.kill()
        said += [int(line) for line in child.stdout.read().splitlines()]
    run = read_run(tmp_path)
    outcomes = [test.outcome for test in run.tests()]
    assert len(said) >= results
    assert [o.value for o in outcomes[: len(said)]] == [
        "pass" if number % 2 else "fail" for number in said
    ]
    # The one that was running may have ended, unsaid; after it there is nothing.
    assert len(outcomes) <= len(said) + 1
    assert run.messages == ()


def _recorded(directory: Path) -> Path:
    """A run of two tests, killed before its end; returns its journal."""
    recorder = Recorder.create(directory, tool="t", seed=1, environment={})
    recorder.plan("s", ["a", "b"])
    with recorder.start("s", "a", hypervisor="qemu") as attempt:
        attempt.check("c", False)
        attempt.metric("m", 1)
    with recorder.start("s", "b") as attempt:
        attempt.ran_on("qemu")
        attempt.message("hm")
        attempt.attach("x", b"y")
        attempt.output("stdout", "o")
    recorder._journal.close()
    return directory / "journal" / "main.jsonl"


def test_a_journal_cut_off_at_any_byte_is_read(tmp_path: Path) -> None:
    journal = _recorded(tmp_path)
    whole = journal.read_bytes()
    first = whole.index(b"\n")
    best = {"a": "fail", "b": "pass"}
    seen = set()
    for length in range(len(whole), -1, -1):
        os.truncate(journal, length)
        if length < first:
            with pytest.raises(VmlabError, match="no run is recorded"):
                read_journals(tmp_path)
            continue
        run = read_journals(tmp_path)
        assert run.messages == (), "a torn last line is expected, not damage"
        outcomes = {test.name: test.outcome.value for test in run.tests()}
        assert all(outcome in ("pending", best[name]) for name, outcome in outcomes.items())
        seen.add(tuple(outcomes.values()))
    assert seen == {("fail", "pass"), ("fail", "pending"), ("pending", "pending"), ()}


def test_a_damaged_line_is_left_out_and_reported(tmp_path: Path) -> None:
    journal = _recorded(tmp_path)
    lines = journal.read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines)):
        for damage in (
            b"\x00" * 20,
            b"{}",
            b"[]",
            b'{"event": "dance", "n": 1}',
            lines[number][9:],
        ):
            broken = [*lines]
            broken[number] = damage.rstrip(b"\n") + b"\n"
            journal.write_bytes(b"".join(broken))
            run = read_journals(tmp_path)
            assert run.messages, (number, damage)
            assert run.messages[0].text == (
                f"journal main.jsonl, line {number + 1} is damaged and was left out"
            )
            assert run.messages[0].severity == "warning"
            for test in run.tests():
                assert test.outcome in ({"a": "fail", "b": "pass"}[test.name], "pending")


def test_random_damage_never_breaks_the_reader(tmp_path: Path) -> None:
    journal = _recorded(tmp_path)
    whole = journal.read_bytes()
    dice = random.Random(7)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        journal.write_bytes(damaged)
        try:
            run = read_journals(tmp_path)
        except VmlabError as error:
            assert "no run is recorded" in str(error)
            continue
        assert run.totals.tests <= 6


def _event(directory: Path, **event: Any) -> None:
    with (directory / "journal" / "main.jsonl").open("a") as journal:
        journal.write(json.dumps(event) + "\n")


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ({"event": "finish", "n": 99}, "KeyError"),
        ({"event": "check", "n": 2, "check": {"name": "c", "outcome": "fail"}}, "has ended"),
        ({"event": "check", "n": None, "check": {"name": "c", "outcome": "fail"}}, "of its own"),
        ({"event": "message", "n": None, "message": {"text": 5}}, "ValidationError"),
        ({"event": "hypervisor", "n": [], "hypervisor": "x"}, "TypeError"),
        ({"event": "open", "journal": "vmlab.journal/2"}, "vmlab.journal/2"),
        (
            {
                "event": "open",
                "journal": "vmlab.journal/1",
                "worker": "main",
                "clock": "c",
                "at": "2026-01-01T00:00:00Z",
                "run": {"id": "other", "tool": "t", "version": "1"},
            },
            "is of run 'other'",
        ),
    ],
)
def test_a_line_that_makes_no_sense_is_left_out_and_reported(
    tmp_path: Path, event: dict[str, Any], problem: str
) -> None:
    _recorded(tmp_path)
    before = read_journals(tmp_path)
    _event(tmp_path, **event)
    after = read_journals(tmp_path)
    assert after.suites == before.suites
    (message,) = after.messages
    assert problem in message.details


def test_a_later_vmlabs_field_is_ignored(tmp_path: Path) -> None:
    _recorded(tmp_path)
    _event(tmp_path, event="message", n=None, message={"text": "x", "colour": "red"})
    assert [message.text for message in read_journals(tmp_path).messages] == ["x"]


def test_a_worker_that_closes_does_not_end_the_run(tmp_path: Path) -> None:
    owner = Recorder.create(tmp_path, tool="t")
    Recorder.join(tmp_path, "gw0").close()
    assert owner.snapshot().finished is None
    assert owner.close() is not None


def test_journals_of_no_run_are_named(tmp_path: Path) -> None:
    with Recorder.join(tmp_path, "gw0") as worker, pytest.raises(VmlabError, match="no run is"):
        worker.snapshot()


def test_a_journal_that_may_not_be_read_is_named(ordinary_user: Path) -> None:
    _recorded(ordinary_user).chmod(0)
    with pytest.raises(VmlabError, match=r"cannot read the journal .*main\.jsonl"):
        read_journals(ordinary_user)


def test_a_journal_that_is_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal" / "main.jsonl").mkdir(parents=True)
    with pytest.raises(VmlabError, match=r"cannot read the journal .*main\.jsonl"):
        read_journals(tmp_path)


def test_attempts_of_several_hosts_are_ordered_by_the_time_of_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A farm: each host's monotonic clock began at another time."""
    Recorder.create(tmp_path, tool="t").close()
    for worker, hour, monotonic, outcome in [("a", 9, 5.0, "pass"), ("b", 8, 900.0, "fail")]:
        clock = Clock(
            now=lambda hour=hour: datetime(2026, 1, 1, hour, tzinfo=UTC),
            monotonic=lambda monotonic=monotonic: monotonic,
        )
        monkeypatch.setattr("vmlab.report.journal_writer.clock_identity", lambda w=worker: w)
        with Recorder.join(tmp_path, worker, clock=clock) as recorder:
            recorder.start("s", "t").finish(outcome)
    assert read_journals(tmp_path).test("s", "t").outcome is Outcome.PASS


# A disk that is full in the middle of a line, and has room again later.
FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from vmlab.machine.errors import VmlabError
from vmlab.report import Recorder, read_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = Path(sys.argv[1])
recorder = Recorder.create(directory, tool="t")
first = recorder.start("s", "first")
size = (directory / "journal" / "main.jsonl").stat().st_size
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
try:
    first.finish("pass")
except VmlabError as error:
    print(error, "|", error.hint)
assert (directory / "journal" / "main.jsonl").stat().st_size == size + 20, "a torn line"
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
first.finish("fail", reason="retried")
run = recorder.close()
print([test.outcome.value for test in run.tests()], [m.text for m in run.messages])
"""


def test_a_full_disk_is_an_error_and_harms_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=280,
    )
    error, result = done.stdout.splitlines()
    assert "cannot write" in error and "main.jsonl" in error and "free some space" in error
    assert result.startswith("['fail'] ['journal main.jsonl, line 3 is damaged")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: write(fd, bytes(data[:3])))
    file = AppendFile(tmp_path / "f")
    file.append(b"0123456789")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"0123456789\n"


def test_a_failed_write_harms_only_its_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendFile(tmp_path / "f")
    write = os.write
    calls = iter([True, False])

    def full(fd: int, data: bytes) -> int:
        if next(calls):
            return write(fd, bytes(data[:4]))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "write", full)
        with pytest.raises(VmlabError, match="No space left"):
            file.append(b"0123456789")
    file.append(b"next")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"0123\nnext\n"


@pytest.mark.parametrize(
    ("sync", "plain", "durable_too"),
    [(Sync.ALWAYS, 3, 4), (Sync.INTERVAL, 0, 1), (Sync.NEVER, 0, 0)],
)
def test_the_policy_decides_what_is_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: Sync, plain: int, durable_too: int
) -> None:
    forced: list[int] = []
    seconds = [100.0]
    monkeypatch.setattr(durable.time, "monotonic", lambda: seconds[0])
    file = AppendFile(tmp_path / "f", sync=sync)
    monkeypatch.setattr(durable.os, "fsync", forced.append)
    for _ in range(3):
        file.append(b"x")
    assert len(forced) == plain
    file.append(b"x", durable=True)
    assert len(forced) == durable_too
    seconds[0] += durable.SYNC_INTERVAL_S
    file.append(b"x")
    assert len(forced) == durable_too + (sync is not Sync.NEVER)
    before = len(forced)
    file.close()
    file.close()
    assert len(forced) == before + (sync is not Sync.NEVER)


def test_a_run_that_cannot_begin_leaves_no_journal_and_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[AppendFile] = []

    def full(file: AppendFile, data: bytes) -> None:
        opened.append(file)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(AppendFile, "_write", full)
        with pytest.raises(VmlabError, match="No space left"):
            Recorder.create(tmp_path, tool="t")
    assert [file.closed for file in opened] == [True]
    opened[0].abandon()
    assert Recorder.create(tmp_path, tool="t").close() is not None, "it can be tried again"


def test_another_process_may_close_but_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendFile(tmp_path / "f")
    own = os.getpid()
    monkeypatch.setattr(durable.os, "getpid", lambda: own + 1)
    with pytest.raises(VmlabError, match=f"belongs to process {own}"):
        file.append(b"x")
    file.close()
    assert (tmp_path / "f").read_bytes() == b""


def test_a_disk_that_fails_at_the_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendFile(tmp_path / "f")

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable.os, "fsync", fails)
    with pytest.raises(VmlabError, match="Input/output error"):
        file.close()
    assert file.closed


def test_a_document_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "report.json"
    write_atomically(target, b"old")

    def fails(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "fsync", fails)
        with pytest.raises(VmlabError, match=r"report\.json: No space left"):
            write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["report.json"]


def test_host_facts_hold_no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2hunter2")
    facts = host.host_facts()
    assert "hunter2hunter2" not in repr(facts)
    assert int(facts["memory_bytes"]) > 2**20
    monkeypatch.setattr(host.os, "sysconf_names", {})
    assert "memory_bytes" not in host.host_facts()


def test_a_host_without_boot_id_still_tells_its_boots_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.clock_identity() == host.clock_identity()
    monkeypatch.setattr(host, "_BOOT_ID", tmp_path / "none")
    monkeypatch.setattr(host.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(host.time, "time", lambda: 1_000_000.0)
    before = host.clock_identity()
    monkeypatch.setattr(host.time, "time", lambda: 2_000_000.0)
    assert host.clock_identity() != before

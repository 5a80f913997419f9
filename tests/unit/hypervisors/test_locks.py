from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmlab.hypervisors import locks
from vmlab.hypervisors.locks import FileLock, busy, locked_now
from vmlab.machine.errors import OperationFailed

HOLD = """
import sys, time
from pathlib import Path
from vmlab.hypervisors.locks import FileLock
lock = FileLock.take(Path(sys.argv[1]))
print("held" if lock else "busy", flush=True)
sys.stdin.read()
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    first = FileLock.take(tmp_path / "lock")
    assert first is not None
    assert first.held
    assert FileLock.take(tmp_path / "lock") is None
    first.release()
    assert not first.held
    first.release()
    second = FileLock.take(tmp_path / "lock")
    assert second is not None
    second.release()


def test_the_lock_of_a_removed_file_is_worth_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    flock = locks.fcntl.flock

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        path.unlink(missing_ok=True)

    monkeypatch.setattr(locks.fcntl, "flock", removed_meanwhile)
    assert FileLock.take(path) is None

    def replaced_meanwhile(descriptor: int, operation: int) -> None:
        removed_meanwhile(descriptor, operation)
        path.touch()

    monkeypatch.setattr(locks.fcntl, "flock", replaced_meanwhile)
    assert FileLock.take(path) is None


def test_an_exclusive_lock_file_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with pytest.raises(FileExistsError):
        FileLock.take(tmp_path / "lock", exclusive=True)
    with pytest.raises(FileNotFoundError):
        FileLock.take(tmp_path / "other", create=False)


def test_a_link_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        FileLock.take(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_death_by_kill_lets_go_of_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert FileLock.take(path) is None
        holder.kill()
        holder.wait()
        lock = FileLock.take(path)
        assert lock is not None
        lock.release()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, threads
def test_a_fork_does_not_hold_the_lock_beyond_its_parent(tmp_path: Path) -> None:
    lock = FileLock.take(tmp_path / "lock")
    assert lock is not None
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(to_parent, b".")
            os.read(from_parent, 1)
            os._exit(1 if lock.held else 0)
        finally:
            os._exit(2)
    os.read(from_child, 1)
    still = FileLock.take(tmp_path / "lock")
    # Not `release`, which unlocks for all who share the file: as if this process had died.
    lock.drop()
    again = FileLock.take(tmp_path / "lock")
    os.write(to_child, b".")
    _, status = os.waitpid(pid, 0)
    for descriptor in (from_child, to_parent, from_parent, to_child):
        os.close(descriptor)
    assert still is None, "the fork has let go of its parent's lock"
    assert again is not None, "the forked process keeps the lock"
    again.release()
    assert os.waitstatus_to_exitcode(status) == 0


def test_letting_go_counts_for_a_child_that_still_shares_the_file(tmp_path: Path) -> None:
    lock = FileLock.take(tmp_path / "lock")
    assert lock is not None
    assert lock._descriptor is not None
    shared = os.dup(lock._descriptor)
    lock.release()
    again = FileLock.take(tmp_path / "lock")
    os.close(shared)
    assert again is not None
    again.release()


def test_who_reads_while_it_is_written_reads_the_old_text_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FileLock.take(tmp_path / "lock")
    assert lock is not None
    lock.write("a long text")
    seen = []

    def looked_at(call: str) -> None:
        real = getattr(os, call)

        def looking(*arguments: object) -> object:
            seen.append(lock.path.read_text().rstrip())
            done = real(*arguments)
            seen.append(lock.path.read_text().rstrip())
            return done

        monkeypatch.setattr(locks.os, call, looking)

    for call in ("ftruncate", "pwrite"):
        looked_at(call)
    lock.write("short")
    assert set(seen) == {"a long text", "short"}
    lock.release()


def test_waiting_for_a_lock_that_is_let_go(tmp_path: Path) -> None:
    lock = FileLock.take(tmp_path / "lock")
    assert lock is not None
    timer = threading.Timer(0.1, lock.release)
    timer.start()
    with locked_now(tmp_path / "lock", "the thing"):
        assert FileLock.take(tmp_path / "lock") is None
        assert (tmp_path / "lock").read_text() == str(os.getpid())
    timer.join()


def test_waiting_in_vain_names_the_holder(tmp_path: Path) -> None:
    holder = pytest.raises(OperationFailed, match=f"the thing is in use by process {os.getpid()}")
    path = tmp_path / "lock"
    with locked_now(path, "the thing"), holder, locked_now(path, "the thing", timeout=0.05):
        pytest.fail("it was locked twice")
    with locked_now(tmp_path / "lock", "the thing"):
        pass


def test_a_holder_that_cannot_be_named(tmp_path: Path) -> None:
    assert "another process" in busy(tmp_path / "missing", "the thing", 1).message
    (tmp_path / "empty").touch()
    assert "process unknown" in busy(tmp_path / "empty", "the thing", 1).message


def test_what_a_fork_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage does not see into forks: the same, done by this process."""
    lock = FileLock.take(tmp_path / "lock")
    assert lock is not None
    monkeypatch.setattr(locks, "_held", {lock})
    locks._close_after_fork()
    assert not lock.held
    assert not locks._held

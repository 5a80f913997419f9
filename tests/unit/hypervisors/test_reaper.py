"""The reaper and the clearing of one run, on made-up leftovers; real dead runs are in
tests/integration/ownership."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmlab.hypervisors import leftovers
from vmlab.hypervisors.leftovers import (
    ReapItem,
    clear_run,
    kill_machine,
    marked,
    mounts_below,
)
from vmlab.hypervisors.locks import FileLock
from vmlab.hypervisors.ownership import Home, Run, Store
from vmlab.hypervisors.process_identity import ProcessIdentity, boot_id
from vmlab.hypervisors.processes import adopt, collect, start
from vmlab.hypervisors.reaper import reap_dead_runs

# Whose processes are looked for on the whole host, where this may run beside itself.
DEAD = secrets.token_hex(6)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path)


@pytest.fixture
def dead(home: Home) -> Path:
    """The directory of a run that died."""
    directory = home.runs / DEAD
    directory.mkdir()
    (directory / "lock").touch()
    return directory


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with vmlab."""
    with subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"]}) as process:
        yield process
        assert process.poll() is None, "somebody else's process was killed"
        process.kill()


def record(directory: Path, process: ProcessIdentity, boot: str | None = None) -> None:
    (directory / "processes").mkdir(exist_ok=True)
    what = json.dumps({"boot": boot or boot_id(), "machine": None, "argv": ["x"]})
    path = directory / "processes" / f"{process.pid}-{process.start}"
    path.write_text(f"{process.pid} {process.start}\n{what}")


def identity(pid: int) -> ProcessIdentity:
    found = ProcessIdentity.of(pid)
    assert found is not None
    return found


# ------------------------------------------------------------------- which runs


def test_with_nothing_to_do_no_process_is_looked_at(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That takes a while on a host with many, and every command begins with this.
    with Run.begin(home), Run.begin(home), monkeypatch.context() as patch:
        patch.setattr(leftovers.psutil, "pids", None)
        report = reap_dead_runs(home)
    assert report.items == ()
    assert report.dead == ()
    assert len(report.live) == 2


def test_a_dead_run_goes_and_a_live_one_stays(home: Home, dead: Path) -> None:
    (dead / "machines" / "m1").mkdir(parents=True)
    (dead / "machines" / "m1" / "root.img").write_bytes(b"x")
    with Run.begin(home, reap=False) as run:
        report = reap_dead_runs(home)
        assert report.dead == (DEAD,)
        assert report.live == (run.id,)
        assert report.items == (ReapItem(DEAD, "directory", "remove", str(dead)),)
        assert report.failed == ()
        assert [path.name for path in home.runs.iterdir()] == [run.id]


def test_a_dry_run_changes_nothing(home: Home, dead: Path) -> None:
    (dead / "file").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        runtime = Path(tempfile.mkdtemp()) / f"vmlab-{DEAD}"
        runtime.mkdir()
        (dead / "run.json").write_text(json.dumps({"runtime": str(runtime)}))
        listener.bind(str(runtime / "qmp.sock"))
        process = subprocess.Popen(["sleep", "60"])
        record(dead, identity(process.pid))
        report = reap_dead_runs(home, dry_run=True)
        assert report.dry_run
        assert report.dead == (DEAD,)
        assert [(item.kind, item.subject) for item in report.items] == [
            ("process", str(process.pid)),
            ("socket", str(runtime / "qmp.sock")),
            ("directory", str(runtime)),
            ("directory", str(dead)),
        ]
        assert process.poll() is None
        assert (dead / "file").exists()
        assert (runtime / "qmp.sock").exists()
        assert reap_dead_runs(home).failed == ()
        assert process.wait(60) == -signal.SIGKILL
        assert not runtime.exists()
        assert not dead.exists()
        runtime.parent.rmdir()


def test_a_run_directory_without_anything_in_it_goes(home: Home) -> None:
    (home.runs / DEAD).mkdir()
    assert reap_dead_runs(home).dead == (DEAD,)
    assert list(home.runs.iterdir()) == []


def test_what_is_no_run_s_is_left_alone(home: Home, tmp_path: Path) -> None:
    (home.runs / "note").touch()
    (home.runs / ".hidden").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (home.runs / "link").symlink_to(tmp_path / "elsewhere")
    store = Store.open(home, "lab")
    report = reap_dead_runs(home)
    assert report.dead == report.live == ()
    assert {path.name for path in home.runs.iterdir()} == {"note", ".hidden", "link"}
    assert store.directory.exists()


def test_a_lock_that_cannot_be_opened_is_reported(home: Home, dead: Path) -> None:
    (dead / "lock").unlink()
    (dead / "lock").symlink_to("/nonexistent/lock")
    report = reap_dead_runs(home)
    assert [(item.subject, item.error) for item in report.failed] == [
        (str(dead), os.strerror(errno.ELOOP))
    ]
    (dead / "lock").unlink()


def test_a_run_that_another_reaper_takes_away_is_nobody_s(
    home: Home, dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = FileLock.take

    def too_late(path: Path) -> FileLock | None:
        shutil.rmtree(dead)
        return take(path)

    monkeypatch.setattr("vmlab.hypervisors.reaper.FileLock.take", too_late)
    report = reap_dead_runs(home)
    assert report.dead == report.live == report.items == ()


def test_three_reapers_at_once_do_not_disturb_each_other(home: Home) -> None:
    for number in range(40):
        (home.runs / f"r{number:02}" / "sub").mkdir(parents=True)
        (home.runs / f"r{number:02}" / "lock").touch()
    reports = []
    barrier = threading.Barrier(3)

    def reap() -> None:
        barrier.wait()
        reports.append(reap_dead_runs(home))

    threads = [threading.Thread(target=reap) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(home.runs.iterdir()) == []
    assert [item for report in reports for item in report.failed] == []
    cleared = [run for report in reports for run in report.dead]
    assert set(cleared) == {f"r{number:02}" for number in range(40)}


def _leave_alone(directory: Path) -> None:
    """The other reaper has got no further."""


def _unlock(directory: Path) -> None:
    (directory / "lock").unlink()


def _finish(directory: Path) -> None:
    shutil.rmtree(directory)


def _fill(directory: Path) -> None:
    (directory / "machines").mkdir()


@pytest.mark.parametrize(
    ("further", "error"),
    [(_leave_alone, None), (_unlock, None), (_finish, None), (_fill, "not empty")],
    ids=["it has the lock", "it removed the lock", "it removed all", "it is no reaper"],
)
def test_a_reaper_that_comes_between_unlocking_and_removing_is_left_to_it(
    dead: Path, monkeypatch: pytest.MonkeyPatch, further: Callable[[Path], None], error: str | None
) -> None:
    own = Path.rmdir

    def rmdir(path: Path) -> None:
        if path != dead:
            return own(path)
        other = FileLock.take(dead / "lock")
        assert other is not None
        try:
            own(path)
        finally:
            further(dead)
            other.release()

    monkeypatch.setattr(Path, "rmdir", rmdir)
    said = leftovers._remove_tree(dead)
    assert said is None if error is None else said is not None and error in said


# ------------------------------------------------------------------- processes


def test_a_recorded_process_dies_and_a_recycled_pid_does_not(
    dead: Path, bystander: subprocess.Popen[bytes]
) -> None:
    own = subprocess.Popen(["sleep", "60"])
    record(dead, identity(own.pid))
    other = identity(bystander.pid)
    record(dead, ProcessIdentity(other.pid, other.start - 1))
    record(dead, other, boot="another boot")
    items = clear_run(dead)
    assert [(item.kind, item.pid) for item in items] == [("process", own.pid), ("directory", None)]
    assert own.wait(60) == -signal.SIGKILL
    assert not dead.exists()


def test_a_process_that_was_never_recorded_is_known_by_its_environment(
    dead: Path, bystander: subprocess.Popen[bytes]
) -> None:
    marks = {"VMLAB_RUN": DEAD, "VMLAB_MACHINE": "m1"}
    own = subprocess.Popen(["sleep", "60"], env=os.environ | marks)
    like = subprocess.Popen(["sleep", "60"], env=os.environ | {"VMLAB_RUN": DEAD + "0"})
    store = subprocess.Popen(["sleep", "60"], env=os.environ | {"VMLAB_STORE": DEAD})
    other = subprocess.Popen(["sleep", "60"], env=os.environ | {"NOT_VMLAB_RUN": DEAD})
    assert (identity(own.pid), marks) in list(marked())
    items = clear_run(dead)
    assert own.wait(60) == -signal.SIGKILL
    assert [item.pid for item in items if item.kind == "process"] == [own.pid]
    for process in (like, store, other):
        assert process.poll() is None
        process.kill()
        process.wait()


def test_a_stopped_process_dies(dead: Path) -> None:
    own = subprocess.Popen(["sleep", "60"], env=os.environ | {"VMLAB_RUN": DEAD})
    own.send_signal(signal.SIGSTOP)
    clear_run(dead)
    assert own.wait(60) == -signal.SIGKILL


def test_processes_that_multiply_are_hunted_down(dead: Path, tmp_path: Path) -> None:
    # Each child waits for its parent's death and starts the next.
    script = tmp_path / "multiply"
    script.write_text(
        'n=$1; [ "$n" = 0 ] && exec sleep 60\nsh "$0" $((n - 1)) & while :; do sleep 1; done\n'
    )
    own = subprocess.Popen(["sh", script, "5"], env=os.environ | {"VMLAB_RUN": DEAD})
    time.sleep(0.3)
    clear_run(dead)
    own.wait(60)
    assert [variables for _, variables in marked() if variables.get("VMLAB_RUN") == DEAD] == []


def test_processes_that_never_end_to_multiply_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = iter(range(1000))

    def kill(found: set[ProcessIdentity], run: str) -> dict[ProcessIdentity, ReapItem]:
        return {who: ReapItem(run, "process", "kill", pid=who.pid) for who in found}

    monkeypatch.setattr(leftovers, "_kill", kill)
    items = leftovers._kill_all(lambda: {ProcessIdentity(next(numbers), 0)}, DEAD)
    assert len(items) == 10


def test_a_process_that_cannot_be_killed_keeps_the_directory(
    home: Home, dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = subprocess.Popen(["sleep", "60"], env=os.environ | {"VMLAB_RUN": DEAD})

    def refuse(process: ProcessIdentity, number: int) -> bool:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "send_signal", refuse)
        report = reap_dead_runs(home)
    assert [(item.kind, item.error) for item in report.failed] == [
        ("process", "Operation not permitted"),
        ("directory", "processes still run"),
    ]
    assert dead.exists()
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "collect", list)
        report = reap_dead_runs(home)
    assert report.failed[0].error == "it was killed but does not end"
    own.wait(60)
    assert reap_dead_runs(home).failed == ()
    assert not dead.exists()


def test_the_reaper_does_not_kill_itself(dead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    myself = identity(os.getpid())
    monkeypatch.setattr(leftovers, "marked", lambda: iter([(myself, {"VMLAB_RUN": DEAD})]))
    record(dead, myself)
    assert [item.kind for item in clear_run(dead)] == ["directory"]


def test_killing_one_machine_spares_the_others(home: Home) -> None:
    with Run.begin(home) as run:
        first = start(["sh", "-c", "setsid sleep 60 & wait"], owner=run.owner, machine="m1")
        second = start(["sleep", "60"], owner=run.owner, machine="m2")
        while sum(marks.get("VMLAB_MACHINE") == "m1" for _, marks in marked()) < 2:
            time.sleep(0.01)
        items = kill_machine(run.owner, "m1")
        assert first.pid in {item.pid for item in items}
        assert len(items) >= 2
        assert not first.running
        assert second.running
        store = Store.open(home, f"lab-{DEAD}")
        third = start(["sleep", "60"], owner=store.owner, machine="m2")
        assert [item.pid for item in kill_machine(store.owner, "m2")] == [third.pid]
        assert second.running


def test_a_store_s_processes_are_not_the_reaper_s(home: Home, dead: Path) -> None:
    store = Store.open(home, "lab")
    process = start(["sleep", "60"], owner=store.owner, machine="m1")
    reap_dead_runs(home)
    assert [one.pid for one in adopt(store.owner)] == [process.pid]
    process.kill()
    assert collect([process.identity]) == []
    assert adopt(store.owner) == []


def test_environments_are_read_elsewhere_than_on_linux_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = subprocess.Popen(["sleep", "60"], env={"VMLAB_RUN": DEAD, "PATH": os.environ["PATH"]})
    while b"VMLAB_RUN" not in leftovers._environment(own.pid):
        time.sleep(0.01)

    def missing(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(leftovers.Path, "read_bytes", missing)
    assert leftovers._environment(own.pid) == b"", "on Linux, a process that is gone"
    monkeypatch.setattr(leftovers.Path, "exists", lambda path: False)
    assert leftovers._VARIABLE.findall(leftovers._environment(own.pid)) == [
        (b"VMLAB_RUN", DEAD.encode())
    ]
    own.kill()
    own.wait()
    assert leftovers._environment(own.pid) == b""

    def forbidden(path: Path) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(leftovers.Path, "read_bytes", forbidden)
    assert leftovers._environment(1) == b""


def test_a_process_that_ends_while_it_is_looked_at_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leftovers, "_environment", lambda pid: b"VMLAB_RUN=x\0")
    monkeypatch.setattr(ProcessIdentity, "of", classmethod(lambda cls, pid: None))
    assert list(marked()) == []


# ------------------------------------------------------------------- mounts

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None,
    reason="needs root and the Debian package mount",
)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """Files of the user's that are mounted into a run's directory."""
    directory = tmp_path / "precious"
    directory.mkdir()
    (directory / "thesis.tex").write_text("years")
    yield directory
    for point, _ in mounts_below(tmp_path):
        subprocess.run(["umount", "-l", point], check=True)
    assert (directory / "thesis.tex").read_text() == "years"


@needs_root
def test_mounts_go_and_what_they_showed_stays(home: Home, dead: Path, precious: Path) -> None:
    inner, outer = dead / "a share" / "tmp", dead / "a share"
    outer.mkdir()
    mount("--bind", precious, outer)
    (precious / "tmp").mkdir()
    mount("-t", "tmpfs", "tmpfs", inner)
    (inner / "x").touch()
    assert mounts_below(dead) == [(inner, "tmpfs"), (outer, mounts_below(dead)[1][1])]
    planned = reap_dead_runs(home, dry_run=True)
    assert len(mounts_below(dead)) == 2
    report = reap_dead_runs(home)
    assert [item.subject for item in report.items if item.kind == "mount"] == [
        str(inner),
        str(outer),
    ]
    assert [item.subject for item in planned.items] == [item.subject for item in report.items]
    assert report.failed == ()
    assert not dead.exists()


@needs_root
def test_a_busy_mount_is_detached(home: Home, dead: Path, precious: Path) -> None:
    (dead / "share").mkdir()
    mount("--bind", precious, dead / "share")
    with (dead / "share" / "thesis.tex").open() as file:
        assert reap_dead_runs(home).failed == ()
        assert file.read() == "years"
    assert not dead.exists()


@needs_root
def test_a_run_s_directory_with_a_mount_that_stays_is_not_removed(
    home: Home, dead: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dead / "share").mkdir()
    mount("--bind", precious, dead / "share")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(dead)  # the path is too long to be bound
        listener.bind("s")
        os.chdir("/")
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "_unmount", lambda point, kind: "Operation not permitted")
        report = reap_dead_runs(home)
    still = f"{dead / 'share'} is still mounted"
    assert [(item.kind, item.error) for item in report.failed] == [
        ("mount", "Operation not permitted"),
        ("socket", still),
        ("directory", still),
    ]
    assert (dead / "share" / "thesis.tex").exists()
    assert reap_dead_runs(home).failed == ()


class _Libc:
    def __init__(self, number: int) -> None:
        self.number = number
        self.flags: list[int] = []

    def umount2(self, path: bytes, flags: int) -> int:
        self.flags.append(flags)
        ctypes.set_errno(self.number)
        return -1


def test_unmounting_says_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = _Libc(errno.EPERM)
    monkeypatch.setattr(leftovers.ctypes, "CDLL", lambda name, use_errno: libc)
    assert leftovers._unmount(Path("/m"), "ext4") == os.strerror(errno.EPERM)
    assert libc.flags == [8, 8 | 2]


@pytest.mark.parametrize(("status", "error"), [(0, None), (1, "not mounted by you")])
def test_mounts_of_fuse_go_without_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, error: str | None
) -> None:
    helper = tmp_path / "fusermount3"
    helper.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/args\necho not mounted by you >&2\nexit {status}\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(leftovers.ctypes, "CDLL", lambda name, use_errno: _Libc(errno.EPERM))
    assert leftovers._unmount(Path("/m"), "fuse.sshfs") == error
    assert (tmp_path / "args").read_text() == "-u -z -- /m\n"


def test_no_mounts_are_known_elsewhere_than_on_linux(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(leftovers.Path, "read_bytes", missing)
    assert mounts_below(tmp_path) == []


# ------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "{}",
        '{"runtime": 3}',
        '{"runtime": null}',
        '{"runtime": "TMP/precious"}',
        '{"runtime": "TMP/vmlab-ba9876543210"}',
        '{"runtime": "TMP/vmlab-DEAD"}',
    ],
)
def test_a_directory_of_sockets_that_is_none_is_not_believed(
    dead: Path, tmp_path: Path, said: str
) -> None:
    # Of this test's own: whatever a broken reaper may remove, it is nobody's.
    others = [tmp_path / "precious", tmp_path / "vmlab-ba9876543210"]
    for directory in others:
        directory.mkdir()
    (dead / "run.json").write_text(said.replace("TMP", str(tmp_path)).replace("DEAD", DEAD))
    assert [item.subject for item in clear_run(dead)] == [str(dead)]
    assert all(directory.exists() for directory in others)


def test_a_link_in_place_of_the_directory_of_sockets_is_not_followed(
    dead: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / f"vmlab-{DEAD}").symlink_to(victim)
    (dead / "run.json").write_text(json.dumps({"runtime": str(tmp_path / f"vmlab-{DEAD}")}))
    assert [item.subject for item in clear_run(dead)] == [str(dead)]
    assert victim.exists()


def test_links_are_removed_and_not_followed(dead: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    (dead / "link").symlink_to(victim)
    (dead / "machines").mkdir()
    (dead / "machines" / "link").symlink_to(victim)
    clear_run(dead)
    assert not dead.exists()
    assert (victim / "file").exists()


def test_directories_without_permissions_go_too(dead: Path) -> None:
    (dead / "a" / "b").mkdir(parents=True)
    (dead / "a" / "b" / "file").touch()
    (dead / "a" / "b").chmod(0o000)
    (dead / "a").chmod(0o000)
    assert [item.error for item in clear_run(dead)] == [None]
    assert not dead.exists()


def test_what_cannot_be_removed_is_reported_with_its_name(
    home: Home, dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Path(tempfile.mkdtemp()) / f"vmlab-{DEAD}"
    runtime.mkdir()
    (dead / "run.json").write_text(json.dumps({"runtime": str(runtime)}))
    (dead / "disks").mkdir()

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(leftovers.Path, "rmdir", refuse)
        report = reap_dead_runs(home)
    assert [(item.subject, item.error) for item in report.failed] == [
        (str(runtime), f"Read-only file system: {runtime}")
    ]
    assert (dead / "run.json").exists(), "without it nobody finds the directory of sockets again"
    assert reap_dead_runs(home).failed == ()
    assert not runtime.exists()
    assert not dead.exists()
    runtime.parent.rmdir()


def test_a_directory_that_somebody_else_removes_meanwhile_is_no_error(
    dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(leftovers.Path, "rmdir", gone)
    assert [item.error for item in clear_run(dead)] == [None]


def test_a_directory_that_the_next_reaper_has_taken_is_left_to_it(
    dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmdir = Path.rmdir

    def taken(path: Path) -> None:
        (path / "lock").touch()
        rmdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(leftovers.Path, "rmdir", taken)
        assert [item.error for item in clear_run(dead)] == [None]

        def filled(path: Path) -> None:
            (path / "file").touch()
            rmdir(path)

        patch.setattr(leftovers.Path, "rmdir", filled)
        assert [item.error for item in clear_run(dead)] == [f"Directory not empty: {dead}"]
    assert [item.error for item in clear_run(dead)] == [None]

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmlab.hypervisors import process_identity, processes
from vmlab.hypervisors.ownership import Home, Owner, Run, Store
from vmlab.hypervisors.processes import (
    OwnedProcess,
    adopt,
    collect,
    die_with_parent,
    recorded,
    spawn,
    start,
)
from vmlab.machine.errors import OperationFailed

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, for its prctl(2)")
PR_GET_PDEATHSIG = 2


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path)


@pytest.fixture
def run(home: Home) -> Iterator[Run]:
    with Run.begin(home) as run:
        yield run


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    store = Store.open(home, "lab")
    yield store
    for process in adopt(store.owner):
        process.kill()
        collect([process.identity])


@pytest.fixture(params=["run", "store"])
def owner(request: pytest.FixtureRequest) -> Owner:
    fixture = request.getfixturevalue(request.param)
    assert isinstance(fixture, Run | Store)
    return fixture.owner


def records(owner: Owner) -> list[Path]:
    return sorted((owner.directory / "processes").iterdir())


def descriptors() -> int:
    """How many files this process has open, but for those that nobody has any more."""
    gc.collect()
    return len(list(Path("/dev/fd").iterdir()))


def wait(process: OwnedProcess, timeout: float | None = 100) -> int | None:
    return asyncio.run(process.wait(timeout))


# ------------------------------------------------------------------- starting


def test_a_program_runs_and_ends(owner: Owner) -> None:
    async def live() -> int | None:
        process = await spawn(["sh", "-c", "exit 7"], owner=owner, machine="m1")
        return await process.wait(60)

    assert asyncio.run(live()) == 7
    assert records(owner) == []


def test_it_is_recorded_before_it_begins(owner: Owner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(
        ["sh", "-c", 'cat "$1"/*', "-", owner.directory / "processes"],
        owner=owner,
        machine="m1",
        stdout=out,
    )
    assert wait(process) == 0
    who, what = out.read_text().split("\n", 1)
    assert who == f"{process.pid} {process.identity.start}"
    assert json.loads(what)["machine"] == "m1"
    assert json.loads(what)["argv"] == list(process.argv)


def test_it_carries_its_owner_and_no_other(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VMLAB_RUN", "VMLAB_STORE", "VMLAB_MACHINE"):
        monkeypatch.setenv(name, "somebody-else")
    out = tmp_path / "out"
    assert wait(start(["env"], owner=owner, machine="m1", stdout=out)) == 0
    marks = {line for line in out.read_text().splitlines() if line.startswith("VMLAB_")}
    assert marks == {f"VMLAB_{owner.kind.upper()}={owner.id}", "VMLAB_MACHINE=m1"}
    out.unlink()
    assert wait(start(["env"], owner=owner, stdout=out, environment={"PATH": "/usr/bin:/bin"})) == 0
    assert set(out.read_text().splitlines()) == {
        "PATH=/usr/bin:/bin",
        f"VMLAB_{owner.kind.upper()}={owner.id}",
    }


def test_it_leads_a_session_of_its_own(owner: Owner) -> None:
    process = start(["sleep", "60"], owner=owner)
    assert os.getsid(process.pid) == process.pid
    assert os.getpgid(process.pid) == process.pid
    process.kill()
    wait(process)


def test_it_inherits_only_what_it_is_given(owner: Owner, tmp_path: Path) -> None:
    given, kept = os.pipe(), os.pipe()
    for descriptor in (*given, *kept):
        os.set_inheritable(descriptor, True)
    out = tmp_path / "out"
    process = start(
        ["sh", "-c", 'for n in "$@"; do [ -e /dev/fd/$n ] && echo $n; done', "-"]
        + [str(descriptor) for descriptor in (*given, *kept)],
        owner=owner,
        stdout=out,
        pass_fds=given,
    )
    wait(process)
    for descriptor in (*given, *kept):
        os.close(descriptor)
    assert out.read_text().split() == [str(descriptor) for descriptor in given]


def test_standard_streams(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("hello\n")
    (tmp_path / "out").write_text("before\n")
    argv = ["sh", "-c", "cat; echo oops >&2; pwd"]
    process = start(
        argv,
        owner=owner,
        stdin=tmp_path / "in",
        stdout=tmp_path / "out",
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
    )
    assert wait(process) == 0
    assert (tmp_path / "out").read_text() == f"before\nhello\noops\n{tmp_path}\n"
    with (tmp_path / "fd").open("wb") as file:
        assert wait(start(argv, owner=owner, stdout=file.fileno(), cwd=tmp_path)) == 0
    assert (tmp_path / "fd").read_text() == f"{tmp_path}\n", "stdin was not empty"
    with pytest.raises(ValueError, match="no reader"):
        start(argv, owner=owner, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("argv", "options", "reason"),
    [
        (["no-such-program"], {}, "cannot start no-such-program: there is no such program"),
        (["/etc/passwd"], {}, "cannot start /etc/passwd: there is no such program"),
        (["true"], {"cwd": Path("/nonexistent")}, "No such file or directory"),
        (["true"], {"stdin": Path("/nonexistent")}, "No such file or directory"),
        (["true", "a\0b"], {}, "null byte"),
    ],
)
def test_what_cannot_be_started_leaves_nothing(
    owner: Owner, argv: list[str], options: dict[str, Path], reason: str
) -> None:
    before = descriptors()
    with pytest.raises(OperationFailed, match=reason) as caught:
        start(argv, owner=owner, machine="m1", **options)
    assert "vmlab doctor" in str(caught.value.hint)
    assert caught.value.machine == "m1"
    assert list(owner.directory.glob("processes/*")) == []
    assert descriptors() == before


def test_a_cancelled_start_leaves_nothing(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    fork = processes._Launch.fork
    made: list[OwnedProcess] = []

    def slow(launch: processes._Launch) -> OwnedProcess:
        begun.set()
        go_on.wait(60)
        made.append(fork(launch))
        return made[-1]

    monkeypatch.setattr(processes._Launch, "fork", slow)

    async def cancel(argv: list[str]) -> None:
        begun.clear()
        go_on.clear()
        task = asyncio.create_task(spawn(argv, owner=owner))
        assert await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel(["sleep", "60"]))
    assert len(made) == 1
    assert made[0].returncode == -signal.SIGKILL
    asyncio.run(cancel(["no-such-program"]))
    assert records(owner) == []


# ------------------------------------------------------------------- with whom it dies


def death_signal(tmp_path: Path, owner: Owner) -> int:
    """The parent-death signal of a process of that owner's."""
    out = tmp_path / "signal"
    code = (
        "import ctypes; n = ctypes.c_int(); "
        f"ctypes.CDLL(None).prctl({PR_GET_PDEATHSIG}, ctypes.byref(n), 0, 0, 0); print(n.value)"
    )
    assert wait(start([sys.executable, "-c", code], owner=owner, stdout=out)) == 0
    return int(out.read_text())


@linux_only
def test_a_run_s_process_dies_with_its_parent_and_a_store_s_does_not(
    run: Run, store: Store, tmp_path: Path
) -> None:
    assert death_signal(tmp_path, run.owner) == signal.SIGKILL
    (tmp_path / "signal").unlink()
    assert death_signal(tmp_path, store.owner) == 0


@linux_only
def test_the_end_of_the_thread_that_asked_is_not_the_end_of_the_process(run: Run) -> None:
    started: list[OwnedProcess] = []
    thread = threading.Thread(
        target=lambda: started.append(start(["sleep", "60"], owner=run.owner))
    )
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert started[0].running
    started[0].kill()
    assert wait(started[0]) == -signal.SIGKILL


@linux_only
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, threads
def test_a_process_whose_parent_has_died_already_ends_itself() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(os.getppid() + 1)
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@linux_only
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, threads
def test_a_process_whose_parent_lives_goes_on() -> None:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(parent)
            os._exit(0)
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_what_a_child_does_between_fork_and_exec(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Coverage does not see into children: the same, done by this process."""
    asked: list[tuple[int, ...]] = []
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(processes, "_PRCTL", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: killed.append((pid, number)))
    die_with_parent(os.getppid())
    assert asked == [(1, signal.SIGKILL, 0, 0, 0)]
    assert killed == []
    launch = processes._Launch(["x"], run.owner, "m1", (None, None, None), None, None, ())
    with (tmp_path / "record").open("wb") as file:
        launch._before_exec(file.fileno(), ["x"])()
    assert len(asked) == 2
    assert killed == [(os.getpid(), signal.SIGKILL)], "this process is not its own child"
    record = processes.ProcessRecord.read(tmp_path / "record")
    assert record is not None
    assert record.identity == process_identity.ProcessIdentity.of(os.getpid())
    assert (record.machine, record.argv) == ("m1", ("x",))


def test_what_a_fork_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    lock.acquire()
    monkeypatch.setattr(processes, "_spawner", object())
    monkeypatch.setattr(processes, "_spawner_lock", lock)
    monkeypatch.setattr(processes, "_children", {1: 2})
    processes._forget_after_fork()
    assert processes._spawner is None
    assert processes._spawner_lock.acquire(blocking=False), "held by a thread that is no more"
    assert not processes._children


def test_elsewhere_than_on_linux_there_is_no_death_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes._prctl() is None
    monkeypatch.setattr(processes, "_PRCTL", None)
    die_with_parent(-1)  # or this process would be dead


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, threads
def test_a_fork_of_this_process_can_start_processes_too(run: Run, store: Store) -> None:
    first = start(["sleep", "60"], owner=run.owner)
    pid = os.fork()
    if pid == 0:
        try:
            # Neither the parent's spawner nor its children are the fork's.
            assert not processes._children
            process = start(["sh", "-c", "exit 5"], owner=store.owner)
            while process.running:
                time.sleep(0.01)
            os._exit(process.returncode or 0)
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 5
    assert first.running
    first.kill()
    wait(first)


# ------------------------------------------------------------------- watching and ending


def test_waiting_takes_no_longer_than_said(owner: Owner) -> None:
    process = start(["sleep", "60"], owner=owner)
    with pytest.raises(TimeoutError):
        wait(process, 0.05)
    assert process.running
    assert process.returncode is None
    assert "running" in repr(process)
    assert process.terminate()
    assert wait(process) == -signal.SIGTERM
    assert not process.terminate()
    assert not process.kill()
    assert "ended, returncode=-15" in repr(process)
    assert records(owner) == []


def test_a_stopped_process_is_killed_all_the_same(owner: Owner) -> None:
    process = start(["sleep", "60"], owner=owner)
    assert process.send_signal(signal.SIGSTOP)
    assert process.running
    assert process.kill()
    assert wait(process) == -signal.SIGKILL


def test_several_may_wait(owner: Owner) -> None:
    async def live() -> list[int | None]:
        process = await spawn(["sleep", "60"], owner=owner)
        waiting = [asyncio.create_task(process.wait()) for _ in range(3)]
        await asyncio.sleep(0.05)
        process.kill()
        return await asyncio.gather(*waiting)

    assert asyncio.run(live()) == [-signal.SIGKILL] * 3


def count_turns(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each time that the loop waits for something, from now on."""
    turns: list[None] = []
    selector = loop._selector  # type: ignore[attr-defined]
    select = selector.select

    def counted(timeout: float | None = None) -> object:
        turns.append(None)
        return select(timeout)

    monkeypatch.setattr(selector, "select", counted)
    return turns


def test_waiting_costs_no_cpu_and_no_descriptor(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    own = processes.open_pidfd

    def open_pidfd(identity: process_identity.ProcessIdentity) -> int | None:
        looked.append(identity)
        return own(identity)

    monkeypatch.setattr(processes, "open_pidfd", open_pidfd)

    async def live() -> int:
        process = await spawn(["sleep", "60"], owner=owner)
        before = descriptors()
        turns = count_turns(asyncio.get_running_loop(), monkeypatch)
        with pytest.raises(TimeoutError):
            await process.wait(0.3)
        assert descriptors() == before
        process.kill()
        await process.wait()
        return len(turns)

    # Neither the process nor the event loop was asked again and again whether it has ended.
    assert asyncio.run(live()) < 30
    assert 1 <= len(looked) <= 2


def test_waiting_without_pidfds(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "before Linux 5.3")

    monkeypatch.setattr(process_identity.os, "pidfd_open", refuse)
    assert wait(start(["sh", "-c", "sleep 0.05; exit 4"], owner=owner)) == 4


def test_waiting_for_one_that_ends_while_it_is_looked_at(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    def gone(identity: process_identity.ProcessIdentity) -> int | None:
        looked.append(identity)
        raise ProcessLookupError(errno.ESRCH, "it has ended")

    process = start(["sh", "-c", "sleep 0.1; exit 4"], owner=owner)
    monkeypatch.setattr(processes, "open_pidfd", gone)
    began = time.monotonic()
    assert wait(process) == 4
    most = 1 + (time.monotonic() - began) / processes._POLL_S
    assert 1 <= len(looked) <= most, "it was waited for in a circle"


def test_ending_asks_first(owner: Owner, tmp_path: Path) -> None:
    async def begun(name: str, trap: str) -> OwnedProcess:
        """A process that has said what it does when it is asked to end."""
        ready = tmp_path / name
        loop = f"trap '{trap}' TERM; touch {ready}; while :; do sleep 0.01; done"
        process = await spawn(["sh", "-c", loop], owner=owner)
        async with asyncio.timeout(100):
            while not ready.exists():  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.01)
        return process

    async def live() -> tuple[int | None, int | None, int | None]:
        polite = await begun("polite", "exit 3")
        stubborn = await begun("stubborn", "")
        first = await polite.end(100)
        second = await stubborn.end(0.2)
        return first, second, await stubborn.end()

    assert asyncio.run(live()) == (3, -signal.SIGKILL, -signal.SIGKILL)


def test_a_second_look_at_a_child_of_ours(owner: Owner) -> None:
    process = start(
        ["sh", "-c", "read x; exit 6"], owner=owner, machine="m1", stdin=Path("/dev/zero")
    )
    other = start(["sleep", "60"], owner=owner, machine="m2")
    assert {one.pid for one in adopt(owner)} == {process.pid, other.pid}
    [again] = adopt(owner, "m2")
    assert again.identity == other.identity
    assert again.machine == "m2"
    again.kill()
    assert wait(again) == -signal.SIGKILL, "it is our child: its status can be told"
    assert [one.pid for one in adopt(owner)] == [process.pid]
    process.kill()
    wait(process)
    assert adopt(owner) == []
    assert records(owner) == []


ADOPT = """
import asyncio, sys
from pathlib import Path
from vmlab.hypervisors.ownership import Home, Store
from vmlab.hypervisors.processes import start
store = Store.open(Home.open(Path(sys.argv[1])), "lab")
print(start(["sleep", "60"], owner=store.owner, machine="m1").pid)
"""


def test_a_store_s_process_is_adopted_by_the_next_process(home: Home, store: Store) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADOPT, home.directory],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    [process] = adopt(store.owner)
    assert process.pid == int(done.stdout)
    assert process.argv == ("sleep", "60")
    assert process.running
    with pytest.raises(TimeoutError):
        wait(process, 0.05)
    assert process.returncode is None
    process.terminate()
    assert wait(process) is None, "nobody but its parent learns its status"
    assert not process.running
    assert adopt(store.owner) == []
    assert records(store.owner) == []


def test_records_of_another_boot_and_of_another_process_are_dropped(store: Store) -> None:
    process = start(["sleep", "60"], owner=store.owner)
    [record] = records(store.owner)
    text = record.read_text()
    folder = record.parent
    (folder / "boot").write_text(text.replace(processes.boot_id(), "another"))
    first, rest = text.split("\n", 1)
    (folder / "recycled").write_text(f"{process.pid} {process.identity.start + 1}\n{rest}")
    (folder / "begun").touch()
    (folder / "abandoned").touch()
    os.utime(folder / "abandoned", (time.time() - 100,) * 2)
    (folder / "damaged").write_text("1 2\n{}")
    assert [one.pid for one in adopt(store.owner)] == [process.pid]
    assert {path.name for path in folder.iterdir()} == {record.name, "begun", "damaged"}
    assert first
    process.kill()
    wait(process)


def test_an_owner_without_processes(run: Run) -> None:
    assert adopt(run.owner) == []
    assert recorded(run.directory) == []


def test_collecting_gives_up_after_a_while(run: Run) -> None:
    process = start(["sleep", "60"], owner=run.owner)
    assert collect([process.identity], 0.05) == [process.identity]
    process.kill()
    assert collect([process.identity], 100) == []
    assert process.returncode == -signal.SIGKILL


def test_a_run_leaves_no_zombie(home: Home) -> None:
    with Run.begin(home) as run:
        process = start(["true"], owner=run.owner)
        while process.identity.alive:
            time.sleep(0.01)
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


def test_a_dropped_child_does_not_make_python_complain(store: Store) -> None:
    process = start(["sleep", "60"], owner=store.owner)
    identity = process.identity
    processes._children.clear()
    del process
    assert identity.alive
    [again] = adopt(store.owner)
    again.kill()
    os.waitpid(identity.pid, 0)

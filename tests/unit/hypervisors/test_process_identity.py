from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from vmlab.hypervisors import process_identity
from vmlab.hypervisors.process_identity import (
    ProcessIdentity,
    activity,
    boot_id,
    open_pidfd,
    send_signal,
)

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    found = ProcessIdentity.of(process.pid)
    assert found is not None
    return found


def test_a_process_is_itself(child: subprocess.Popen[bytes]) -> None:
    assert identity(child) == identity(child)
    assert identity(child).alive
    assert identity(child) != ProcessIdentity.of(os.getpid())


@needs_proc
def test_its_start_is_the_kernel_s() -> None:
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            start = identity(child).start
            # In clock ticks (proc_pid_stat(5), field 22); no blank is in its name.
            assert start == int(Path(f"/proc/{child.pid}/stat").read_text().split()[21])
        finally:
            child.kill()
    # The host's clock may be set meanwhile; what is counted since the boot goes on.
    since_boot = start / os.sysconf("SC_CLK_TCK")
    assert began - 1 <= since_boot <= time.clock_gettime(time.CLOCK_BOOTTIME)


@needs_proc
def test_a_name_with_parentheses_and_spaces_confuses_nobody() -> None:
    code = (
        "import ctypes; ctypes.CDLL(None).prctl(15, b') Z 1 (', 0, 0, 0); "
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert b") Z 1 (" in Path(f"/proc/{process.pid}/stat").read_bytes()
        assert identity(process).alive
        process.kill()


def test_the_dead_are_nobody_also_before_somebody_waits(child: subprocess.Popen[bytes]) -> None:
    who = identity(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ProcessIdentity.of(child.pid) is None
    assert not who.alive
    assert not send_signal(who, signal.SIGTERM)
    child.wait()
    assert ProcessIdentity.of(child.pid) is None


def test_a_signal_reaches_the_process_and_no_other_with_its_number(
    child: subprocess.Popen[bytes],
) -> None:
    who = identity(child)
    another_before = replace(who, start=who.start - 1)
    assert not send_signal(another_before, signal.SIGKILL)
    assert child.poll() is None, "a process that got the number later was killed"
    assert send_signal(who, signal.SIGTERM)
    assert child.wait(60) == -signal.SIGTERM


def test_a_process_that_is_gone_gets_no_signal() -> None:
    assert not send_signal(ProcessIdentity(2**22 + 1, 1), signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, None])
def test_without_pidfds_the_start_time_still_protects(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(pid: int) -> int:
        if number is None:
            raise AttributeError("pidfd_open")
        raise OSError(number, "no")

    monkeypatch.setattr(process_identity.os, "pidfd_open", refuse, raising=False)
    who = identity(child)
    assert open_pidfd(who) is None
    assert not send_signal(replace(who, start=who.start - 1), signal.SIGKILL)
    assert child.poll() is None
    assert send_signal(who, signal.SIGTERM)
    assert child.wait(60) == -signal.SIGTERM


def test_a_pidfd_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(process_identity.os, "pidfd_open", refuse, raising=False)
    with pytest.raises(OSError, match="too many"):
        send_signal(ProcessIdentity(os.getpid(), 0), 0)


def test_where_there_is_no_proc_psutil_tells(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: Path, *arguments: object) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(process_identity.Path, "read_bytes", missing)
    monkeypatch.setattr(process_identity.Path, "read_text", missing)
    monkeypatch.setattr(process_identity.Path, "exists", lambda path: False)
    who = ProcessIdentity.of(child.pid)
    assert who is not None
    assert who.start == pytest.approx(psutil.Process(child.pid).create_time() * 100, abs=1)
    assert who.alive
    assert boot_id().startswith("boot-1")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ProcessIdentity.of(child.pid) is None
    child.wait()
    assert ProcessIdentity.of(child.pid) is None


@needs_proc
def test_a_boot_has_a_name() -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@needs_proc
def test_what_a_process_is_at_is_told_thread_by_thread(child: subprocess.Popen[bytes]) -> None:
    me = activity(ProcessIdentity(os.getpid(), 0))
    assert me == f"process {os.getpid()} has ended", "somebody else had that number"
    who = identity(child)
    seen = activity(who)
    while "sleep sleeps" not in seen:  # it may still be on its way there
        seen = activity(who)
    assert re.fullmatch(rf"process {child.pid}: sleep sleeps( in \w+)?, \d+\.\d s of CPU", seen)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert "sleep is stopped" in activity(who)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert activity(who) == f"process {child.pid} has ended"


@needs_proc
def test_of_many_threads_the_first_are_told() -> None:
    enough = threading.Event()
    threads = [threading.Thread(target=enough.wait) for _ in range(20)]
    for thread in threads:
        thread.start()
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    seen = activity(me)
    enough.set()
    for thread in threads:
        thread.join()
    assert seen.endswith("; ...")
    assert seen.count("s of CPU") == 12


def test_where_there_are_no_tasks_psutil_tells_its_state(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    who = identity(child)

    def missing(path: Path) -> Iterator[Path]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(process_identity.Path, "iterdir", missing)
    assert activity(who).startswith(f"process {child.pid}: ")

    def gone(pid: int) -> psutil.Process:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(process_identity.psutil, "Process", gone)
    assert activity(who) == f"process {child.pid} has ended"


@needs_proc
def test_where_a_thread_sleeps_is_not_told_by_every_kernel(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_text

    def read_text(path: Path, encoding: str | None = None) -> str:
        if path.name == "wchan":
            raise FileNotFoundError(path)
        return real(path, encoding)

    monkeypatch.setattr(process_identity.Path, "read_text", read_text)
    seen = activity(identity(child))
    assert re.fullmatch(rf"process {child.pid}: \S+ (sleeps|runs), \d+\.\d s of CPU", seen)

"""`vmlab run` with a real Debian: like running it here, and nothing left behind."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.conftest import AMD64, Vmlab

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(600)]


def wait_until(what: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def read_until(stream: int, wanted: bytes, seconds: float = 300) -> bytes:
    """What comes from a file descriptor, up to `wanted`."""
    seen = b""
    deadline = time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        piece = os.read(stream, 4096)
        assert piece, seen
        seen += piece
    return seen


def nothing_left(vmlab: Vmlab) -> bool:
    return not vmlab.processes() and not vmlab.files() and not vmlab.runs


@pytest.mark.parametrize(
    ("image", "machine"),
    [("debian-12-amd64-tiny", "x86_64"), ("debian-13-riscv64-tiny", "riscv64")],
)
def test_uname_prints_the_guest_s_and_nothing_is_left(
    vmlab: Vmlab, image: str, machine: str
) -> None:
    done = vmlab.run("run", "--hypervisor", "qemu", "--image", image, "--", "uname", "-sm")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Linux {machine}\n".encode(), b"")
    assert nothing_left(vmlab)


def test_streams_status_disk_share_and_copies_pass_through(vmlab: Vmlab, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("shared")
    (tmp_path / "there").mkdir()
    data = bytes(range(256)) * 4096
    done = vmlab.run(
        "run", *AMD64, "--memory", "256M", "--cpus", "2",
        "--disk", "64M", "--share", f"{tmp_path}/here:/src", "--timeline",
        "--share", f"{tmp_path}/there:/there:rw", "--share", f"{tmp_path}/here:/copied:rw:copy",
        "--copy-out", f"/root/out:{tmp_path}/out", "--",
        "cat; nproc >&2; cat /src/file >&2; echo >&2; cat /sys/block/vda/size >&2; "
        "mkdir /root/out; echo made >/root/out/file; cp /copied/file /there/back; "
        "echo more >>/copied/file; touch /src/no || exit 7",
        input=data,
    )  # fmt: skip
    assert done.returncode == 7
    assert done.stdout == data
    lines = done.stderr.decode().splitlines()
    assert lines[:3] == ["2", "shared", "131072"]
    assert "Read-only" in lines[3]
    steps = [line.split(maxsplit=2)[2] for line in lines[4:]]
    assert steps == [
        "image", "hypervisor", "start", "firmware", "kernel", "init", "agent", "shares",
        "command", "copy out", "in all",
    ]  # fmt: skip
    assert (tmp_path / "out" / "file").read_text() == "made\n"
    assert (tmp_path / "there" / "back").read_text() == "shared"
    # A copy is the guest's own: what it does with it is not seen here.
    assert (tmp_path / "here" / "file").read_text() == "shared"
    assert nothing_left(vmlab)


def test_ctrl_c_reaches_the_command_and_its_status_comes_back(vmlab: Vmlab) -> None:
    running = vmlab.start(
        "run", *AMD64, "--",
        "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done",
    )  # fmt: skip
    assert running.stdout is not None
    read_until(running.stdout.fileno(), b"ready\n")
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=300)
    assert (running.returncode, out, err) == (9, b"caught\n", b"")
    assert nothing_left(vmlab)


def test_ctrl_c_while_it_boots_clears_everything_away(vmlab: Vmlab) -> None:
    running = vmlab.start("run", *AMD64, "--", "true")
    assert wait_until(lambda: bool(vmlab.processes()))
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=300)
    assert running.returncode == 130
    assert nothing_left(vmlab)


def test_kill_9_leaves_no_process_and_the_next_run_clears_the_files(vmlab: Vmlab) -> None:
    words = ["run", *AMD64, "--", "echo ready; cat"]
    # Two side by side; one is killed, the other does not notice.
    runs = [vmlab.start(*words, stdin=subprocess.PIPE) for _ in range(2)]
    victim, other = runs
    try:
        for running in runs:
            assert running.stdout is not None
            read_until(running.stdout.fileno(), b"ready\n", 300)
        before = len(vmlab.processes())
        victim.kill()
        victim.communicate()
        assert wait_until(lambda: len(vmlab.processes()) < before, 120)
        assert len(vmlab.runs) == 2
        # The next command clears what it left, and nothing of the one that lives.
        assert vmlab.run("clean").returncode == 0
        assert len(vmlab.runs) == 1
        assert other.communicate(b"still here\n", timeout=120) == (b"still here\n", b"")
        assert other.returncode == 0
    finally:
        for running in runs:
            running.kill()
            running.communicate()
    assert nothing_left(vmlab)


@pytest.mark.timeout(1200)
def test_eight_machines_at_once_each_with_its_own_name(vmlab: Vmlab) -> None:
    command = ["run", *AMD64, "--memory", "128M", "--", "hostname"]
    running = [vmlab.start(*command) for _ in range(8)]
    try:
        done = [one.communicate(timeout=900) for one in running]
    finally:
        for one in running:
            one.kill()
            one.communicate()
    assert [one.returncode for one in running] == [0] * 8, done
    assert [err for _, err in done] == [b""] * 8
    names = {out.decode().strip() for out, _ in done}
    assert len(names) == 8 and all(name.startswith("vm-") for name in names)
    assert nothing_left(vmlab)


def test_a_guest_that_panics_is_told_with_its_console(vmlab: Vmlab) -> None:
    done = vmlab.run(
        "run", *AMD64, "--",
        "echo before; echo c >/proc/sysrq-trigger; sleep 1000",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, b"before\n")
    assert b"did not end" in done.stderr and b"sysrq_handle_crash" in done.stderr
    assert nothing_left(vmlab)


def test_the_command_gets_a_terminal_whose_size_follows(vmlab: Vmlab) -> None:
    master, slave = pty.openpty()
    subprocess.run(["stty", "rows", "33", "cols", "101"], stdin=slave, check=True)
    running = vmlab.start(
        "run", *AMD64, "--",
        "tty; stty size; trap 'stty size; exit 5' WINCH; echo ready; read x; echo got $x; "
        "while :; do sleep 0.1; done",
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    try:
        seen = read_until(master, b"ready\r\n")
        assert b"/dev/hvc0\r\n" in seen and b"33 101\r\n" in seen
        os.write(master, b"typed\n")
        read_until(master, b"got typed\r\n")
        subprocess.run(["stty", "rows", "40", "cols", "90"], stdin=slave, check=True)
        running.send_signal(signal.SIGWINCH)
        read_until(master, b"40 90\r\n")
        assert running.wait(timeout=300) == 5
    finally:
        running.kill()
        running.wait()
        os.close(master)
        os.close(slave)
    assert nothing_left(vmlab)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--image", "debian-12-amd64-tinny"], "debian-12-amd64-tiny"),
        (["--memory", "lots"], "lots"),
        (["--modules", "/tmp"], "needs --kernel"),
        (["--kernel", "/nowhere"], "a file that exists"),
        (["--share", "/nowhere:/src"], "a directory that exists"),
        (["--share", "relative"], "--share"),
        (["--disk", "none"], "none"),
        (["--copy-out", "relative"], "absolute path"),
        (["--hypervisor", "qemuu"], "did you mean 'qemu'"),
    ],
)
def test_wrong_options_are_told_before_anything_is_started(
    vmlab: Vmlab, words: list[str], expected: str
) -> None:
    done = vmlab.run("run", *AMD64, *words, "--", "true")
    if words[0] == "--image":
        done = vmlab.run("run", *words, "--", "true")
    assert done.returncode in {2, 3, 4}
    text = done.stderr.decode()
    assert expected in text and "Traceback" not in text and "hint:" in text
    assert not vmlab.processes()

"""`vmlab run` where nobody names a hypervisor: the embedded engine, like running it here."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.e2e.conftest import Vmlab, unpack_modules
from tests.e2e.test_run import nothing_left, read_until
from tests.store import IMAGE_STORE

from vmlab.images import ImageStore

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(600)]


def test_streams_status_disk_harts_and_copies_pass_through(vmlab: Vmlab, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("copied")
    data = bytes(range(256)) * 1024
    done = vmlab.run(
        "run", "--memory", "256M", "--cpus", "2", "--disk", "64M", "--timeline",
        "--share", f"{tmp_path}/here:/copied:rw:copy", "--copy-out", f"/root/out:{tmp_path}/out",
        "--hypervisor", "embedded", "--share", f"{tmp_path}/here:/read",
        "--", "cat; uname -sm >&2; nproc >&2; cat /copied/file /read/file >&2; echo >&2; "
        "cat /sys/block/vda/size >&2; mkdir /root/out; echo made >/root/out/file; exit 7",
        input=data,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert done.stdout == data
    told, *lines = done.stderr.decode().splitlines()
    assert told == f"{tmp_path}/here is copied to /read: the engine mounts nothing"
    assert lines[:4] == ["Linux riscv64", "2", "copiedcopied", "131072"]
    steps = [line.split(maxsplit=2)[2] for line in lines[4:]]
    assert steps[:3] == ["image", "hypervisor", "start"] and steps[-1] == "in all"
    assert (tmp_path / "out" / "file").read_text() == "made\n"
    assert nothing_left(vmlab)


def test_ctrl_c_reaches_the_command_in_a_kernel_of_ones_own(vmlab: Vmlab, tmp_path: Path) -> None:
    image = ImageStore(IMAGE_STORE).ensure("debian-13-riscv64-tiny")
    assert image.kernel is not None
    (tmp_path / "Image").symlink_to(image.kernel)
    unpack_modules(image, tmp_path)
    running = vmlab.start(
        "run", "--kernel", f"{tmp_path}/Image", "--modules", str(tmp_path), "--append", "mine=yes",
        "--",
        "grep -o mine=yes /proc/cmdline; trap 'echo caught; exit 9' INT; echo ready; "
        "while :; do sleep 0.1; done",
    )  # fmt: skip
    assert running.stdout is not None
    assert read_until(running.stdout.fileno(), b"ready\n") == b"mine=yes\nready\n"
    assert len(vmlab.processes()) == 1 == len(vmlab.engines())
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=300)
    assert (running.returncode, out, err) == (9, b"caught\n", b"")
    assert nothing_left(vmlab)


def test_a_kept_machine_is_found_without_saying_where(vmlab: Vmlab, tmp_path: Path) -> None:
    done = vmlab.run("run", "--keep", "--", "echo 1 >/root/a")
    assert done.returncode == 0, done.stderr
    name = done.stderr.decode().split()[0]
    try:
        shell = vmlab.run("shell", name, input=b"cat /root/a; exit 4\n")
        assert (shell.returncode, shell.stdout) == (4, b"1\n"), shell.stderr
        assert vmlab.run("copy", f"{name}:/root/a", str(tmp_path)).returncode == 0
        assert (tmp_path / "a").read_text() == "1\n"
        assert b"activate this console" in vmlab.run("console", "--log", name).stdout
    finally:
        assert vmlab.run("delete", name).returncode == 0
    assert not vmlab.engines()
    assert vmlab.run("delete", name).returncode == 3


def test_another_architecture_is_qemus_and_that_is_told(vmlab: Vmlab) -> None:
    done = vmlab.run("run", "--image", "debian-12-amd64-tiny", "--", "uname", "-m")
    assert (done.returncode, done.stdout) == (0, b"x86_64\n"), done.stderr
    assert done.stderr == (
        b"on QEMU, and not on the embedded engine: it runs riscv64 guests, and "
        b"debian-12-amd64-tiny is x86_64\n"
    )

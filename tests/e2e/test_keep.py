"""A machine that is kept outlives the command, and others talk to it until it is deleted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.e2e.conftest import AMD64, Vmlab

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_kept_machine_is_talked_to_until_it_is_deleted(vmlab: Vmlab, tmp_path: Path) -> None:
    done = vmlab.run("run", *AMD64, "--keep", "--", "echo 1 >/root/a")
    assert done.returncode == 0
    name = done.stderr.decode().split()[0]
    try:
        (tmp_path / "tree" / "sub").mkdir(parents=True)
        (tmp_path / "tree" / "sub" / "file").write_text("copied")
        assert vmlab.run("copy", str(tmp_path / "tree"), f"{name}:/root/").returncode == 0
        shell = vmlab.run("shell", name, input=b"cat /root/a /root/tree/sub/file; exit 4\n")
        assert (shell.returncode, shell.stdout) == (4, b"1\ncopied")
        assert vmlab.run("copy", f"{name}:/root/a", str(tmp_path)).returncode == 0
        assert (tmp_path / "a").read_text() == "1\n"
        log = vmlab.run("console", "--log", name)
        assert b"activate this console" in log.stdout
        both = vmlab.run("copy", "here", "there")
        assert both.returncode == 2 and b"NAME:/PATH" in both.stderr
        _statuses_pass_through(vmlab, name)
        _a_reader_that_goes_away_ends_the_command(vmlab, name)
        _a_killed_shell_ends_its_command(vmlab, name)
    finally:
        assert vmlab.run("delete", name).returncode == 0
    assert not vmlab.processes()
    gone = vmlab.run("shell", name, input=b"")
    assert gone.returncode == 3 and name.encode() in gone.stderr


def _statuses_pass_through(vmlab: Vmlab, name: str) -> None:
    for text, status in [
        ("exit 1", 1), ("no-such-program", 127), ("exit 255", 255),
        ("kill -TERM $$", 143), ("kill -KILL $$", 137),
    ]:  # fmt: skip
        done = vmlab.run("shell", name, input=text.encode() + b"\n")
        assert (done.returncode, done.stdout) == (status, b""), text


def _a_killed_shell_ends_its_command(vmlab: Vmlab, name: str) -> None:
    shell = vmlab.start("shell", name, stdin=subprocess.PIPE)
    assert shell.stdin is not None and shell.stdout is not None
    shell.stdin.write(b"trap 'echo told >/root/told; exit' HUP; echo began; sleep 4321\n")
    shell.stdin.flush()
    assert shell.stdout.readline() == b"began\n"
    shell.kill()
    shell.communicate()
    left = b"until [ -e /root/told ]; do sleep 0.1; done; ps | grep '[s]leep 4321'; echo looked\n"
    assert vmlab.run("shell", name, input=left).stdout == b"looked\n"


def _a_reader_that_goes_away_ends_the_command(vmlab: Vmlab, name: str) -> None:
    """As in `vmlab shell NAME | head -1`."""
    endless = vmlab.start("shell", name, stdin=subprocess.PIPE)
    assert endless.stdin is not None and endless.stdout is not None
    endless.stdin.write(b"exec yes $((6 * 7)) of them\n")
    endless.stdin.close()
    assert endless.stdout.readline() == b"42 of them\n"
    endless.stdout.close()
    assert endless.wait(timeout=120) == 141
    assert endless.stderr is not None
    assert endless.stderr.read() == b""
    endless.stderr.close()
    with open("/dev/full", "wb") as full:  # noqa: PTH123 (a device)
        failed = vmlab.start("shell", name, stdin=subprocess.PIPE, stdout=full)
        _, said = failed.communicate(b"exec yes to a full disk\n", timeout=120)
    assert failed.returncode == 3
    assert b"stdout cannot be written here: No space left on device" in said
    gone = vmlab.run("shell", name, input=b"pidof yes\n")
    assert (gone.returncode, gone.stdout) == (1, b""), "a command runs on in the guest"

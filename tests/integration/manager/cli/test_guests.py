"""The manager's machines with real guests: what goes in and out of them, and whose a name is."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests.e2e.conftest import AMD64, Vmlab
from tests.e2e.test_terminal import Terminal

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def vmlab() -> Iterator[Vmlab]:
    """A home with a machine `web` that was launched."""
    home = Path(tempfile.mkdtemp(prefix="vmh-"))
    vmlab = Vmlab(home)
    vmlab.environment["VMLAB_HOSTS"] = '[{"name": "qemu", "hypervisor": "qemu"}]'
    try:
        done = vmlab.run("launch", "web", "--image", "debian-12-amd64-tiny", "--memory", "256M")
        assert done.returncode == 0, done.stderr
        assert done.stdout == b"web\n"
        yield vmlab
        gone = vmlab.run("delete", "--force", "web")
        assert gone.returncode == 0, gone.stderr
        assert not [name for name in _programs(vmlab) if "qemu" in name]
    finally:
        vmlab.run("serve", "--stop")
        shutil.rmtree(home)


def _programs(vmlab: Vmlab) -> list[str]:
    """What runs with the home, by name."""
    names = []
    for process in vmlab.processes():
        with suppress(psutil.NoSuchProcess):  # it has ended since
            names.append(process.name())
    return names


def test_a_command_s_streams_and_status_pass_through(vmlab: Vmlab) -> None:
    done = vmlab.run("exec", "web", "--", "sh", "-c", "cat; echo told >&2; exit 7", input=b"given")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"given", b"told\n")
    text = vmlab.run("exec", "web", "echo $((6 * 7)); kill -TERM $$")
    assert (text.returncode, text.stdout) == (143, b"42\n")
    missing = vmlab.run("exec", "web", "--", "no-such-program")
    assert missing.returncode == 127
    shell = vmlab.run("shell", "web", input=b"hostname; exit 3\n")
    assert (shell.returncode, shell.stdout) == (3, b"web\n")


def test_much_goes_through_and_nothing_is_lost(vmlab: Vmlab) -> None:
    data = os.urandom(3 << 20)
    done = vmlab.run("exec", "web", "--", "cat", input=data)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data


def test_a_reader_that_goes_away_ends_the_command(vmlab: Vmlab) -> None:
    endless = vmlab.start("exec", "web", "--", "yes", "again")
    assert endless.stdout is not None and endless.stderr is not None
    assert endless.stdout.readline() == b"again\n"
    endless.stdout.close()
    assert endless.wait(timeout=240) == 141
    endless.stderr.close()
    gone = vmlab.run("exec", "web", "until ! pidof yes; do sleep 0.1; done")
    assert gone.returncode == 0


def test_ctrl_c_goes_to_the_command(vmlab: Vmlab) -> None:
    script = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.1; done"
    child = vmlab.start("exec", "web", "--", "sh", "-c", script)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(2)
    out, err = child.communicate(timeout=240)
    assert (child.returncode, out) == (5, b"interrupted\n"), err


def test_trees_are_copied_both_ways(vmlab: Vmlab, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "run").write_text("#!/bin/sh\necho ran\n")
    (tree / "sub" / "run").chmod(0o755)
    (tree / "link").symlink_to("sub/run")
    done = vmlab.run("copy", str(tree), "web:/root/")
    assert done.returncode == 0, done.stderr
    assert vmlab.run("exec", "web", "--", "/root/tree/link").stdout == b"ran\n"
    back = tmp_path / "back"
    done = vmlab.run("copy", "web:/root/tree", str(back))
    assert done.returncode == 0, done.stderr
    assert (back / "link").is_symlink()
    assert (back / "sub" / "run").stat().st_mode & 0o777 == 0o755
    missing = vmlab.run("copy", "web:/root/nothing", str(tmp_path / "none"))
    assert missing.returncode == 3
    assert b"nothing" in missing.stderr
    assert not (tmp_path / "none").exists()


def test_its_console(vmlab: Vmlab) -> None:
    # Its agent may answer before its console is there.
    deadline = time.monotonic() + 240
    while b"activate this console" not in (log := vmlab.run("console", "--log", "web")).stdout:
        assert time.monotonic() < deadline, log
    terminal = Terminal(24, 80)
    attached = vmlab.start(
        "console", "web", stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave,
        start_new_session=True,
    )  # fmt: skip
    try:
        terminal.shows("activate this console")
        _until_it_takes_keys(terminal)
        terminal.type("echo $((40 + 2)) typed\r")
        terminal.shows("42 typed")
        terminal.type("\x1d")
        assert attached.wait(timeout=240) == 0
    finally:
        attached.kill()
        attached.wait()
        terminal.close()


def _until_it_takes_keys(terminal: Terminal) -> None:
    """What is typed before the console is attached is nobody's: a terminal made raw forgets it."""
    for _ in range(30):
        terminal.type("\r")
        with suppress(AssertionError):
            terminal.shows("#", seconds=6)
            return
    pytest.fail("the console takes no keys")


def test_a_command_on_a_terminal_has_one(vmlab: Vmlab) -> None:
    terminal = Terminal(31, 77)
    child = vmlab.start(
        "exec", "web", "--", "sh", "-c", "stty size; read line; echo got $line; exit 4",
        stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave,
        start_new_session=True,
    )  # fmt: skip
    try:
        terminal.shows("31 77")
        terminal.type("typed\r")
        terminal.shows("got typed")
        assert child.wait(timeout=240) == 4
    finally:
        child.kill()
        child.wait()
        terminal.close()


def test_a_name_that_both_stores_have_has_to_be_said_whose(vmlab: Vmlab) -> None:
    kept = vmlab.run("run", *AMD64, "--keep", "--", "echo kept >/root/whose")
    assert kept.returncode == 0, kept.stderr
    name = kept.stderr.decode().split()[0]
    try:
        mine = vmlab.run("exec", name, "--", "cat", "/root/whose")
        assert (mine.returncode, mine.stdout) == (0, b"kept\n"), mine.stderr
        made = vmlab.run("create", name, "--image", "debian-12-amd64-tiny")
        assert made.returncode == 0, made.stderr
        listed = vmlab.run("list")
        assert f"`vmlab run --keep` left {name}".encode() in listed.stderr
        both = vmlab.run("delete", name)
        assert both.returncode == 3
        assert b"two machines" in both.stderr
        assert b"--store kept" in both.stderr
        one = vmlab.run("delete", name, "--store", "manager")
        assert (one.returncode, one.stdout) == (0, f"{name} is gone\n".encode()), one.stderr
    finally:
        gone: subprocess.CompletedProcess[bytes] = vmlab.run("delete", name)
        assert gone.returncode == 0, gone.stderr

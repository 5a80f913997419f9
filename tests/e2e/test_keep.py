"""A machine that is kept outlives the command, and others talk to it until it is deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.conftest import Vmlab

pytestmark = [pytest.mark.boots, pytest.mark.slow]


def test_a_kept_machine_is_talked_to_until_it_is_deleted(vmlab: Vmlab, tmp_path: Path) -> None:
    done = vmlab.run("run", "--image", "debian-12-amd64-tiny", "--keep", "--", "echo 1 >/root/a")
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
    finally:
        assert vmlab.run("delete", name).returncode == 0
    assert not vmlab.processes()
    gone = vmlab.run("shell", name, input=b"")
    assert gone.returncode == 3 and name.encode() in gone.stderr

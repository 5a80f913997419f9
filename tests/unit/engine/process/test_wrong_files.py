"""Machine files that cannot work are refused with the field, what stands there, what would do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmlab.engine.configuration import Configuration, fields_text, load
from vmlab.engine.structures import members_of
from vmlab.machine.errors import InvalidSpec

BASE = 'name = "vm"\nmemory = 16777216\nqmp = "q.sock"\n'
NIC = "[[nics]]\nname = 'n'\nmac = '52:54:00:00:00:01'\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "name: it is needed"),
        (BASE.replace("16777216", '"16M"'), "memory = '16M': a value of the type integer"),
        (BASE.replace("16777216", "16777217"), "a multiple of 4096 bytes"),
        (BASE.replace("16777216", "-4096"), "memory = -4096: at least 1048576"),
        (BASE + "harts = 0", "harts = 0: at least 1"),
        (BASE + "seed = -1", "seed = -1: from 0 to"),
        (BASE + "[boot]\nkernal = 'k'", "boot.kernal: none of that name; there are cmdline,"),
        (BASE + "boot = 3", "boot = 3: a value of the type object"),
        (BASE + "disks = 3", "disks = 3: a value of the type array"),
        (BASE + "[[disks]]\nname = 'd'", "disks[0].file: it is needed"),
        (
            BASE + "[[disks]]\nname = 'd'\nfile = 'f'\nformat = 'vmdk'",
            "disks[0].format = 'vmdk': one of raw, qcow2",
        ),
        (
            BASE + f"[[disks]]\nname = 'd'\nfile = 'f'\nserial = '{'s' * 21}'",
            "at most 20 bytes",
        ),
        (BASE + "[[disks]]\nname = 'd'\nfile = 'f'\n" * 2, "disks.name = 'd': a name of its own"),
        (BASE + NIC * 2, "nics.name = 'n': a name of its own for each; 2 have this one"),
        (BASE + NIC + "segment = 'tap'", "nics[0].path = '': what a tap segment is found by"),
        (BASE + NIC + "segment = 'datagram'\npath = 'a'", "nics[0].peer = '': the socket of"),
        (BASE + NIC + "forwards = [{ guest = 22 }]", "only a user network has forwards"),
        (BASE + "[[channels]]\nsocket = 's'", "channels.name = '': a name"),
        (BASE + "[[channels]]\nname = 'c'\nsocket = 's'\n" * 2, "channels.name = 'c': a name of"),
        (BASE.replace("q.sock", ""), "qmp = '': the path of a socket"),
        (BASE.replace("q.sock", "q\\u0000"), "qmp = 'q\\x00': text without NUL"),
        (BASE + "[time]\nmode = 'virtual'", "time.mode = 'virtual': one of host, deterministic"),
        (BASE + "[time]\ninstructions-per-tick = 0", "time.instructions-per-tick = 0: from 1"),
        ("name = ", "valid TOML"),
    ],
)
def test_a_file_that_cannot_work_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(InvalidSpec) as caught:
        load(tmp_path / "m.toml")
    assert problem in str(caught.value)
    assert caught.value.source == str(tmp_path / "m.toml")
    assert caught.value.hint


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(BASE.replace("16777216", "4097") + "harts = 0\nseed = -1")
    with pytest.raises(InvalidSpec) as caught:
        load(tmp_path / "m.toml")
    assert [each.field for each in caught.value.problems] == ["memory", "harts", "memory", "seed"]


def said(folder: Path, text: str) -> str:
    """What the process says to a file; it ends with 2, without a traceback."""
    (folder / "m.toml").write_text(text)
    command = [sys.executable, "-m", "vmlab.engine", folder / "m.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "q.sock").exists()
    return done.stderr


def test_more_memory_than_a_host_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(bytes(64))
    text = BASE.replace("16777216", str(1 << 60)) + "[boot]\nkernel = 'kernel'"
    assert f"no room for {1 << 60} bytes of guest memory" in said(tmp_path, text)


def test_more_disks_than_a_board_has_slots_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(bytes(64))
    disks = "".join(f"[[disks]]\nname = 'd{n}'\nfile = 'kernel'\n" for n in range(40))
    assert "a SCSI host needs one for all" in said(
        tmp_path, BASE + "[boot]\nkernel = 'kernel'\n" + disks
    )


def test_the_fields_that_are_told_are_those_that_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmlab.engine", "--fields"],
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    lines = done.stdout.splitlines()
    assert "\n".join(lines) == fields_text()
    top = {line.split(":")[0].removesuffix("[]") for line in lines if "." not in line.split(":")[0]}
    assert top == {member.name for member in members_of(Configuration)}
    assert "memory: integer, needed" in lines
    assert "disks[].format: one of raw, qcow2" in lines

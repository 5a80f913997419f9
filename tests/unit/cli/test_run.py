"""`vmlab run` before and after the machine: what is asked for, and how the end is told."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from vmlab.cli import main as frame
from vmlab.images.image import Image, StoredFile
from vmlab.lab import boot, session
from vmlab.lab.boot import Bootable, Wish
from vmlab.lab.session import Interrupted
from vmlab.lab.timeline import Step
from vmlab.machine.architecture import Architecture

Booted = dict[str, Any]


@pytest.fixture
def booted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Booted:
    """Nothing is fetched and nothing boots: what would have been is kept."""
    seen: Booted = {"status": 0}

    def find_image(wish: Wish, store: object, *, progress: object) -> Image:
        seen["wish"] = wish
        files = {"kernel": StoredFile("kernel", 1, "")}
        return Image("0" * 64, "tiny", Architecture.RISCV64, tmp_path, files)

    def run_session(wanted: Bootable, body: object, **options: Any) -> int:
        seen.update(options, wanted=wanted)
        options["timeline"].steps.append(Step("boot", 1.25))
        if isinstance(seen["status"], BaseException):
            raise seen["status"]
        return int(seen["status"])

    monkeypatch.setattr(boot, "find_image", find_image)
    monkeypatch.setattr(session, "run_session", run_session)
    return seen


@pytest.mark.parametrize("status", [0, 1, 7, 126, 127, 143, 255])
def test_the_command_s_status_is_vmlab_s(booted: Booted, status: int) -> None:
    booted["status"] = status
    assert frame.main(["run", "--", "exit", str(status)]) == status


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143), (1, 129)])
def test_a_signal_that_ended_it_is_told_as_a_shell_does(
    booted: Booted, number: int, status: int
) -> None:
    booted["status"] = Interrupted(number)
    assert frame.main(["run", "--", "true"]) == status


def test_options_arrive_where_they_are_meant(booted: Booted, tmp_path: Path) -> None:
    (tmp_path / "k").touch()
    (tmp_path / "m").mkdir()
    status = frame.main([
        "run", "--kernel", str(tmp_path / "k"), "--modules", str(tmp_path / "m"), "--append", "x=1",
        "--memory", "1G", "--cpus", "3", "--share", f"{tmp_path}:/src:rw", "--disk", "1G",
        "--gdb", "--network", "--keep", "--hypervisor", "qemu", "--", "ls", "-l", "--color",
    ])  # fmt: skip
    assert status == 0
    wish = booted["wish"]
    assert (wish.kernel, wish.modules) == (tmp_path / "k", tmp_path / "m")
    assert (wish.append, wish.memory, wish.cpus, wish.disks) == ("x=1", "1G", 3, ("1G",))
    assert wish.gdb and wish.network and booted["keep"] and booted["wanted"].debugged
    assert booted["hypervisor"] == "qemu"


def test_a_timeline_is_printed_for_people(
    booted: Booted, capsys: pytest.CaptureFixture[str]
) -> None:
    frame.main(["run", "--timeline", "--", "true"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["image", "boot", "in all"]
    assert lines[1].split()[0] == "1.250"


def test_a_timeline_is_one_line_of_json_for_programs(
    booted: Booted, capsys: pytest.CaptureFixture[str]
) -> None:
    booted["status"] = 3
    assert frame.main(["run", "--json", "--", "false"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    found = json.loads(captured.err.splitlines()[-1])
    assert [row["step"] for row in found["timeline"]] == ["image", "boot"]
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["timeline"]))


def test_where_the_time_went_is_told_when_it_ended_badly_too(
    booted: Booted, capsys: pytest.CaptureFixture[str]
) -> None:
    booted["status"] = Interrupted(2)
    assert frame.main(["run", "--timeline", "--", "true"]) == 130
    assert "in all" in capsys.readouterr().err


def test_a_machine_that_was_kept_is_named(
    booted: Booted, capsys: pytest.CaptureFixture[str]
) -> None:
    frame.main(["run", "--keep", "--", "true"])
    assert f"`vmlab shell {booted['wish'].name}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--copy-out", "relative"], ["--modules", "/tmp"], ["--memory", "lots"], ["--cpus", "0"]],
)
def test_wrong_options_end_before_anything_is_fetched(
    booted: Booted, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert frame.main(["run", *words, "--", "true"]) == 2
    assert "wish" not in booted
    err = capsys.readouterr().err
    assert words[0] in err or words[1] in err
    assert "hint:" in err


def test_a_fresh_shell_can_be_debugged_and_is_not_kept(booted: Booted) -> None:
    assert frame.main(["shell", "--gdb"]) == 0
    assert booted["wish"].gdb and not booted["keep"]


def test_nothing_to_run_is_a_usage_error(
    booted: Booted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frame.main(["run"]) == 2
    assert "missing argument 'command'" in capsys.readouterr().err


def test_garbage_is_collected_again_however_it_ends(booted: Booted) -> None:
    for status in (0, Interrupted(2)):
        booted["status"] = status
        frame.main(["run", "--", "true"])
        assert gc.isenabled()

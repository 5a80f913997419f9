from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.hypervisors import leftovers
from vmlab.hypervisors.ownership import Home, Run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    return Home.open()


def test_nothing_to_clean(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean"]) == ExitCode.OK
    assert capsys.readouterr().out == (
        f"nothing to clean\n0 dead runs cleared, 0 alive ({home.directory})\n"
    )


def test_dead_runs_go_and_live_ones_stay(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.begin(home) as run:
        (home.runs / "dead" / "disks").mkdir(parents=True)
        assert main(["clean", "--dry-run"]) == ExitCode.OK
        printed = capsys.readouterr().out
        assert "would be removed" in printed
        assert "1 dead run would be cleared, 1 alive" in printed
        assert (home.runs / "dead").exists()
        assert main(["clean"]) == ExitCode.OK
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["run", "what", "where", "outcome"]
        removed = ["dead", "directory", str(home.runs / "dead"), "removed"]
        assert removed in [line.split() for line in lines]
        assert lines[-1] == f"1 dead run cleared, 1 alive ({home.directory})"
        assert [path.name for path in home.runs.iterdir()] == [run.id]


def test_json_tells_the_same(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (home.runs / "dead").mkdir()
    assert main(["clean", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {
        "home": str(home.directory),
        "dry_run": False,
        "dead": ["dead"],
        "live": [],
        "items": [
            {
                "run": "dead",
                "kind": "directory",
                "action": "remove",
                "path": str(home.runs / "dead"),
                "pid": None,
                "error": None,
            }
        ],
    }


def test_what_cannot_be_removed_is_an_error(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home.runs / "dead").mkdir()
    monkeypatch.setattr(leftovers, "_remove_tree", lambda directory: "Read-only file system")
    assert main(["clean"]) == ExitCode.CANNOT
    printed = capsys.readouterr().out
    assert "failed: Read-only file system" in printed
    assert "1 thing could not be removed" in printed
    assert main(["clean", "--json"]) == ExitCode.CANNOT
    assert json.loads(capsys.readouterr().out)["items"][0]["error"] == "Read-only file system"


def test_a_home_that_others_can_write_is_refused(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    home.directory.chmod(0o777)
    assert main(["clean"]) == ExitCode.CANNOT
    assert f"hint: chmod go-w {home.directory}" in capsys.readouterr().err


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", "--help"]) == ExitCode.OK
    printed = capsys.readouterr().out
    assert "--dry-run" in printed
    assert "stores are left alone" in printed

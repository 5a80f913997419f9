"""``vmlab backup`` and ``vmlab restore-backup``, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy.orm import Session
from tests.unit.manager.store.rows import add_disk, add_machine

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.hypervisors.ownership import Home
from vmlab.manager.settings import Settings
from vmlab.manager.store import queries
from vmlab.manager.store.database import Database


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The home that commands use, with a machine and a disk in its store."""
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    settings = Settings(home=Home.open(tmp_path / "home"))
    database = Database.open(settings)

    def add(s: Session) -> None:
        add_machine(s, "web")
        add_disk(s, "data")

    database.write_now(add)
    database.close()
    return settings


def names(settings: Settings) -> list[str]:
    database = Database.open(settings)
    found = [machine.name for machine in database.read_now(queries.list_machines).items]
    database.close()
    return found


def test_store_is_saved_and_restored(
    home: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "b")
    assert main(["backup", file]) == ExitCode.OK
    said = capsys.readouterr().out
    assert f"{file}: 1 machine, 1 disk, 0 networks, 0 templates" in said
    assert "the files of its disks are not in it" in said
    assert main(["restore-backup", "--check", file]) == ExitCode.OK
    assert ": whole, of 20" in capsys.readouterr().out

    database = Database.open(home)
    database.write_now(add_machine, "later")
    database.close()
    assert main(["restore-backup", file]) == ExitCode.CANNOT
    assert f"vmlab restore-backup --replace {file}" in capsys.readouterr().err
    assert names(home) == ["later", "web"]
    assert main(["restore-backup", "--replace", file]) == ExitCode.OK
    told = capsys.readouterr()
    assert "restored 1 machine, 1 disk" in told.out
    assert "what was there before is in " in told.out
    assert "disk data: its file " in told.err
    assert names(home) == ["web"]


def test_same_as_json(home: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "b")
    assert main(["backup", file, "--json"]) == ExitCode.OK
    saved = json.loads(capsys.readouterr().out)
    assert (saved["file"], saved["database"], saved["rows"]["machines"]) == (file, "sqlite", 1)
    assert [(disk["disk"], disk["allocated"]) for disk in saved["disks"]] == [("data", None)]
    assert main(["restore-backup", "--check", "--json", file]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == saved
    assert main(["restore-backup", "--replace", "--json", file]) == ExitCode.OK
    restored = json.loads(capsys.readouterr().out)
    assert restored["missing"] == restored["disks"] == saved["disks"]
    assert Path(restored["replaced"]).parent == home.directory


def test_store_of_another_host_is_not_meant(
    home: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VMLAB_URL", "https://elsewhere:8443")
    for command in ("backup", "restore-backup"):
        assert main([command, str(tmp_path / "b")]) == ExitCode.CANNOT
        if command == "backup":
            assert "VMLAB_URL says https://elsewhere:8443" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_home_without_a_store_has_nothing_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "empty"))
    assert main(["backup", str(tmp_path / "b")]) == ExitCode.CANNOT
    assert "nothing to save" in capsys.readouterr().err


def test_password_of_a_database_is_told_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    nowhere = tmp_path / "nowhere"
    monkeypatch.setenv("VMLAB_DATABASE_URL", f"postgresql://ann:secret@/vmlab?host={nowhere}")
    assert main(["backup", str(tmp_path / "b")]) == ExitCode.UNAVAILABLE
    said = capsys.readouterr().err
    assert "does not answer" in said and str(nowhere) in said
    assert "secret" not in said

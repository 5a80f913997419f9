from __future__ import annotations

import stat
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.records import MachineRecords, read_document
from vmlab.machine.errors import MachineNotFound, OperationFailed


@pytest.fixture(params=["run", "store"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> MachineRecords:
    return MachineRecords(Owner(request.param, "o1", tmp_path), "qemu")


def test_a_record_is_read_back_by_another(records: MachineRecords) -> None:
    directory = records.create("m1")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert records.ids() == []
    records.save("m1", {"name": "web", "pid": 7})
    records.save("m1", {"name": "web", "pid": 8})
    again = MachineRecords(records.owner, "qemu")
    assert again.ids() == ["m1"]
    assert again.load("m1") == {"name": "web", "pid": 8}
    assert MachineRecords(records.owner, "other").ids() == []
    assert sorted(path.name for path in directory.iterdir()) == ["machine.json"]


def test_two_machines_cannot_have_one_directory(records: MachineRecords) -> None:
    records.create("m1")
    with pytest.raises(FileExistsError):
        records.create("m1")


@pytest.mark.parametrize("id_", ["../up", "", ".hidden", "a/b", "x" * 65])
def test_an_id_that_is_no_file_name_is_refused(records: MachineRecords, id_: str) -> None:
    with pytest.raises(ValueError, match="no id of a machine"):
        records.directory(id_)


def test_unknown_machine(records: MachineRecords) -> None:
    with pytest.raises(MachineNotFound, match="'m1'"):
        records.load("m1")


@pytest.mark.parametrize("text", ["{", "[1]", "\udc80"])
def test_damaged_record_is_refused(records: MachineRecords, text: str) -> None:
    directory = records.create("m1")
    (directory / "machine.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OperationFailed, match=r"machine\.json cannot be read"):
        records.load("m1")


def test_removing_takes_everything_and_can_be_repeated(records: MachineRecords) -> None:
    directory = records.create("m1")
    records.save("m1", {})
    (directory / "disks").mkdir()
    (directory / "disks" / "root.img").write_bytes(b"x")
    records.remove("m1")
    assert not directory.exists()
    assert records.ids() == []
    records.remove("m1")


def test_a_document_has_to_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_document(tmp_path / "x")


def test_a_machine_that_was_half_removed_is_none(
    records: MachineRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    records.create("m1")
    records.save("m1", {})
    monkeypatch.setattr("vmlab.hypervisors.records.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        records.remove("m1")
    assert records.ids() == []

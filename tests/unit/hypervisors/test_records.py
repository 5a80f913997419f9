from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from vmlab.hypervisors.locks import FileLock
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.records import LOCK, MachineRecords, read_document
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


async def _hold(records: MachineRecords, order: list[str], name: str, seconds: float) -> None:
    async with records.locked("m1"):
        order.append(f"+{name}")
        await asyncio.sleep(seconds)
        order.append(f"-{name}")


def test_changes_of_one_machine_wait_for_each_other(records: MachineRecords) -> None:
    records.create("m1")
    order: list[str] = []

    async def both() -> None:
        await asyncio.gather(*(_hold(records, order, name, 0.05) for name in "abc"))

    asyncio.run(both())
    assert len(order) == 6
    assert all(order[i][1] == order[i + 1][1] for i in (0, 2, 4)), order


def test_a_machine_in_use_is_refused_after_a_while(records: MachineRecords) -> None:
    directory = records.create("m1")
    lock = FileLock.take(directory / LOCK)
    assert lock is not None
    lock.write(str(os.getpid()))

    async def wait() -> None:
        async with records.locked("m1", timeout=0.05):
            pytest.fail("it was locked twice")

    with pytest.raises(OperationFailed, match=f"in use by process {os.getpid()}"):
        asyncio.run(wait())
    lock.release()


def test_a_machine_that_was_deleted_cannot_be_locked(records: MachineRecords) -> None:
    async def wait() -> None:
        async with records.locked("m1"):
            pytest.fail("there is none")

    with pytest.raises(MachineNotFound, match="has no machine"):
        asyncio.run(wait())


def test_a_lock_is_free_after_the_machine_was_removed_under_it(records: MachineRecords) -> None:
    records.create("m1")

    async def delete() -> None:
        async with records.locked("m1"):
            records.remove("m1")
        records.create("m1")
        async with records.locked("m1", timeout=0.1):
            pass

    asyncio.run(delete())


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

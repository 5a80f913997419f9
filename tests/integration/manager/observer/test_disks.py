"""Findings about disks, made for real: files removed, added, cut; disks plugged behind the back."""

from __future__ import annotations

import pytest

from vmlab.machine.errors import InvalidSpec, VmlabError
from vmlab.manager.observer.checks import Thresholds
from vmlab.manager.operator.disk_rows import disk_part
from vmlab.manager.requests import AttachDisk, CreateDisk, DetachDisk, RepairFinding, StopMachine
from vmlab.manager.store.queries import find_disk

MIB = 1 << 20


def path_of(watched, disk):
    return watched.manager.storage.path(disk.id, disk.format)


async def part_of(watched, name):
    """A disk of the store's as a part of a machine."""
    return await watched.manager.database.read(
        lambda s: disk_part(watched.manager.storage, find_disk(s, name))
    )


def test_a_disk_whose_file_is_gone_is_found_and_marked_as_failed(run):
    async def test(watched):
        disk = await watched.disk_of("data")
        path = path_of(watched, disk)
        away = path.rename(path.with_name(".away"))
        finding = await watched.found("missing-disk")
        assert finding.subject == disk.id
        assert finding.evidence["path"] == str(path)
        await watched.repaired(finding, "adopt")
        assert (await watched.disk("data")).state == "failed"
        await watched.nothing()
        away.rename(path)
        await watched.repaired(finding, "adopt", undo=True)
        assert (await watched.disk("data")).state == "available"
        await watched.nothing()

    run(test)


def test_a_qcow2_that_is_none_is_a_missing_disk(run):
    async def test(watched):
        await watched.did(CreateDisk(name="data", size="1M", format="qcow2"))
        await watched.nothing()
        path_of(watched, await watched.disk("data")).write_bytes(b"\0" * 4096)
        assert "qcow2" in (await watched.found("missing-disk")).message

    run(test)


def test_a_file_of_no_disk_is_found_and_taken_in_as_one(run):
    async def test(watched):
        path = watched.manager.storage.path("a" * 32, "raw")
        path.write_bytes(b"precious" + b"\0" * (MIB - 8))
        finding = await watched.found("orphan-disk")
        assert finding.name == path.name
        repair = await watched.repaired(finding, "adopt")
        disk = await watched.disk(repair.result["undo"]["disk"])
        assert (disk.size, disk.state, disk.format) == (MIB, "available", "raw")
        await watched.nothing()
        await watched.repaired(finding, "adopt", undo=True)
        assert path.read_bytes().startswith(b"precious")
        await watched.found("orphan-disk")

    run(test)


def test_a_file_of_no_disk_is_not_over_where_it_may_be_what_an_operation_makes(run):
    async def test(watched):
        path = watched.manager.storage.path("a" * 32, "raw")
        path.write_bytes(b"precious")
        finding = await watched.found("orphan-disk")
        async with watched.under_way("disk:elsewhere"):
            path.write_bytes(b"not so precious")
            assert [each.id for each in await watched.sweep()] == [finding.id]
        assert (await watched.found("orphan-disk")).id == finding.id

    run(test)


def test_a_file_of_no_disk_is_moved_aside_and_back(run):
    async def test(watched):
        path = watched.manager.storage.directory / "notes.txt"
        path.write_text("precious")
        finding = await watched.found("orphan-disk")
        assert finding.actions == ("quarantine", "reconcile")
        await watched.repaired(finding, "quarantine")
        assert not path.exists()
        aside = list((path.parent / "quarantine").iterdir())
        assert [each.read_text() for each in aside] == ["precious"]
        await watched.nothing()
        await watched.repaired(finding, "quarantine", undo=True)
        assert path.read_text() == "precious"

    run(test)


def test_a_file_of_no_disk_is_removed_only_if_its_name_is_typed(run):
    async def test(watched):
        path = watched.manager.storage.path("a" * 32, "raw")
        path.write_bytes(b"precious")
        other = await watched.disk_of("data")
        finding = await watched.found("orphan-disk")
        for typed in (None, "data", ""):
            request = RepairFinding(finding=finding.id, action="reconcile", name=typed)
            with pytest.raises(InvalidSpec, match=path.name):
                await watched.manager.operator.submit(request)
        assert path.exists()
        await watched.repaired(finding, "reconcile", name=path.name)
        assert not path.exists()
        assert path_of(watched, other).exists()
        await watched.nothing()

    run(test)


@pytest.mark.parametrize("policy", ["reconcile", "quarantine", "adopt"])
def test_policies_for_files_of_no_disk_remove_none(run, policy):
    async def test(watched):
        path = watched.manager.storage.path("a" * 32, "raw")
        path.write_bytes(b"precious" + b"\0" * (MIB - 8))
        await watched.sweep()
        for each in await watched.operations():
            await watched.manager.operator.wait(each.id, 120)
        kept = list(watched.manager.storage.directory.rglob("*.raw"))
        assert [each.read_bytes()[:8] for each in kept] == [b"precious"]
        assert path.exists() is (policy != "quarantine")
        await watched.found("orphan-disk") if policy == "reconcile" else await watched.nothing()

    run(test, findings={"orphan-disk": policy})


def test_hundreds_of_findings_are_each_written_down_once_and_are_over_together(run):
    async def test(watched):
        paths = [watched.manager.storage.path(f"{number:032x}", "raw") for number in range(450)]
        for path in paths:
            path.write_bytes(b"\0" * 512)
        first = {each.subject: each for each in await watched.sweep()}
        assert set(first) == {path.name for path in paths}
        again = {each.subject: each for each in await watched.sweep()}
        assert {each.id for each in again.values()} == {each.id for each in first.values()}
        assert all(again[name].last_seen > each.last_seen for name, each in first.items())
        for path in paths[:-1]:
            path.unlink()
        assert [each.subject for each in await watched.sweep()] == [paths[-1].name]
        done = await watched.finding(first[paths[0].name].id)
        assert done.resolved is not None

    run(test)


# ------------------------------------------------------------------------ attachments


async def lacking(watched):
    """A machine that has not the disk that the store says it has; the finding."""
    await watched.machine_of("web")
    disk = await watched.disk_of("data", "web")
    machine = await watched.at_host("web")
    await machine.unplug_disk(disk.device)
    return machine, disk, await watched.found("disk-attachment-mismatch")


async def surplus(watched):
    """A machine that has a disk that the store says nobody has; the finding."""
    await watched.machine_of("web")
    await watched.disk_of("data")
    machine = await watched.at_host("web")
    await machine.plug_disk(await part_of(watched, "data"))
    return machine, await watched.disk("data"), await watched.found("disk-attachment-mismatch")


def test_a_disk_that_a_machine_lacks_is_attached_by_reconcile_and_that_can_be_undone(run):
    async def test(watched):
        machine, disk, finding = await lacking(watched)
        assert finding.evidence["direction"] == "store"
        await watched.repaired(finding, "reconcile")
        assert [each.path for each in (await machine.info()).disks] == [path_of(watched, disk)]
        assert (await watched.disk("data")).state == "attached"
        await watched.nothing()
        await watched.repaired(finding, "reconcile", undo=True)
        assert (await machine.info()).disks == ()
        await watched.nothing()

    run(test)


def test_a_disk_that_a_machine_lacks_is_detached_in_the_store_by_adopt(run):
    async def test(watched):
        machine, _, finding = await lacking(watched)
        await watched.repaired(finding, "adopt")
        disk = await watched.disk("data")
        assert (disk.state, disk.machine) == ("available", None)
        assert (await machine.info()).disks == ()
        await watched.nothing()
        await watched.repaired(finding, "adopt", undo=True)
        assert (await watched.disk("data")).machine == "web"
        await watched.found("disk-attachment-mismatch")

    run(test)


def test_a_disk_that_a_machine_has_too_many_is_detached_by_reconcile(run):
    async def test(watched):
        machine, disk, finding = await surplus(watched)
        assert finding.evidence["direction"] == "world"
        await watched.repaired(finding, "reconcile")
        assert (await machine.info()).disks == ()
        assert path_of(watched, disk).exists()
        assert (await watched.disk("data")).state == "available"
        await watched.nothing()
        await watched.repaired(finding, "reconcile", undo=True)
        assert (await watched.disk("data")).machine == "web"
        await watched.nothing()

    run(test)


def test_a_disk_that_a_machine_has_too_many_is_attached_in_the_store_by_adopt(run):
    async def test(watched):
        machine, _, finding = await surplus(watched)
        await watched.repaired(finding, "adopt")
        disk = await watched.disk("data")
        assert (disk.state, disk.machine) == ("attached", "web")
        await watched.nothing()
        await watched.did(DetachDisk(disk="data"))
        assert (await machine.info()).disks == ()

    run(test)


def test_a_disk_that_two_machines_have_is_taken_from_the_one_without_a_right(run):
    async def test(watched):
        await watched.machine_of("web")
        await watched.machine_of("db")
        disk = await watched.disk_of("data", "web")
        other = await watched.at_host("db")
        await watched.did(StopMachine(machine="web"))
        await other.plug_disk(await part_of(watched, "data"))
        finding = await watched.found("disk-attachment-mismatch")
        assert finding.actions == ("reconcile",)
        await watched.repaired(finding, "reconcile")
        assert (await other.info()).disks == ()
        assert (await watched.disk("data")).machine == "web"
        info = await (await watched.at_host("web")).info()
        assert [each.path for each in info.disks] == [path_of(watched, disk)]
        await watched.nothing()

    run(test)


# ------------------------------------------------------------------------ sizes, room


def test_a_file_that_is_too_small_is_grown_by_reconcile(run):
    async def test(watched):
        disk = await watched.disk_of("data")
        path = path_of(watched, disk)
        with path.open("r+b") as file:
            file.truncate(MIB // 2)
        finding = await watched.found("disk-size-mismatch")
        assert (finding.evidence["stored"], finding.evidence["seen"]) == (MIB, MIB // 2)
        await watched.repaired(finding, "reconcile")
        assert path.stat().st_size == MIB
        await watched.nothing()

    run(test)


def test_a_file_that_is_too_large_is_adopted_and_never_cut(run):
    async def test(watched):
        disk = await watched.disk_of("data")
        path = path_of(watched, disk)
        with path.open("r+b") as file:
            file.truncate(2 * MIB)
        finding = await watched.found("disk-size-mismatch")
        request = RepairFinding(finding=finding.id, action="reconcile")
        with pytest.raises(VmlabError, match="adopt"):
            await watched.manager.operator.submit(request)
        await watched.repaired(finding, "adopt")
        assert (await watched.disk("data")).size == 2 * MIB
        assert path.stat().st_size == 2 * MIB
        await watched.nothing()
        await watched.repaired(finding, "adopt", undo=True)
        assert (await watched.disk("data")).size == MIB
        await watched.found("disk-size-mismatch")

    run(test)


def test_little_room_is_found_where_the_manager_keeps_things(run):
    async def test(watched):
        findings = await watched.sweep()
        assert {each.code for each in findings} == {"storage-low"}
        paths = {each.subject for each in findings}
        assert str(watched.manager.settings.directory) in paths
        assert all(each.actions == () and each.evidence["size"] > 0 for each in findings)
        watched.manager.observer.thresholds = Thresholds(free_share=0.0)
        await watched.nothing()

    run(test, thresholds=Thresholds(free_share=1.1, free_bytes=1 << 80))


def test_a_disk_that_is_being_attached_is_none_that_is_lacking(run):
    async def test(watched):
        machine = await watched.machine_of("web")
        disk = await watched.disk_of("data", "web")
        await (await watched.at_host("web")).unplug_disk(disk.device)
        async with watched.under_way(f"disk:{disk.id}", f"machine:{machine.id}"):
            await watched.nothing()
        await watched.found("disk-attachment-mismatch")
        await watched.did(DetachDisk(disk="data"))
        await watched.nothing()
        await watched.did(AttachDisk(disk="data", machine="web"))
        await watched.nothing()

    run(test)

"""Disks of the store: made, attached, detached, grown, removed; and what is refused."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmlab.machine.sizes import MIB
from vmlab.manager.manager import Manager
from vmlab.manager.requests import (
    AttachDisk,
    CreateDisk,
    CreateMachine,
    DeleteDisk,
    DeleteMachine,
    DetachDisk,
    ResizeDisk,
    RestartMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.settings import Limits

Tell = Callable[..., None]


def files(manager: Manager) -> list[str]:
    """What is among the files of disks."""
    return sorted(path.name for path in manager.storage.directory.iterdir())


def everything(directory: Path) -> list[Path]:
    """All files below, but for those of the store."""
    return sorted(path for path in directory.rglob("*") if "manager.sqlite3" not in path.name)


def test_disk_moves_from_one_running_machine_to_another_with_what_was_written(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        for name in ("one", "two"):
            await asking.create(name)
            await asking.do(StartMachine(machine=name))
        made = await asking.do(CreateDisk(name="data", size=4 * MIB))
        result = await asking.do(AttachDisk(disk="data", machine="one", mount_point="/srv"))
        assert result["serial"] == "data"
        disk, machine = await asking.disk("data"), await asking.machine("one")
        assert (disk.state, disk.machine, disk.mount_point) == ("attached", "one", "/srv")
        assert [(each.name, each.device, each.size) for each in machine.disks] == [
            ("data", disk.device, 4 * MIB)
        ]
        assert disk.device in [each["name"] for each in machine.spec["disks"]]
        hardware = await asking.guest("one")
        hardware.write_disk(disk.device, 4096, b"written by one")
        await asking.do(DetachDisk(disk="data"))
        assert disk.device not in hardware.disks
        assert (await asking.disk("data")).state == "available"
        await asking.do(AttachDisk(disk="data", machine="two"))
        assert (await asking.guest("two")).read_disk(disk.device, 4096, 14) == b"written by one"
        assert files(asking.manager) == [f"{made['disk']}.raw"]
        kinds = [len(await asking.events(f"disk.{kind}")) for kind in ("attached", "detached")]
        assert kinds == [2, 1]

    tell(story)


def test_disk_of_a_machine_at_rest_is_there_when_it_starts(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one", bus="scsi", readonly=True))
        await asking.do(StartMachine(machine="one"))
        disk = await asking.disk("data")
        held = (await asking.guest("one")).disks[disk.device]
        assert (held.bus, held.readonly, held.size) == ("scsi", True, MIB)
        await asking.do(RestartMachine(machine="one"))
        await asking.do(StopMachine(machine="one"))
        await asking.do(DetachDisk(disk="data"))
        assert [each["name"] for each in (await asking.machine("one")).spec["disks"]] == ["root"]

    tell(story)


def test_disk_can_be_asked_for_with_the_machine(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.create("one", disks=("data",), start=True)
        disk = await asking.disk("data")
        assert (disk.state, disk.machine) == ("attached", "one")
        assert disk.device in (await asking.guest("one")).disks
        error = await asking.refuse(CreateMachine(name="two", spec={}, disks=("data",)))
        assert "belongs to machine 'one'" in error.message
        await asking.do(DeleteMachine(machine="one", force=True))
        assert (await asking.disk("data")).state == "available"

    tell(story)


def test_disk_outlives_its_machine_and_its_storage_goes_with_it(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        kept = await asking.do(CreateDisk(name="kept", size=MIB))
        await asking.do(CreateDisk(name="gone", size=MIB))
        await asking.do(AttachDisk(disk="kept", machine="one"))
        await asking.do(StartMachine(machine="one"))
        disk = await asking.disk("kept")
        (await asking.guest("one")).write_disk(disk.device, 0, b"kept")
        beside = asking.manager.storage.directory.parent / "beside"
        beside.write_text("not a disk")
        await asking.do(DeleteMachine(machine="one", force=True))
        assert (await asking.disk("kept")).machine is None
        await asking.do(DeleteDisk(disk="gone"))
        assert files(asking.manager) == [f"{kept['disk']}.raw"]
        assert asking.manager.storage.path(kept["disk"], "raw").read_bytes()[:4] == b"kept"
        assert beside.read_text() == "not a disk"

    tell(story)


def test_disk_of_a_live_machine_is_not_deleted_and_one_at_rest_lets_go_of_it(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        await asking.do(StartMachine(machine="one"))
        error = await asking.refuse(DeleteDisk(disk="data"))
        assert "running" in error.message and "vmlab disk detach data" in (error.hint or "")
        assert (await asking.disk("data")).state == "attached"
        await asking.do(StopMachine(machine="one"))
        operation = await asking.ask(DeleteDisk(disk="data"))
        assert [step.name for step in operation.steps if step.state == "done"] == [
            "claim",
            "unplug",
            "verify",
            "remove",
        ]
        assert files(asking.manager) == []
        assert [each["name"] for each in (await asking.machine("one")).spec["disks"]] == ["root"]

    tell(story)


def test_disk_of_a_machine_that_starts_meanwhile_is_not_deleted(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        operator = asking.manager.operator
        # None begins before both are in line: of a machine that runs it would be refused at once.
        operator._open = False
        starting = await operator.submit(StartMachine(machine="one"))
        deleting = await operator.submit(DeleteDisk(disk="data"))
        operator._open = True
        operator._pump()
        assert (await operator.wait(starting.id, 120)).state == "succeeded"
        ended = await operator.wait(deleting.id, 120)
        assert ended.state == "failed" and "running" in ended.error["message"]
        assert (await asking.disk("data")).state == "attached"
        assert len(files(asking.manager)) == 1

    tell(story)


def test_disk_grows_alone_and_under_its_machine(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        made = await asking.do(CreateDisk(name="data", size=MIB))
        path = asking.manager.storage.path(made["disk"], "raw")
        await asking.do(ResizeDisk(disk="data", size=2 * MIB))
        assert path.stat().st_size == 2 * MIB
        await asking.do(AttachDisk(disk="data", machine="one"))
        await asking.do(StartMachine(machine="one"))
        await asking.do(ResizeDisk(disk="data", size=3 * MIB))
        disk = await asking.disk("data")
        assert (disk.size, path.stat().st_size) == (3 * MIB, 3 * MIB)
        assert (await asking.guest("one")).disks[disk.device].size == 3 * MIB
        error = await asking.refuse(ResizeDisk(disk="data", size=MIB))
        assert "only grow" in error.message
        assert await asking.events("disk.resized") == [
            {"before": MIB, "size": 2 * MIB},
            {"before": 2 * MIB, "size": 3 * MIB},
        ]

    tell(story)


def test_copy_of_a_disk_is_another_disk(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        made = await asking.do(CreateDisk(name="data", size=MIB))
        path = asking.manager.storage.path(made["disk"], "raw")
        with path.open("r+b") as file:
            file.write(b"contents")
        copy = await asking.do(CreateDisk(name="copy", source="data", size=2 * MIB))
        other = asking.manager.storage.path(copy["disk"], "raw")
        assert other.read_bytes() == b"contents".ljust(2 * MIB, b"\0")
        await asking.do(AttachDisk(disk="data", machine="one"))
        await asking.do(StartMachine(machine="one"))
        error = await asking.refuse(CreateDisk(name="again", source="data"))
        assert "running" in error.message
        error = await asking.refuse(CreateDisk(name="small", source="copy", size=MIB))
        assert "at least the 2097152 bytes of 'copy'" in error.message

    tell(story)


def test_disk_has_one_machine_at_a_time(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.create("two")
        await asking.do(CreateDisk(name="data", size=MIB))
        operator = asking.manager.operator
        first = await operator.submit(AttachDisk(disk="data", machine="one"))
        # The claim is made when the request is taken down, and not when it is carried out.
        error = await asking.refuse(AttachDisk(disk="data", machine="two"))
        assert "belongs to machine 'one'" in error.message
        assert (await operator.wait(first.id, 120)).state == "succeeded"
        await asking.do(DetachDisk(disk="data"))
        error = await asking.refuse(DetachDisk(disk="data"))
        assert "no machine has disk 'data'" in error.message

    tell(story)


def test_disk_that_cannot_be_is_refused(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        for fields, said in (
            ({"size": 1000}, "multiple of 512"),
            ({"size": 0}, "positive multiple"),
            ({}, "a size such as"),
            ({"source": "nosuch"}, "there is no disk 'nosuch'"),
        ):
            error = await asking.refuse(CreateDisk(name="data", **fields))
            assert said in error.message
        assert files(asking.manager) == []

    tell(story)


def test_name_that_is_taken_is_refused(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.do(CreateDisk(name="data", size=MIB))
        error = await asking.refuse(CreateDisk(name="data", size=MIB))
        assert "there is a disk" in error.message
        assert len(files(asking.manager)) == 1

    tell(story)


def test_quota_of_disks_holds(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.do(CreateDisk(name="data", size=3 * MIB))
        for request in (
            CreateDisk(name="more", size=2 * MIB),
            ResizeDisk(disk="data", size=5 * MIB),
        ):
            error = await asking.refuse(request)
            assert "4M" in error.message and "no room" in error.message
        await asking.do(CreateDisk(name="rest", size=MIB))

    tell(story, limits=Limits(disk=4 * MIB))


def test_room_that_a_disk_is_about_to_grow_into_is_given_to_no_other(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(asking: Any) -> None:
        for name in ("one", "two"):
            await asking.do(CreateDisk(name=name, size=MIB))
        storage, go_on = asking.manager.storage, asyncio.Event()
        grow = storage.resize

        async def resize(*args: Any) -> None:
            await go_on.wait()
            await grow(*args)

        monkeypatch.setattr(storage, "resize", resize)
        growing = await asking.manager.operator.submit(ResizeDisk(disk="one", size=2 * MIB))
        for request in (
            ResizeDisk(disk="two", size=3 * MIB),
            CreateDisk(name="three", size=2 * MIB),
        ):
            assert "no room" in (await asking.refuse(request)).message
        go_on.set()
        assert (await asking.manager.operator.wait(growing.id, 120)).state == "succeeded"
        await asking.do(ResizeDisk(disk="two", size=2 * MIB))

    tell(story, limits=Limits(disk=4 * MIB))


def test_dry_run_of_a_disk_touches_nothing(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        operation = await asking.ask(CreateDisk(name="data", size=MIB), dry_run=True)
        assert [step.state for step in operation.steps] == ["planned"]
        assert files(asking.manager) == []
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        for request, steps in (
            (AttachDisk(disk="data", machine="one"), ["plug", "verify"]),
            (DeleteDisk(disk="data"), ["remove"]),
            (ResizeDisk(disk="data", size=2 * MIB), ["grow"]),
        ):
            operation = await asking.ask(request, dry_run=True)
            assert [step.name for step in operation.steps] == steps
            disk = await asking.disk("data")
            assert (disk.state, disk.size, disk.version) == ("available", MIB, disk.version)
        await asking.do(AttachDisk(disk="data", machine="one"))
        operation = await asking.ask(DeleteDisk(disk="data"), dry_run=True)
        assert [step.name for step in operation.steps] == ["unplug", "remove"]
        operation = await asking.ask(DetachDisk(disk="data"), dry_run=True)
        assert [step.name for step in operation.steps] == ["guest", "unplug", "verify"]

    tell(story)


def test_file_that_is_gone_keeps_its_disk_from_being_attached(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        made = await asking.do(CreateDisk(name="data", size=MIB))
        path = asking.manager.storage.path(made["disk"], "raw")
        path.unlink()
        assert "is gone" in await asking.fail(AttachDisk(disk="data", machine="one"))
        disk = await asking.disk("data")
        assert (disk.state, disk.machine) == ("available", None)
        path.write_bytes(bytes(512))
        said = await asking.fail(AttachDisk(disk="data", machine="one"))
        assert "512" in said and "1M" in said
        # What is gone can be removed all the same.
        path.unlink()
        await asking.do(DeleteDisk(disk="data"))

    tell(story)


def test_machine_that_its_hypervisor_lost_lets_go_of_its_disk(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        found = await asking.manager.machine((await asking.machine("one")).id)
        await found.delete()
        await asking.do(DetachDisk(disk="data"))
        assert (await asking.disk("data")).state == "available"

    tell(story)


def test_disk_that_no_machine_takes_is_available_again(tell: Tell) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB, format="qcow2"))
        # The simulated hypervisor reads raw images only.
        assert "raw" in await asking.fail(AttachDisk(disk="data", machine="one"))
        disk = await asking.disk("data")
        assert (disk.state, disk.machine, disk.device) == ("available", None, None)
        await asking.do(ResizeDisk(disk="data", size=2 * MIB))
        copied = await asking.do(CreateDisk(name="raw", source="data"))
        assert asking.manager.storage.path(copied["disk"], "raw").stat().st_size == 2 * MIB
        await asking.do(AttachDisk(disk="raw", machine="one"))

    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img (Debian package qemu-utils)")
    tell(story)


def test_qcow2_without_qemu_img_is_refused(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(asking: Any) -> None:
        error = await asking.refuse(CreateDisk(name="data", size=MIB, format="qcow2"))
        assert "qemu-img" in error.message and "raw" in (error.hint or "")

    monkeypatch.setenv("PATH", "/nonexistent")
    tell(story)


HOSTILE = ["../../etc/passwd", "a/b", "", "d-0", "*", "x\0y", "-rf", "%"]


def test_hostile_names_are_no_disks(tell: Tell, tmp_path: Path) -> None:
    async def story(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        before = everything(tmp_path)
        for name in filter(None, HOSTILE):
            for request in (
                DeleteDisk(disk=name),
                DetachDisk(disk=name),
                ResizeDisk(disk=name, size=2 * MIB),
                AttachDisk(disk=name, machine="one"),
                AttachDisk(disk="data", machine=name),
                CreateDisk(name="copy", source=name),
            ):
                error = await asking.refuse(request)
                assert "there is no" in error.message
        assert everything(tmp_path) == before

    tell(story)


@pytest.mark.parametrize("name", sorted(set(HOSTILE) - {"d-0"}))
def test_hostile_names_are_no_names(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        CreateDisk(name=name, size=MIB)


def test_another_manager_goes_on_with_the_disks_of_the_first(tell: Tell) -> None:
    async def first(asking: Any) -> None:
        await asking.create("one")
        await asking.do(CreateDisk(name="data", size=MIB))
        await asking.do(AttachDisk(disk="data", machine="one"))
        await asking.do(StartMachine(machine="one"))
        disk = await asking.disk("data")
        hardware = await asking.guest("one")
        hardware.write_disk(disk.device, 0, b"of the first")
        # As after a request of its guest's, which has the journal written.
        hardware.world.changed(hardware)

    async def second(asking: Any) -> None:
        disk = await asking.disk("data")
        assert (await asking.guest("one")).read_disk(disk.device, 0, 12) == b"of the first"
        await asking.do(DetachDisk(disk="data"))
        path = asking.manager.storage.path(disk.id, "raw")
        assert path.read_bytes()[:12] == b"of the first"

    tell(first)
    tell(second)

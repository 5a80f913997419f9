"""Disks of the store in real guests, on QEMU and on the engine: one writes, another one reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.integration.manager.conftest import IMAGES
from tests.needs import need

from vmlab.machine.sizes import MIB
from vmlab.manager.requests import (
    AttachDisk,
    CloneMachine,
    CreateDisk,
    CreateMachine,
    CreateTemplate,
    DeleteDisk,
    DeleteMachine,
    DetachDisk,
    ExportMachine,
    ImportMachine,
    MigrateMachine,
    ResizeDisk,
    StartMachine,
    StopMachine,
)

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(1800)]

Tell = Callable[..., None]


def needs(hypervisor: str) -> None:
    if hypervisor == "qemu":
        need("qemu-system-x86_64")


@pytest.mark.parametrize("hypervisor", ["qemu", "embedded"])
def test_what_one_guest_writes_another_one_reads(tell: Tell, hypervisor: str) -> None:
    needs(hypervisor)

    async def story(asking: Any) -> None:
        manager = asking.manager
        await asking.do(CreateTemplate(name="small", image=IMAGES[hypervisor], memory=192 * MIB))
        one = CreateMachine(name="one", template="small", host=hypervisor, start=True)
        await asking.do(one)
        await asking.do(CreateMachine(name="two", template="small", host=hypervisor))
        await asking.do(CreateDisk(name="data", size=16 * MIB))
        await asking.run("one", "true")
        plugged = await asking.do(AttachDisk(disk="data", machine="one"))
        # The guest itself said so, and the hypervisor.
        device = plugged["guest"]
        assert device.startswith("/dev/")
        path = manager.storage.path((await asking.disk("data")).id, "raw")
        found = await manager.machine((await asking.machine("one")).id)
        assert (await found.info()).disks[-1].path == path
        words = "mkdir -p /mnt/data && mount -t ext4"
        await asking.run("one", f"mke2fs {device} && {words} {device} /mnt/data")
        await asking.run("one", "echo written by one >/mnt/data/file")
        refused = await asking.ask(DetachDisk(disk="data"))
        assert refused.state == "failed" and "/mnt/data" in refused.error["message"]
        assert (await asking.disk("data")).state == "attached"
        await asking.run("one", "umount /mnt/data")
        await asking.do(DetachDisk(disk="data"))
        assert "data" not in await asking.run("one", "cat /sys/block/*/serial 2>/dev/null; true")
        # To a machine at rest, this time.
        await asking.do(AttachDisk(disk="data", machine="two"))
        await asking.do(StartMachine(machine="two"))
        seen = await asking.run(
            "two",
            "for d in /sys/block/[sv]d*; do n=/dev/${d##*/}; "
            "s=$(cat $d/serial 2>/dev/null) || s=$(dd if=$d/device/vpd_pg80 bs=1 skip=4 2>&-); "
            f'[ "$s" = data ] && {words} $n /mnt/data && cat /mnt/data/file && echo $n; done; true',
        )
        text, device = seen.splitlines()
        assert text == "written by one"
        await asking.do(ResizeDisk(disk="data", size=32 * MIB))
        # The guest's kernel is told, and looks when it has time.
        size = f"/sys/block/{device.removeprefix('/dev/')}/size"
        before = 16 * MIB // 512
        sectors = await asking.run(
            "two", f"while [ $(cat {size}) = {before} ]; do sleep 0.1; done; cat {size}"
        )
        assert int(sectors) * 512 == 32 * MIB
        await asking.run("two", "umount /mnt/data")
        await asking.do(StopMachine(machine="two"))
        # A machine at rest lets go of it first.
        await asking.do(DeleteDisk(disk="data"))
        assert not path.exists()
        for name in ("one", "two"):
            await asking.do(DeleteMachine(machine=name, force=True))
        assert list(manager.storage.directory.iterdir()) == []
        assert await (await manager.hosts.get(hypervisor)).list() == []

    tell(story, hypervisor)


def test_running_machine_is_forked_moved_and_exported(tell: Tell) -> None:
    needs("qemu")

    async def story(asking: Any) -> None:
        spec = {"image": IMAGES["qemu"], "memory": 192 * MIB}
        await asking.do(CreateMachine(name="one", host="qemu", start=True, **spec))
        await asking.run("one", "echo kept >/tmp/kept")
        await asking.do(CloneMachine(machine="one", name="two"))
        assert await asking.run("two", "cat /tmp/kept; hostname") == "kept\ntwo"
        assert await asking.run("one", "hostname") == "one"
        await asking.do(MigrateMachine(machine="two", host="other"))
        assert await asking.run("two", "cat /tmp/kept; hostname") == "kept\ntwo"
        assert (await asking.machine("two")).host == "other"
        await asking.do(CreateDisk(name="data", size=4 * MIB, format="qcow2"))
        plugged = await asking.do(AttachDisk(disk="data", machine="two"))
        await asking.run("two", f"echo exported >{plugged['guest']} && sync")
        await asking.do(StopMachine(machine="two"))
        await asking.do(ExportMachine(machine="two", path="two.tar"))
        await asking.do(DeleteMachine(machine="two"))
        await asking.do(DeleteDisk(disk="data"))
        await asking.do(ImportMachine(path="two.tar", name="three"))
        await asking.do(StartMachine(machine="three"))
        (disk,) = (await asking.machine("three")).disks
        assert disk.name == "data"
        said = await asking.run("three", "cat /sys/block/vd*/serial; head -c 8 /dev/vda")
        assert said == "dataexported"
        await asking.do(DeleteMachine(machine="three", force=True))
        kept = asking.manager.settings.directory
        assert list((kept / "boot").iterdir()) == []

    tell(story, "qemu")

"""Machines whose disks are files, written to archives with what they boot from, and made again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.unit.manager.disks.conftest import Asking

from vmlab.hypervisors.ownership import Home
from vmlab.machine.sizes import MIB
from vmlab.manager.manager import Manager
from vmlab.manager.requests import CreateMachine, DeleteMachine, ExportMachine, ImportMachine
from vmlab.manager.settings import HostSetting, Settings


def test_own_disks_and_kernel_come_back_and_go_with_their_machine(tmp_path: Path) -> None:
    """On the engine, whose machines at rest need nothing but their files."""
    kernel = tmp_path / "Image"
    kernel.write_bytes(b"kernel" * 1000)
    spec = {
        "architecture": "riscv64",
        "memory": "64M",
        "boot": {"kernel": str(kernel), "cmdline": "quiet"},
        "disks": [{"name": "root", "size": "8M"}, {"name": "swap", "size": "4M", "bus": "scsi"}],
        "nics": [{"name": "net0", "network": "user"}],
    }

    async def story() -> None:
        host = HostSetting(name="engine", hypervisor="embedded")
        settings = Settings(home=Home.open(tmp_path / "home"), hosts=[host])
        async with await Manager.open(settings) as manager:
            asking = Asking(manager)
            await asking.do(CreateMachine(name="one", spec=spec, host="engine"))
            first = await manager.machine((await asking.machine("one")).id)
            path = (await first.info()).disks[0].path
            assert path is not None
            content = bytearray(8 * MIB)
            content[MIB : MIB + 4], content[-4:] = b"here", b"last"
            path.write_bytes(content)
            result = await asking.do(ExportMachine(machine="one", path="one.tar"))
            assert result["left_out"] == []
            await asking.do(DeleteMachine(machine="one"))
            kernel.unlink()
            await asking.do(ImportMachine(path="one.tar"))
            machine = await asking.machine("one")
            found = await manager.machine(machine.id)
            disks = (await found.info()).disks
            assert [(disk.name, disk.size, disk.bus) for disk in disks] == [
                ("root", 8 * MIB, "virtio"),
                ("swap", 4 * MIB, "scsi"),
            ]
            assert disks[0].path is not None and disks[0].path != path
            assert disks[0].path.read_bytes() == content
            kept = found.spec.boot.kernel
            assert kept == settings.directory / "boot" / machine.id / "kernel"
            assert kept.read_bytes() == b"kernel" * 1000
            assert found.spec.boot.cmdline == "quiet"
            await asking.do(DeleteMachine(machine="one"))
            assert not kept.exists() and not disks[0].path.exists()
            assert list((settings.directory / "boot").iterdir()) == []

    asyncio.run(story())

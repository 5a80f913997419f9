"""Each architecture boots a real kernel, runs a command on its console, and powers down."""

from __future__ import annotations

from typing import Any

import pytest

from vmlab.machine.architecture import Architecture
from vmlab.machine.spec import Disk
from vmlab.machine.states import MachineState

pytestmark = [pytest.mark.boots, pytest.mark.slow]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "architecture", [Architecture.RISCV64, Architecture.AARCH64, Architecture.PPC64LE]
)
def test_guest_boots_answers_and_powers_down(
    bench: Any, images: Any, make_image_spec: Any, shell_of: Any, architecture: Architecture
) -> None:
    async def test() -> None:
        spec = make_image_spec(
            images(architecture),
            "guest",
            memory="512M",
            disks=[{"name": "data", "size": "4M"}],
            nics=[{"name": "n"}],
        )
        machine = await bench.qemu.create(spec)
        await machine.start()
        shell = await shell_of(machine, 180)
        assert (await shell.run("uname -m")).strip() == architecture.value
        await shell.run("[ -b /dev/vda ] && [ -e /sys/class/net/eth0 ]")
        if architecture is not Architecture.PPC64LE:
            # pseries does not always come back: its hash table is no part of the memory's file.
            taken = await machine.snapshot("one")
            assert taken.memory
            await shell.run("echo lost > /tmp/f")
            await machine.restore("one")
            await shell.run("[ ! -e /tmp/f ]")
        if architecture is not Architecture.RISCV64:
            # Open: after a restore a riscv64 guest does not always see a disk that is plugged.
            plugged = await machine.plug_disk(Disk(name="hot", size=1 << 20))
            device = "sda" if plugged.bus == "scsi" else "vdb"
            await shell.run(f"while [ ! -b /dev/{device} ]; do usleep 20000; done")
            await machine.unplug_disk("hot")
            await shell.run(f"[ ! -b /dev/{device} ]")
        await machine.stop(timeout=60)
        assert machine.state is MachineState.STOPPED

    bench.run(test(), 220)

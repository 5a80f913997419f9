"""Each architecture boots a real kernel, runs a command on its console, and powers down."""

from __future__ import annotations

from typing import Any

import pytest

from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import UnsupportedOperation
from vmlab.machine.spec import Disk
from vmlab.machine.states import MachineState

pytestmark = [pytest.mark.boots, pytest.mark.slow]


async def two_beats(machine: Any) -> None:
    """Wait for what the guest prints by itself once a second."""
    seen = b""
    async with await machine.console() as console:
        while seen.count(b"beat") < 2:
            seen += await console.read()


@pytest.mark.timeout(1600)
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
        shell = await shell_of(machine, 1000)
        assert (await shell.run("uname -m")).strip() == architecture.value
        await shell.run("[ -b /dev/vda ] && [ -e /sys/class/net/eth0 ]")
        if not bench.qemu.loads(architecture, "tcg"):
            for refused in (machine.snapshot, machine.fork):
                with pytest.raises(UnsupportedOperation) as told:
                    await refused("one")
                assert "decrementer" in str(told.value.hint)
            await shell.run("true")
        else:
            await shell.run("(while sleep 1; do echo beat; done) > /dev/console & echo $! > /tmp/p")
            taken = await machine.snapshot("one")
            assert taken.memory
            await shell.run("echo lost > /tmp/f")
            await machine.restore("one")
            # Untouched from outside, it goes on only if its timers were restored.
            await two_beats(machine)
            await shell.run("kill $(cat /tmp/p); [ ! -e /tmp/f ]")
        plugged = await machine.plug_disk(Disk(name="hot", size=1 << 20))
        device = "sda" if plugged.bus == "scsi" else "vdb"
        await shell.run(f"while [ ! -b /dev/{device} ]; do usleep 20000; done")
        await machine.unplug_disk("hot")
        await shell.run(f"while [ -b /dev/{device} ]; do usleep 20000; done")
        await machine.stop(timeout=300)
        assert machine.state is MachineState.STOPPED

    bench.run(test(), 1500)

"""vCPUs and memory that come to a machine while its guest runs, and what copies make of them."""

from __future__ import annotations

from typing import Any

import pytest

from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidSpec,
    InvalidState,
    OperationFailed,
    UnsupportedOperation,
)
from vmlab.machine.sizes import MIB

ONLINE = "for c in /sys/devices/system/cpu/cpu[1-9]*/online; do echo 1 > $c; done; nproc"
GROWING = {
    "cpus": {"count": 1, "maximum": 3},
    "memory": {"size": 192 * MIB, "maximum": 1024 * MIB},
}


def kilobytes(meminfo: str) -> int:
    return int(meminfo.split()[1])


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_guest_uses_what_came_while_it_ran_and_so_do_its_copies(
    bench: Any, images: Any, make_image_spec: Any, shell_of: Any
) -> None:
    async def test() -> None:
        spec = make_image_spec(images(Architecture.X86_64), "growing", **GROWING)
        machine = await bench.qemu.create(spec)
        await machine.start()
        shell = await shell_of(machine)
        assert await shell.run("nproc") == "1\n"
        before = kilobytes(await shell.run("grep MemTotal: /proc/meminfo"))
        grown = await machine.resize(vcpus=3, memory=320 * MIB)
        assert (grown.vcpus, grown.memory) == (3, 320 * MIB)
        assert [(node.memory, node.cpus) for node in grown.nodes] == [(320 * MIB, (0, 1, 2))]
        assert await shell.run(ONLINE) == "3\n"
        after = kilobytes(await shell.run("grep MemTotal: /proc/meminfo"))
        # Linux keeps the descriptors of its pages in it, 64 bytes for each of 4096.
        assert 120 * 1024 < after - before <= 128 * 1024
        await shell.run("echo mark > /tmp/mark")
        await machine.snapshot("grown")
        with pytest.raises(OperationFailed, match="cannot go on with"):
            await machine.resize(vcpus=1)
        await machine.resize(memory=448 * MIB)
        await machine.restore("grown")
        assert (await machine.info()).memory == 320 * MIB
        assert await shell.run("nproc; cat /tmp/mark") == "3\nmark\n"
        # A copy grows on, and what is copied then is of a template and of its own.
        fork = await machine.fork("fork")
        await machine.kill()
        assert await type(shell)(fork).run("nproc; cat /tmp/mark") == "3\nmark\n"
        assert (await fork.resize(memory=448 * MIB)).memory == 448 * MIB
        again = await fork.fork("again")
        await fork.kill()
        assert await type(shell)(again).run("cat /tmp/mark") == "mark\n"
        assert (await again.info()).memory == 448 * MIB
        # Started anew it has all of it from the beginning.
        await again.kill()
        await again.start()
        assert await (await shell_of(again)).run("nproc") == "3\n"
        assert (await again.info()).memory == 448 * MIB

    bench.run(test(), timeout=900)


def test_growth_that_cannot_be_is_refused_and_changes_nothing(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        spec = make_spec(**{**GROWING, "memory": {"size": 64 * MIB, "maximum": 512 * MIB}})
        machine = await bench.qemu.create(spec)
        await machine.start()
        with pytest.raises(OperationFailed, match="cannot shrink while it runs"):
            await machine.resize(memory=32 * MIB)
        with pytest.raises(OperationFailed, match="takes it in blocks of 128M"):
            await machine.resize(memory=96 * MIB)
        with pytest.raises(InvalidSpec, match=r"cpus\.maximum"):
            await machine.resize(vcpus=4)
        fixed = await bench.qemu.create(make_spec("fixed"))
        await fixed.start()
        with pytest.raises(OperationFailed, match="room for 1 vCPUs only"):
            await fixed.resize(vcpus=2)
        await fixed.delete(force=True)
        await machine.pause()
        with pytest.raises(InvalidState, match="paused"):
            await machine.resize(memory=192 * MIB)
        info = await machine.info()
        assert (info.vcpus, info.memory) == (1, 64 * MIB)
        assert machine.spec.memory.size == 64 * MIB
        riscv = await bench.qemu.create(make_spec("riscv", architecture="riscv64", memory="64M"))
        await riscv.start()
        with pytest.raises(UnsupportedOperation) as caught:
            await riscv.resize(vcpus=2)
        assert caught.value.capability == Capability.HOTPLUG_VCPU.value
        with pytest.raises(UnsupportedOperation) as caught:
            await riscv.resize(memory=256 * MIB)
        assert caught.value.capability == Capability.HOTPLUG_MEMORY.value
        for grows in ({"cpus": {"count": 1, "maximum": 2}}, {"memory": GROWING["memory"]}):
            with pytest.raises(UnsupportedOperation, match="hotplug"):
                await bench.qemu.create(make_spec("not", architecture="riscv64", **grows))
        assert {each.name for each in await bench.qemu.list()} == {"bare", "riscv"}

    bench.run(test())


def test_firmware_that_takes_no_memory_leaves_it_to_the_deadline(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        spec = make_spec(memory={"size": 64 * MIB, "maximum": 512 * MIB})
        machine = await bench.qemu.create(spec)
        await machine.start()
        with pytest.raises(DeadlineExceeded):
            # Nobody but an operating system answers: there is no guest that could take it.
            await machine.resize(memory=192 * MIB, timeout=2)
        info = await machine.info()
        assert machine.spec.memory.size == info.memory
        assert (await machine.status()).state.value == "running"
        fork = await machine.fork("fork")
        assert (await fork.info()).memory == info.memory

    bench.run(test())

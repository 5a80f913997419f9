"""Copies of copies: what each of them has in its memory, and that QEMU did not have to read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmlab.machine.states import MachineState


async def maps_a_template(machine: Any) -> bool:
    """Whether a machine's memory is a template's, but for what it wrote."""
    pid = (await machine.info()).pid
    maps = Path(f"/proc/{pid}/maps").read_text("ascii").splitlines()  # noqa: ASYNC240 (it is short)
    return any(" rw-p " in line and "/memfd:vmlab-template" in line for line in maps)


@pytest.mark.parametrize("architecture", ["x86_64", "riscv64", "aarch64"])
def test_fork_of_a_fork_maps_a_template_again(
    bench: Any, make_spec: Any, architecture: str
) -> None:
    async def test() -> None:
        spec = make_spec(architecture=architecture, memory="64M", nics=[{"name": "n"}])
        machine = await bench.qemu.create(spec)
        await machine.start()
        await machine.pause()
        assert not await maps_a_template(machine)
        line = machine
        for generation in range(3):
            line = await line.fork(f"{architecture}-{generation}")
            assert await maps_a_template(line)
            assert line.state is MachineState.PAUSED
        await line.snapshot("one")
        await line.restore("one")
        await line.resume()
        assert (await line.status()).state is MachineState.RUNNING
        copy = await bench.qemu.create_from((await line.snapshots())[0], "copy")
        again = await copy.fork("again")
        assert await maps_a_template(again)

    bench.run(test())


def test_fork_of_a_fork_whose_firmware_ran_again_is_taken_as_a_whole(
    bench: Any, make_spec: Any
) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec())
        await machine.start()
        fork = await machine.fork("fork")
        await fork.restart(graceful=False)
        after = await fork.fork("after")
        assert not await maps_a_template(after)
        assert (await after.status()).state is MachineState.RUNNING
        # QEMU's own memory again: the next one is from a template.
        assert await maps_a_template(await after.fork("next"))

    bench.run(test())


def test_fork_of_a_fork_with_a_display_is_taken_as_a_whole(bench: Any, make_spec: Any) -> None:
    async def test() -> None:
        machine = await bench.qemu.create(make_spec(display=True))
        await machine.start()
        fork = await machine.fork("fork")
        assert await maps_a_template(fork)
        taken = await fork.snapshot("whole")
        copy = await bench.qemu.create_from(taken, "copy")
        assert not await maps_a_template(copy)
        assert (await copy.status()).state is MachineState.RUNNING
        await fork.restore("whole")
        assert (await fork.status()).state is MachineState.RUNNING

    bench.run(test())


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_generation_of_copies_has_what_its_origin_wrote_and_no_more(booted: Any) -> None:
    async def test() -> None:
        first, shell = await booted.machine()
        await shell.run("head -c 300000 /dev/urandom > /tmp/one")
        one = await shell.run("md5sum < /tmp/one")
        second = await first.fork("second")
        inside = type(shell)(second)
        assert await inside.run("md5sum < /tmp/one") == one
        await inside.run("head -c 300000 /dev/urandom > /tmp/two; rm /tmp/one")
        two = await inside.run("md5sum < /tmp/two")
        third = type(shell)(await second.fork("third"))
        assert await third.run("ls /tmp/one /tmp/two 2>/dev/null || true") == "/tmp/two\n"
        assert await third.run("md5sum < /tmp/two") == two
        await third.run("echo changed > /tmp/two")
        assert await inside.run("md5sum < /tmp/two") == two
        assert await shell.run("ls /tmp/two 2>/dev/null || true") == ""
        # So much that the next copy gets a template of its own.
        await inside.run("dd if=/dev/zero of=/tmp/large bs=1M count=40; echo end >> /tmp/large")
        large = await inside.run("wc -c < /tmp/large; tail -c 4 /tmp/large")
        heir = await second.fork("heir")
        assert await maps_a_template(heir)
        assert await type(shell)(heir).run("wc -c < /tmp/large; tail -c 4 /tmp/large") == large
        assert await type(shell)(heir).run("md5sum < /tmp/two") == two
        await inside.run("rm /tmp/large")
        # A snapshot of a copy has the same in it.
        taken = await second.snapshot("copy")
        await inside.run("rm /tmp/two")
        await second.restore("copy")
        assert await inside.run("md5sum < /tmp/two") == two
        fourth = type(shell)(await booted.qemu.create_from(taken, "fourth"))
        assert await fourth.run("md5sum < /tmp/two") == two

    booted.run(test())

"""A real qemu-ga: commands, copies, and every way in which such a guest can fail."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.guests.command import AgentRestarted
from vmlab.guests.guest import Guest
from vmlab.guests.qga import PORT, QgaChannel
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import provider
from vmlab.images import ImageStore
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded
from vmlab.machine.spec import MachineSpec

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(2000)]

MIB = 1 << 20
LONG = 900.0
"""Seconds that anything may take on a host with much else to do."""

Do = Callable[[Callable[[Guest], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def do(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Do]:
    """Runs a coroutine function with a guest that has qemu-ga and no agent of vmlab's."""
    need("qemu-system-x86_64")
    image = ImageStore(IMAGE_STORE).ensure("debian-12-amd64-tiny-qga")
    spec = MachineSpec.of(
        name="qga",
        architecture=Architecture.X86_64,
        memory="512M",
        boot={"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline},
        channels=(PORT,),
    )
    with Run.begin(Home.open(tmp_path_factory.mktemp("home"))) as run, asyncio.Runner() as runner:
        hypervisor = provider.open(run.owner)

        async def boot() -> Guest:
            machine = await hypervisor.create(spec)
            await machine.start()
            guest = Guest(machine, QgaChannel(machine.channel))
            await guest.connect(timeout=LONG)
            return guest

        guest = runner.run(boot())
        yield lambda body: runner.run(asyncio.wait_for(body(guest), LONG))
        runner.run(guest.close())
        runner.run(hypervisor.close())


def test_commands_have_status_output_input_and_run_side_by_side(do: Do) -> None:
    async def body(guest: Guest) -> None:
        result = await guest.execute("echo out; echo err >&2; exit 3", timeout=LONG)
        assert (result.status, result.stdout, result.stderr) == (3, "out\n", "err\n")
        assert (await guest.execute("kill -9 $$", timeout=LONG)).signal == 9
        begun = asyncio.Event()

        async def take(data: bytes) -> None:
            begun.set()

        async def goes_on() -> AsyncIterator[bytes]:
            await begun.wait()  # the output comes while the command runs
            yield b"on\n"

        await guest.execute(
            "echo first; read -r line && [ $line = on ]", input=goes_on(), stdout=take, timeout=LONG
        )
        await guest.succeed("mkdir /tmp/met")
        meet = "touch /tmp/met/{0}; until [ $(ls /tmp/met | wc -l) = 4 ]; do sleep 0.1; done; "
        results = await asyncio.gather(
            *(
                guest.execute(f"{meet.format(number)} echo {number}", timeout=LONG)
                for number in range(4)
            )
        )
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(4)]

    do(body)


def test_any_bytes_pass_beyond_what_the_agent_itself_would_keep(do: Do) -> None:
    async def body(guest: Guest) -> None:
        data = bytes(range(256)) * 4096
        assert (await guest.execute("cat", input=data, timeout=LONG)).stdout_bytes == data
        digest = hashlib.sha256()
        count = 0

        async def take(piece: bytes) -> None:
            nonlocal count
            count += len(piece)
            digest.update(piece)

        # qemu-ga truncates what it captures at 16 MiB (GUEST_EXEC_MAX_OUTPUT).
        made = "dd if=/dev/urandom of=/tmp/r bs=1M count=20 2>/dev/null; sha256sum </tmp/r"
        told = (await guest.execute(made, timeout=LONG)).stdout.split()[0]
        await guest.execute("cat /tmp/r; rm /tmp/r", stdout=take, timeout=LONG)
        assert (count, digest.hexdigest()) == (20 * MIB, told)

    do(body)


def test_files_and_trees_go_in_and_out(do: Do, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        tree = tmp_path / "tree"
        (tree / "deep").mkdir(parents=True)
        (tree / "deep" / "large").write_bytes(os.urandom(2 * MIB))
        (tree / "link").symlink_to("nowhere")
        (tree / "script").write_text("#!/bin/sh\necho ran\n")
        (tree / "script").chmod(0o750)
        await guest.copy_in(tree, "/root/new dir/tree", timeout=LONG)
        assert (await guest.succeed("'/root/new dir/tree/script'")).stdout == "ran\n"
        await guest.copy_out("/root/new dir/tree", tmp_path / "back", timeout=LONG)
        for path in ("deep/large", "script"):
            assert (tmp_path / "back" / path).read_bytes() == (tree / path).read_bytes()
        assert str((tmp_path / "back" / "link").readlink()) == "nowhere"
        assert (tmp_path / "back" / "script").stat().st_mode & 0o777 == 0o750
        await guest.write("/root/file", "text", timeout=LONG)
        assert await guest.read("/root/file", timeout=LONG) == b"text"

    do(body)


def test_a_command_that_never_ends_is_ended_and_one_in_the_background_holds_nothing_up(
    do: Do,
) -> None:
    async def body(guest: Guest) -> None:
        with pytest.raises(DeadlineExceeded, match="sleep 4321"):
            await guest.execute("trap '' TERM; sleep 4321; sleep 4321", timeout=3)
        assert (await guest.execute("ps | grep '[s]leep 4321'", timeout=LONG)).stdout == ""
        # Nothing is left of it but what belongs to the command that looks.
        assert (await guest.succeed("ls -A /tmp", timeout=LONG)).stdout.count(".vmlab") == 1
        process = (await guest.execute("sleep 4322 & echo $!", timeout=LONG)).stdout
        await guest.succeed(f"kill {process}", timeout=LONG)

    do(body)


def test_a_restored_snapshot_is_found_again_and_a_command_that_ran_is_told_to_be_lost(
    do: Do,
) -> None:
    async def body(original: Guest) -> None:
        machine = await original.machine.fork("restored")
        try:
            guest = Guest(machine, QgaChannel(machine.channel))
            await guest.connect(timeout=LONG)
            await machine.snapshot("here")
            begun = asyncio.Event()

            async def take(data: bytes) -> None:
                begun.set()

            running = asyncio.ensure_future(
                guest.execute("echo begun; sleep 4321", stdout=take, timeout=LONG)
            )
            await begun.wait()
            await machine.restore("here")
            with pytest.raises((ChannelClosed, AgentRestarted)):
                await running
            await guest.connect(timeout=LONG)
            assert (await guest.execute("echo back", timeout=LONG)).stdout == "back\n"
            await guest.refresh(timeout=LONG)
            await guest.close()
        finally:
            await machine.delete(force=True)

    do(body)


def test_killing_the_agent_ends_the_command_with_an_error_and_the_next_one_works(do: Do) -> None:
    async def body(guest: Guest) -> None:
        with pytest.raises(AgentRestarted):
            await guest.execute("kill -9 $(pidof qemu-ga); sleep 4321", timeout=LONG)
        await guest.connect(timeout=LONG)
        assert (await guest.execute("echo back", timeout=LONG)).stdout == "back\n"

    do(body)

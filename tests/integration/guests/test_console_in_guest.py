"""The console channel in real guests: the kernel writes there too, and nothing else answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.guests.conftest import Lab

from vmlab.guests.agent import AgentChannel
from vmlab.guests.console import ConsoleChannel
from vmlab.guests.guest import Guest
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(2000)]

SECONDS = 900.0
"""Whatever hangs is ended; what is slow is not."""


def by_console(lab: Lab) -> Guest:
    return Guest(lab.machine, ConsoleChannel(lab.machine.console))


def test_commands_run_amid_the_kernel_s_messages(lab: Lab) -> None:
    async def body(agent: Guest) -> None:
        levels = (await agent.succeed("cat /proc/sys/kernel/printk")).stdout
        guest = by_console(lab)
        await guest.connect(timeout=SECONDS)
        noise = "for i in $(seq 200); do echo line $i; echo '<2>noise' >/dev/kmsg; done"
        result = await guest.execute(f"{noise}; echo wrong >&2; exit 7", timeout=SECONDS)
        assert result.stdout == "".join(f"line {number}\n" for number in range(1, 201))
        assert (result.stderr, result.status) == ("wrong\n", 7)
        await guest.close()
        # The console is left as it was found: the kernel may speak again.
        await agent.wait_until_succeeds(
            f"[ \"$(cat /proc/sys/kernel/printk)\" = '{levels.strip()}' ]"
        )
        await agent.succeed("echo '<2>spoken' >/dev/kmsg")
        await agent.wait_for_console_text("spoken", timeout=SECONDS)

    lab.do(body, seconds=SECONDS)


def test_files_and_any_bytes_pass(lab: Lab, tmp_path: Path) -> None:
    async def body(agent: Guest) -> None:
        guest = by_console(lab)
        await guest.connect(timeout=SECONDS)
        data = bytes(range(256)) * 4
        assert (await guest.execute("cat", input=data, timeout=SECONDS)).stdout_bytes == data
        await guest.write("/tmp/console file", data, mode=0o600)
        assert await guest.read("/tmp/console file") == data
        tree = tmp_path / "tree"
        tree.mkdir()
        (tree / "script").write_text("#!/bin/sh\necho ran\n")
        (tree / "script").chmod(0o750)
        (tree / "link").symlink_to("nowhere")
        await guest.copy_in(tree, "/tmp/tree", timeout=SECONDS)
        assert (await guest.succeed("/tmp/tree/script")).stdout == "ran\n"
        await guest.copy_out("/tmp/tree", tmp_path / "back", timeout=SECONDS)
        assert str((tmp_path / "back" / "link").readlink()) == "nowhere"
        assert (tmp_path / "back" / "script").stat().st_mode & 0o777 == 0o750
        random = os.urandom(20_000)
        await agent.write("/tmp/random", random)
        assert await guest.read("/tmp/random", timeout=SECONDS) == random
        await guest.close()

    lab.do(body, seconds=SECONDS)


def test_a_command_that_never_ends_is_ended_and_the_next_one_works(lab: Lab) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.Event().wait()

    async def body(agent: Guest) -> None:
        guest = by_console(lab)
        await guest.connect(timeout=SECONDS)
        with pytest.raises(DeadlineExceeded):
            await guest.execute("trap '' TERM; sleep 4321; sleep 4321", timeout=1)
        with pytest.raises(DeadlineExceeded):
            await guest.execute("cat", input=endless(), timeout=1)
        assert (await guest.execute("echo next")).stdout == "next\n"
        assert (await agent.execute("ps | grep '[s]leep 4321'")).stdout == ""
        await guest.close()

    lab.do(body, seconds=SECONDS)


def test_a_fork_is_taken_over_with_its_loop_and_its_panic_ends_the_command(lab: Lab) -> None:
    async def body(agent: Guest) -> None:
        origin = by_console(lab)
        await origin.connect(timeout=SECONDS)
        await origin.succeed("echo kept >/tmp/kept")
        twin = await lab.machine.fork("twin")
        try:
            guest = Guest(twin, ConsoleChannel(twin.console))
            await guest.connect(timeout=SECONDS)
            assert await guest.read("/tmp/kept") == b"kept\n"
            witness = Guest(twin, AgentChannel(twin.channel))
            await witness.connect(timeout=SECONDS)
            running = asyncio.ensure_future(guest.execute("sleep 4321", timeout=SECONDS))
            await witness.wait_until_succeeds("ps | grep '[s]leep 4321'", timeout=SECONDS)
            await witness.crash()
            with pytest.raises(ChannelClosed):
                await running
            await guest.close()
            await witness.close()
        finally:
            await twin.delete(force=True)
        assert (await origin.execute("echo still here")).stdout == "still here\n"
        await origin.close()

    lab.do(body, seconds=SECONDS)


def test_a_reboot_is_followed(lab: Lab) -> None:
    async def body(agent: Guest) -> None:
        guest = by_console(lab)
        await guest.connect(timeout=SECONDS)
        before = await guest.boot_id()
        await guest.reboot(timeout=SECONDS)
        assert await guest.boot_id() != before
        await guest.wait_for_console_text("activate this console", timeout=SECONDS)
        await guest.close()

    lab.do(body, seconds=SECONDS)

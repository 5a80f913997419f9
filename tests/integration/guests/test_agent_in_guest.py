"""The agent in real guests: what it promises, and every way in which a guest can fail it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from tests.integration.guests.conftest import PATIENCE, Lab

from vmlab.guests.agent import AgentChannel, command_line
from vmlab.guests.command import AgentRestarted
from vmlab.guests.guest import CommandFailed, Guest
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, VmlabError

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

MIB = 1 << 20


def test_any_bytes_and_a_hundred_megabytes_pass(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        data = bytes(range(256)) * 4096 + b"\x01end 00 0\n\x01hello 1 2\n"
        assert (await guest.execute("cat", input=data)).stdout_bytes == data
        digest = hashlib.sha256()
        count = 0

        async def take(piece: bytes) -> None:
            nonlocal count
            count += len(piece)
            digest.update(piece)

        command = "dd if=/dev/urandom of=/tmp/r bs=1M count=1 2>/dev/null; sha256sum </tmp/r; "
        command += "for i in $(seq 100); do cat /tmp/r; done"
        await guest.execute(command, stdout=take)
        assert count == 100 * MIB + 68

    lab.do(body)


def test_trees_go_in_and_out_with_modes_and_links(lab: Lab, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        tree = tmp_path / "tree"
        (tree / ("n" * 150)).mkdir(parents=True)
        (tree / ("n" * 150) / "leaf").write_bytes(os.urandom(5 * MIB))
        (tree / "link").symlink_to("nowhere")
        (tree / "script").write_text("#!/bin/sh\necho ran\n")
        (tree / "script").chmod(0o750)
        await guest.copy_in(tree, "/root/new dir/tree")
        assert (await guest.succeed("'/root/new dir/tree/script'")).stdout == "ran\n"
        assert (await guest.succeed("stat -c '%a %u' '/root/new dir/tree/script'")).stdout == (
            "750 0\n"
        )
        await guest.copy_out("/root/new dir/tree", tmp_path / "back")
        leaf = Path("n" * 150, "leaf")
        assert (tmp_path / "back" / leaf).read_bytes() == (tree / leaf).read_bytes()
        assert str((tmp_path / "back" / "link").readlink()) == "nowhere"
        assert (tmp_path / "back" / "script").stat().st_mode & 0o777 == 0o750

    lab.do(body)


def test_a_copy_that_fills_the_guest_fails_and_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    async def body(guest: Guest) -> None:
        (tmp_path / "large").write_bytes(bytes(8 * MIB))
        await guest.succeed("mkdir /small && mount -t tmpfs -o size=4M small /small")
        with pytest.raises(CommandFailed, match="No space"):
            await guest.copy_in(tmp_path / "large", "/small/file")
        assert (await guest.succeed("ls -A /small")).stdout == ""
        (tmp_path / "tree").mkdir()
        (tmp_path / "large").rename(tmp_path / "tree" / "large")
        (tmp_path / "tree" / "small").write_text("small")
        with pytest.raises(CommandFailed, match="No space"):
            await guest.copy_in(tmp_path / "tree", "/small/tree")
        assert (await guest.succeed("ls -A /small")).stdout == ""
        await guest.succeed("umount /small")

    lab.do(body)


def test_eight_commands_run_at_once(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        # Each waits for all the others: none of them ends unless all eight run at the same time.
        await guest.succeed("mkdir -p /tmp/met")
        meet = "touch /tmp/met/{0}; until [ $(ls /tmp/met | wc -l) = 8 ]; do usleep 50000; done; "
        results = await asyncio.gather(
            *(guest.execute(f"{meet.format(number)} echo {number}") for number in range(8))
        )
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(8)]

    lab.do(body)


def test_a_background_process_holds_nothing_up_and_stays_out_of_later_output(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        result = await guest.execute("(while :; do echo noise; usleep 20000; done) & echo $!")
        assert result.stdout.splitlines()[0].isdigit() or "noise" in result.stdout
        for _ in range(10):
            assert (await guest.execute("usleep 50000; echo clean")).stdout == "clean\n"
        process = next(line for line in result.stdout.splitlines() if line.isdigit())
        await guest.succeed(f"kill {process}")

    lab.do(body)


def test_a_command_that_never_ends_is_ended_at_its_deadline(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        with pytest.raises(DeadlineExceeded, match="sleep 4321"):
            await guest.execute("trap '' TERM; sleep 4321; sleep 4321", timeout=1)
        assert (await guest.execute("ps | grep '[s]leep 4321'")).stdout == ""

    lab.do(body)


def test_killing_the_agent_ends_the_command_with_an_error_and_the_next_one_works(
    lab: Lab,
) -> None:
    async def body(guest: Guest) -> None:
        with pytest.raises(AgentRestarted):
            await guest.execute("kill -9 $PPID; sleep 1", timeout=PATIENCE)
        assert (await guest.execute("echo back", timeout=PATIENCE)).stdout == "back\n"
        # kill(2): a process does not kill itself by -1, so the command goes on to its end.
        with pytest.raises(AgentRestarted):
            await guest.execute("kill -9 -1; sleep 1", timeout=PATIENCE)
        await guest.connect(timeout=PATIENCE)
        assert (await guest.execute("echo back", timeout=PATIENCE)).stdout == "back\n"

    lab.do(body)


def test_a_host_that_dies_in_the_middle_of_a_command_is_followed_by_another(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        await guest.close()
        for input_too in (False, True):
            first = AgentChannel(lab.machine.channel)
            await first.connect(timeout=PATIENCE)
            (out,) = [slot.out for slot in first._all if slot.number == 0]
            assert out is not None
            if input_too:
                await out.send(command_line("pipe", "00", "cat >/dev/null") + b"100 65536\nhalf")
            else:
                await out.send(command_line("run", "00", "echo noise; sleep 4321"))
            await asyncio.sleep(0.2)
            await first.close()
            await guest.connect(timeout=PATIENCE)
            assert (await guest.execute("echo clean")).stdout == "clean\n"
            assert (await guest.execute("ps | grep '[s]leep 4321'")).stdout == ""
            await guest.close()
        await guest.connect(timeout=PATIENCE)

    lab.do(body)


def test_waits_see_files_and_ports_of_the_guest(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        waiting = asyncio.ensure_future(guest.wait_for_open_port(4242, timeout=PATIENCE))
        await guest.wait_for_closed_port(4242, address="127.0.0.1", timeout=PATIENCE)
        await guest.succeed("(nc -ll -p 4242 -e cat >/dev/null 2>&1 &) ; touch /tmp/up")
        await waiting
        await guest.wait_for_open_port(4242, address="127.0.0.1", timeout=PATIENCE)
        await guest.wait_for_file("/tmp/up", timeout=PATIENCE)
        await guest.wait_for_console_text("activate this console", timeout=PATIENCE)

    lab.do(body)


def test_a_guest_that_panics_in_the_middle_ends_the_command_with_an_error(
    lab: Lab,
) -> None:
    async def body(original: Guest) -> None:
        machine = await original.machine.fork("panics")
        try:
            guest = Guest(machine, AgentChannel(machine.channel))
            await guest.connect(timeout=PATIENCE)
            seen = bytearray()
            begun = asyncio.Event()

            async def take(data: bytes) -> None:
                seen.extend(data)
                begun.set()

            running = asyncio.ensure_future(
                guest.execute("echo begun; sleep 4321", stdout=take, timeout=PATIENCE)
            )
            await begun.wait()
            await guest.crash()
            with pytest.raises(ChannelClosed):
                await running
            assert bytes(seen) == b"begun\n"
            # Where no device tells of it (riscv64 has no pvpanic), the console does.
            assert (await machine.status()).state == "failed"
            with pytest.raises(VmlabError):
                await guest.execute("true", timeout=5)
            await guest.close()
        finally:
            await machine.delete(force=True)

    lab.do(body)


def test_a_reboot_brings_the_guest_back_and_a_shutdown_ends_it(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        before = await guest.boot_id()
        await guest.reboot(timeout=PATIENCE)
        assert await guest.boot_id() != before
        await guest.shutdown(timeout=PATIENCE)
        assert (await lab.machine.status()).state == "stopped"
        with pytest.raises(VmlabError):
            await guest.execute("true", timeout=5)

    lab.do(body)

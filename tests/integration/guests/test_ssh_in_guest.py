"""A whole Debian with systemd, booted once: SSH, a login on its console, units and ports."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.store import IMAGE_STORE

from vmlab.guests.agent import CHANNELS
from vmlab.guests.choice import ChosenChannel, Login, forwarded
from vmlab.guests.console import ConsoleChannel
from vmlab.guests.guest import Guest
from vmlab.guests.ssh import SshChannel
from vmlab.guests.ssh_keys import MachineKeys, authorize
from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import provider
from vmlab.images import ImageStore
from vmlab.machine.errors import DeadlineExceeded, OperationFailed
from vmlab.machine.spec import MachineSpec

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(1800)]

SECONDS = 1500.0
"""Whatever hangs is ended; what is slow is not: systemd boots in half a minute on an idle host."""


Drive = Callable[[Callable[[Machine, Path], Awaitable[None]]], None]


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Runs a coroutine function with a Debian that has just been started, and a directory."""
    image = ImageStore(IMAGE_STORE).ensure("debian-12-amd64")
    directory = Path(tempfile.mkdtemp(prefix="vmlab-d-"))
    run = Run.begin(Home.open(directory))
    spec = MachineSpec.of(
        name="debian",
        architecture=image.architecture,
        memory="768M",
        boot={"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline},
        disks=[{"name": "root", "source": image.disk, "format": image.disk_format}],
        nics=[{"name": "net0", "forwards": [{"guest": 22}]}],
        channels=CHANNELS,
    )

    def drive(body: Callable[[Machine, Path], Awaitable[None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(SECONDS), provider.open(run.owner) as hypervisor:
                machine = await hypervisor.create(spec)
                try:
                    await machine.start()
                    await body(machine, directory)
                finally:
                    await machine.delete(force=True)

        asyncio.run(main())

    yield drive
    run.close()
    shutil.rmtree(directory)


def test_debian_is_talked_to_by_ssh_and_by_a_login_on_its_console(drive: Drive) -> None:
    """One boot for all of it: nothing here depends on what came before it."""

    async def body(machine: Machine, directory: Path) -> None:
        keys = MachineKeys(directory / "keys")
        login = Login(keys=keys)
        # An image that declares these two only: the better one is taken, and says so.
        chosen = ChosenChannel(machine, ["ssh", "console"], login=login)
        guest = Guest(machine, chosen)
        await guest.connect(timeout=SECONDS)
        assert chosen.choice is not None
        assert (chosen.choice.name, chosen.choice.passed_over) == ("ssh", ())
        assert keys.pinned.exists()
        await by_ssh(guest, directory)
        await by_key_alone(machine, guest, keys, directory)
        await units_and_ports(guest)
        await by_console(machine)
        await guest.close()

    drive(body)


async def by_ssh(guest: Guest, directory: Path) -> None:
    result = await guest.execute("uname -s; echo wrong >&2; exit 4")
    assert (result.stdout, result.stderr, result.status) == ("Linux\n", "wrong\n", 4)
    payload = os.urandom(200_000)
    assert (await guest.execute("cat", input=payload)).stdout_bytes == payload
    tree = directory / "tree"
    tree.mkdir()
    (tree / "script").write_text("#!/bin/sh\necho ran\n")
    (tree / "script").chmod(0o750)
    (tree / "link").symlink_to("nowhere")
    await guest.copy_in(tree, "/root/tree")
    assert (await guest.succeed("/root/tree/script")).stdout == "ran\n"
    await guest.copy_out("/root/tree", directory / "back")
    assert (directory / "back" / "script").stat().st_mode & 0o777 == 0o750
    with pytest.raises(DeadlineExceeded):
        await guest.execute("sleep 4321", timeout=2)
    await guest.wait_until_fails("pgrep -f '[s]leep 4321'", timeout=SECONDS)
    # sshd ends what a session left behind nowhere: it holds nothing up.
    await guest.succeed("sleep 5432 & :")
    await guest.succeed("pkill -f '[s]leep 5432'")


async def by_key_alone(machine: Machine, guest: Guest, keys: MachineKeys, directory: Path) -> None:
    await authorize(keys, guest.channel)
    await guest.succeed("grep -c vmlab /root/.ssh/authorized_keys")

    async def address() -> tuple[str, int]:
        return "127.0.0.1", await forwarded(machine, 22)

    # No password any more: the key has to do, and the pinned host key has to be the guest's.
    await guest.succeed("echo root:locked-now | chpasswd")
    by_key = SshChannel(address, password="wrong", keys=keys)
    await by_key.connect(timeout=SECONDS)
    terminal = await by_key.terminal("stty size; echo $TERM", columns=100, rows=30, term="vt100")
    seen = b""
    while data := await terminal.read():
        seen += data
    assert b"30 100" in seen
    assert b"vt100" in seen
    assert await terminal.wait() == 0
    await by_key.close()
    stranger = SshChannel(address, password="wrong", keys=MachineKeys(directory / "other"))
    with pytest.raises(OperationFailed, match="refuses the login"):
        await stranger.connect(timeout=SECONDS)


async def units_and_ports(guest: Guest) -> None:
    await guest.wait_for_unit("ssh.service", timeout=SECONDS)
    assert (await guest.systemctl("is-active ssh.service")).stdout == "active\n"
    await guest.succeed(
        "systemd-run --unit answer --collect python3 -m http.server 8042 --bind 127.0.0.1 "
        "--directory /etc"
    )
    await guest.wait_for_unit("answer.service", timeout=SECONDS)
    await guest.wait_for_open_port(8042, timeout=SECONDS)
    forward = await guest.forward_port(8042)
    reader, writer = await asyncio.open_connection(forward.host, forward.port)
    writer.write(b"GET /debian_version HTTP/1.0\r\n\r\n")
    assert b"12." in await reader.read()
    writer.close()
    assert (await guest.forward_port(22)).port == await forwarded(guest.machine, 22)
    await guest.systemctl("stop answer.service")
    await guest.wait_for_closed_port(8042, timeout=SECONDS)
    with pytest.raises(OperationFailed, match=r"nonsense\.service.* is inactive"):
        await guest.wait_for_unit("nonsense.service", timeout=SECONDS)


async def by_console(machine: Machine) -> None:
    """getty(8) and login(1), with a password now."""
    refused = ConsoleChannel(machine.console, password="wrong")
    with pytest.raises(OperationFailed, match="refuses the login of 'root'"):
        await refused.connect(timeout=SECONDS)
    channel = ConsoleChannel(machine.console, password="locked-now")
    guest = Guest(machine, channel)
    await guest.connect(timeout=SECONDS)
    result = await guest.execute("tty; echo wrong >&2; exit 5")
    assert (result.stdout, result.stderr, result.status) == ("not a tty\n", "wrong\n", 5)
    assert (await guest.succeed("id -un")).stdout == "root\n"
    await guest.wait_for_console_text("vmlab login:", timeout=SECONDS)
    await guest.block()
    await guest.wait_until_succeeds("grep -q 0 /sys/class/net/e*/carrier", timeout=SECONDS)
    await guest.unblock()
    await guest.wait_until_succeeds("grep -q 1 /sys/class/net/e*/carrier", timeout=SECONDS)
    await guest.close()

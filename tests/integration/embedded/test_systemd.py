"""A whole Debian on the embedded engine: systemd, two harts, a disk, a neighbour on a segment.

Minutes, and the image takes longer to build: only `make soak` runs it.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.store import IMAGE_STORE

from vmlab.guests.guest import Guest
from vmlab.hypervisors.base import Machine
from vmlab.images import ImageStore
from vmlab.lab.boot import Wish, specification
from vmlab.lab.ways import channel_into
from vmlab.machine.events import EventType
from vmlab.machine.spec import Nic

_PATIENCE = 3000.0

pytestmark = [pytest.mark.soak, pytest.mark.boots]


async def booted(bench: Any, image: str, **wishes: Any) -> tuple[Machine, Guest]:
    found = ImageStore(IMAGE_STORE).ensure(image)
    spec = specification(Wish(image=image, **wishes), found.cmdline, found)
    nic = Nic(name="net0", network="segment:lab")
    machine = await bench.embedded.create(spec.with_changes(nics=(nic,)))
    await machine.start()
    return machine, Guest(machine, channel_into(machine))


async def login_prompt(machine: Machine) -> str:
    """What the console printed up to a login prompt."""
    printed = b""
    async with await machine.console() as console:
        while b"login: " not in printed:
            data = await console.read()
            assert data, printed.decode(errors="replace")
            printed += data
    return printed.decode(errors="replace")


def test_debian_with_systemd_comes_to_a_login_prompt_and_powers_off(bench: Any) -> None:
    async def test() -> None:
        machine, guest = await booted(
            bench, "debian-13-riscv64", name="big", cpus=2, memory="1G", disks=("64M",)
        )
        assert "big login: " in await login_prompt(machine)
        await guest.connect(timeout=_PATIENCE)
        await guest.succeed("systemctl is-system-running --wait", timeout=_PATIENCE)
        assert (await guest.succeed("nproc")).stdout == "2\n"
        await guest.succeed("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && echo kept >/mnt/f")
        await guest.succeed("ip addr add 192.168.9.1/24 dev eth0 && ip link set eth0 up")

        neighbour, other = await booted(
            bench, "debian-13-riscv64-tiny", name="small", memory="256M"
        )
        await other.connect(timeout=_PATIENCE)
        await other.succeed("ip addr add 192.168.9.2/24 dev eth0 && ip link set eth0 up")
        await other.succeed("ping -c 3 -w 120 192.168.9.1")
        await other.close()
        await neighbour.kill()

        await guest.close()
        await machine.stop(timeout=_PATIENCE)
        assert EventType.GUEST_SHUTDOWN in {each.type for each in await bench.embedded.events()}
        assert (await machine.info()).pid is None

    bench.run(test(), timeout=_PATIENCE)

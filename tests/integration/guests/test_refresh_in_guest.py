"""Clones of one booted guest: each has its own random numbers, clock, name and addresses."""

from __future__ import annotations

import time

import pytest
from tests.integration.guests.conftest import PATIENCE, Lab

from vmlab.guests.agent import AgentChannel
from vmlab.guests.guest import CommandFailed, Guest
from vmlab.hypervisors.base import Machine

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

OLD = "02:00:00:00:00:01"
LONG_AGO = 1_000_000_000
HOUR = 3600


async def _draw(guest: Guest) -> str:
    return (await guest.succeed("od -A n -t x1 -N 32 /dev/urandom")).stdout


def test_two_forks_draw_different_first_random_numbers_and_know_time_and_name(lab: Lab) -> None:
    async def body(original: Guest) -> None:
        await original.succeed(
            f"date -s @{LONG_AGO}; modprobe dummy; ip link add d0 type dummy; "
            f"ip link set d0 address {OLD}; ip link set d0 up"
        )
        clones: list[Machine] = []
        drawn, ids = set(), set()
        try:
            # Neither runs before both are there, so that they begin with the same memory.
            await original.machine.pause()
            for number in range(2):
                clones.append(await original.machine.fork(f"clone-{number}"))
            await original.machine.resume()
            for number, machine in enumerate(clones):
                await machine.resume()
                guest = Guest(machine, AgentChannel(machine.channel))
                await guest.connect(timeout=PATIENCE)
                await guest.refresh(
                    hostname=f"clone-{number}",
                    machine_id=f"{number:032x}",
                    macs={OLD: f"02:00:00:00:00:f{number}"},
                    timeout=PATIENCE,
                )
                drawn.add(await _draw(guest))
                ids.add((await guest.read("/etc/machine-id")).decode().strip())
                clock = int((await guest.succeed("date +%s")).stdout)
                assert abs(clock - time.time()) < HOUR
                told = await guest.succeed("hostname; cat /sys/class/net/d0/address")
                assert told.stdout == f"clone-{number}\n02:00:00:00:00:f{number}\n"
                # Nothing of the program is left.
                assert ".vmlab" not in (await guest.succeed("ls -A /run /dev/shm /tmp")).stdout
                await guest.close()
        finally:
            for machine in clones:
                await machine.delete(force=True)
        assert len(drawn) == len(ids) == 2
        # The one that they are copies of is as it was.
        assert int((await original.succeed("date +%s")).stdout) < LONG_AGO + HOUR

    lab.do(body)


def test_a_restored_guest_is_refreshed_and_draws_what_it_has_not_drawn_before(lab: Lab) -> None:
    async def body(original: Guest) -> None:
        machine = await original.machine.fork("restored")
        try:
            guest = Guest(machine, AgentChannel(machine.channel))
            await guest.connect(timeout=PATIENCE)
            await guest.succeed(f"date -s @{LONG_AGO}")
            await machine.snapshot("drawn")
            before = await _draw(guest)
            await machine.restore("drawn")
            await guest.connect(timeout=PATIENCE)
            await guest.refresh(timeout=PATIENCE)
            assert await _draw(guest) != before
            assert abs(int((await guest.succeed("date +%s")).stdout) - time.time()) < HOUR
            await guest.close()
        finally:
            await machine.delete(force=True)

    lab.do(body)


def test_an_address_that_no_interface_has_is_told(lab: Lab) -> None:
    async def body(guest: Guest) -> None:
        with pytest.raises(CommandFailed, match="no network interface has the address"):
            await guest.refresh(macs={"02:00:00:00:00:99": "02:00:00:00:00:98"}, timeout=PATIENCE)
        # What has its new one already needs no old one: here it is the loopback interface.
        await guest.refresh(macs={"02:00:00:00:00:99": "00:00:00:00:00:00"}, timeout=PATIENCE)

    lab.do(body)

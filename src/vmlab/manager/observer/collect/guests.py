"""What guests say when they are asked for a sign of life and the time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Final

from vmlab.guests import agent, qga
from vmlab.guests.command import AgentRestarted
from vmlab.guests.guest import Guest
from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.simulated.guest import PROBE
from vmlab.machine.errors import VmlabError
from vmlab.machine.states import MachineState
from vmlab.manager.observer.seen import SeenGuest

__all__ = ["asked"]

_CLOCK: Final = "date +%s"


async def asked(
    id_: str,
    machine: Machine,
    guest_of: Callable[[str], Awaitable[Guest]],
    timeout: float,
) -> SeenGuest | None:
    """Ask one guest, which has `timeout` seconds; None of one that cannot be asked.

    Args:
        id_: Of the store's.
        machine: The machine.
        guest_of: Reaches the guest of a machine of the store's.
        timeout: Seconds.
    """
    if machine.state is not MachineState.RUNNING or not can_answer(machine):
        return None
    try:
        async with asyncio.timeout(timeout):
            if machine.hypervisor.name == "simulated":
                return await _asked_by_probe(id_, machine)
            return await _asked_by_agent(id_, await guest_of(id_))
    except TimeoutError:
        return SeenGuest(id_, False, f"no answer for {timeout:g} s")
    except (VmlabError, OSError, ValueError) as error:
        return SeenGuest(id_, False, str(error))


def can_answer(machine: Machine) -> bool:
    """Whether the machine has a port for an agent; others may have nobody to answer."""
    ports = machine.spec.channels
    if machine.hypervisor.name == "simulated":
        return PROBE in ports
    return agent.CONTROL in ports or qga.PORT in ports


async def _asked_by_probe(id_: str, machine: Machine) -> SeenGuest:
    """A simulated guest answers on a channel of its own; its hypervisor's clock is the true one."""
    async with await machine.channel(PROBE) as channel:
        begun = time.monotonic()
        await channel.write(json.dumps({"id": 1, "do": "clock"}).encode() + b"\n")
        line = await channel.read()
        if not line:
            return SeenGuest(id_, False, "the channel ended")
        there = float(json.loads(line)["result"])
        here = (await machine.status()).time
    return SeenGuest(id_, True, drift=there - here, uncertainty=time.monotonic() - begun)


async def _asked_by_agent(id_: str, guest: Guest) -> SeenGuest:
    await guest.ping()
    before = time.time()
    try:
        said = await guest.execute(_CLOCK)
    except AgentRestarted:
        # It answers, but is another one than that which commands were given to before.
        before = time.time()
        said = await guest.execute(_CLOCK)
    after = time.time()
    text = said.stdout.strip()
    if said.status != 0 or not text.isdigit():
        return SeenGuest(id_, True)
    # It says whole seconds: on average it is half of one later.
    return SeenGuest(
        id_,
        True,
        drift=int(text) + 0.5 - (before + after) / 2,
        uncertainty=(after - before) / 2 + 0.5,
    )

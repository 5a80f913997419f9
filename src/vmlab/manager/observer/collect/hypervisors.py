"""What the hypervisors tell of their machines: states, and what those are made of.

The state as the hypervisor's own events have it costs nothing and is taken of all machines; asking
a machine for its state and its parts is taken in turns, so that thousands of them are no burden.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Final

from vmlab.hypervisors.base import Hypervisor, Machine, MachineInfo, NicInfo
from vmlab.hypervisors.monitored.networks import bridge_port
from vmlab.machine.errors import MachineNotFound, VmlabError
from vmlab.machine.states import OPERATIONS, MachineState
from vmlab.manager.observer.known import Known
from vmlab.manager.observer.seen import SeenDisk, SeenMachine, SeenNic

__all__ = ["Turns", "present", "seen_of"]

_LOG: Final = logging.getLogger(__name__)

_AT_ONCE: Final = 64
"""Machines that are asked at the same time."""
_ASKING_SECONDS: Final = 30.0
_PAUSE_S: Final = 0.02
"""Between two machines that one after the other are asked, where there are many: they are asked one
by one all the time and not all at once, and whoever asks the manager meanwhile goes first."""
_MENTIONED_AT_ONCE: Final = 500
_WITH_TAPS: Final = frozenset({"qemu", "embedded"})
"""Hypervisors that make a tap for each NIC that is on a bridge."""


class Turns:
    """Whose turn it is to be asked: `share` of many, so that all have theirs after some sweeps."""

    def __init__(self) -> None:
        self._last = ""

    def next(self, names: Iterable[str], share: int) -> set[str]:
        """The next `share` of those names, in their order, beginning where the last ones ended."""
        ordered = sorted(names)
        if len(ordered) <= share:
            return set(ordered)
        begin = next((n for n, name in enumerate(ordered) if name > self._last), 0)
        chosen = (ordered + ordered)[begin : begin + share]
        self._last = chosen[-1]
        return set(chosen)


async def present(hypervisor: Hypervisor, names: Collection[str] | None) -> Sequence[Machine]:
    """The machines that a hypervisor has: all of them, or those of these names.

    Raises:
        VmlabError: it does not answer.
    """
    if names is None:
        return await hypervisor.list()
    found = []
    for name in sorted(names):
        with suppress(MachineNotFound):
            found.append(await hypervisor.get(name))
    return found


async def seen_of(
    host: str, found: Sequence[Machine], known: Known, ask: Collection[str] | None
) -> tuple[list[SeenMachine], set[str]]:
    """What machines of one host tell.

    Args:
        host: Its name.
        found: The machines.
        known: The store, to tell which parts belong to which of its machines.
        ask: Names, at the hypervisor, of those that are asked themselves; None is all. Of the
            others is told what is known without asking them.

    Returns:
        The machines, and what was looked at (see `Seen.looked`).
    """
    chosen = [machine for machine in found if ask is None or machine.name in ask]
    looked = {f"host:{host}"}
    seen: list[SeenMachine] = []
    waiting = iter(chosen)

    many = len(chosen) > _AT_ONCE

    async def ask_them(number: int) -> None:
        if many:
            await asyncio.sleep(number / _AT_ONCE * _PAUSE_S)
        for machine in waiting:
            one = await _asked(host, machine, known, looked)
            if one is not None:
                seen.append(one)
            if many:
                await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(*map(ask_them, range(min(_AT_ONCE, len(chosen)))))
    if ask is not None:
        mentioned = [machine for machine in found if machine.name not in ask]
        for first in range(0, len(mentioned), _MENTIONED_AT_ONCE):
            some = mentioned[first : first + _MENTIONED_AT_ONCE]
            seen += [_seen(host, machine, machine.state) for machine in some]
            await asyncio.sleep(0)  # others have their turn
    return seen, looked


async def _asked(host: str, machine: Machine, known: Known, looked: set[str]) -> SeenMachine | None:
    try:
        status = await machine.status(timeout=_ASKING_SECONDS)
    except VmlabError as error:
        _LOG.debug("machine %s of %s was not asked: %s", machine.name, host, error)
        return _seen(host, machine, machine.state)
    if status.state is MachineState.DELETED:
        return None
    stored = known.placed.get((host, machine.name))
    if stored is None or status.state not in OPERATIONS["info"] or not status.state.is_stable:
        return _seen(host, machine, status.state, status.reason)
    try:
        info = await machine.info(timeout=_ASKING_SECONDS)
    except MachineNotFound:
        return None
    except VmlabError as error:
        _LOG.debug("machine %s of %s did not tell its parts: %s", machine.name, host, error)
        return _seen(host, machine, status.state, status.reason)
    looked.add(f"parts:{stored.id}")
    return _seen(host, machine, status.state, status.reason, info)


def _tap(machine: Machine, nic: NicInfo) -> str:
    """The tap that is the other end of a NIC on a bridge; "" of others."""
    if not nic.network.startswith("bridge:") or machine.hypervisor.name not in _WITH_TAPS:
        return ""
    return bridge_port(machine.hypervisor.owner, machine.id, nic.name)


def _seen(
    host: str,
    machine: Machine,
    state: MachineState,
    reason: str = "",
    info: MachineInfo | None = None,
) -> SeenMachine:
    disks = nics = None
    if info is not None:
        disks = tuple(SeenDisk(disk.name, disk.size, disk.path) for disk in info.disks)
        nics = tuple(
            SeenNic(nic.name, nic.network, nic.mac.lower(), _tap(machine, nic)) for nic in info.nics
        )
    return SeenMachine(host, machine.id, machine.name, state, reason, disks, nics)

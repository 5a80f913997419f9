"""The guests of the machines that run: one connection to each, opened when somebody needs it.

Whoever asks for a guest gets one that answers now; one whose machine was restarted, or that went
away, is connected to anew. What the manager itself asks of a guest about its disks is here, too.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vmlab.guests.guest import CONNECT_TIMEOUT, Guest
from vmlab.lab.ways import channel_into
from vmlab.machine.errors import ChannelClosed, VmlabError

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["Guests", "SeenDisk", "disks_seen"]

_PING_S: Final = 10.0
"""Seconds after which a guest that answered before is connected to anew."""
_STOOD_STILL_S: Final = 1.0
"""Seconds that this process may be late to see that a guest did not answer in time."""
_PINGS: Final = 3
"""Times that a guest is asked in all where it is later than that."""


class Guests:
    """The guests of a manager's machines.

    Args:
        manager: Whose machines.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._guests: dict[str, Guest] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._attempts: dict[str, asyncio.Task[Guest]] = {}

    async def start(self) -> None:
        """Nothing is connected before somebody asks."""

    async def close(self) -> None:
        """Let go of all of them; the machines run on."""
        for machine_id in {*self._guests, *self._attempts}:
            await self.forget(machine_id)

    async def get(self, machine_id: str, *, timeout: float = CONNECT_TIMEOUT) -> Guest:
        """The guest of a machine that runs, once it answers.

        Args:
            machine_id: Id of the machine.
            timeout: Seconds that the guest has, if it was not asked before.

        Raises:
            DeadlineExceeded: it does not answer.
            ChannelClosed: its machine ended, or it was forgotten meanwhile.
            VmlabError: there is no way into it.
        """
        async with self._turn(machine_id):
            attempt = asyncio.ensure_future(self._answering(machine_id, timeout))
            self._attempts[machine_id] = attempt
            try:
                return await attempt
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise ChannelClosed(
                    "the guest was let go of before it answered",
                    hint="its machine was stopped, moved or brought back: try again",
                ) from None
            finally:
                if self._attempts.get(machine_id) is attempt:
                    del self._attempts[machine_id]

    async def _answering(self, machine_id: str, timeout: float) -> Guest:
        guest = self._guests.get(machine_id)
        if guest is not None:
            if await _answers(guest):
                return guest
            await self._drop(machine_id)
        machine = await self._manager.machine(machine_id)
        guest = Guest(machine, channel_into(machine))
        try:
            await guest.connect(timeout=timeout)
        except BaseException:
            await guest.close()
            raise
        self._guests[machine_id] = guest
        return guest

    async def forget(self, machine_id: str) -> None:
        """Let go of a guest whose machine stops, moves or goes; again does nothing.

        An attempt to connect to it that is under way ends.
        """
        before = self._turns.get(machine_id)
        # Whoever waits for a turn comes after this.
        turn = self._turns[machine_id] = asyncio.Lock()
        async with turn:
            if (attempt := self._attempts.pop(machine_id, None)) is not None:
                attempt.cancel()
            async with before or nullcontext():
                await self._drop(machine_id)
            if self._turns[machine_id] is turn:
                del self._turns[machine_id]

    @asynccontextmanager
    async def _turn(self, machine_id: str) -> AsyncIterator[None]:
        """Have a machine's guest to oneself."""
        while True:
            lock = self._turns[machine_id]
            async with lock:
                # Who waited for one that was forgotten meanwhile would not be alone.
                if self._turns.get(machine_id) is lock:
                    yield
                    return

    async def _drop(self, machine_id: str) -> None:
        guest = self._guests.pop(machine_id, None)
        if guest is not None:
            await guest.close()


async def _answers(guest: Guest) -> bool:
    loop = asyncio.get_running_loop()
    for _ in range(_PINGS):
        due = loop.time() + _PING_S
        try:
            async with asyncio.timeout_at(due):
                await guest.ping()
        except VmlabError:
            return False
        except TimeoutError:
            if loop.time() < due + _STOOD_STILL_S:
                return False
            # This process did not run for a while, and neither may the guest have: letting go of it
            # would break off what others do in it.
        else:
            return True
    return False


@dataclass(frozen=True, slots=True)
class SeenDisk:
    """A disk as a guest has it.

    Attributes:
        device: Its device file.
        size: Bytes.
        mounted: Where it, or a part of it, is mounted.
    """

    device: str
    size: int
    mounted: tuple[str, ...]


_DISKS: Final = """
for d in /sys/block/[vs]d*; do
    [ -e $d ] || continue
    n=${d##*/}
    s=$(cat $d/serial 2>/dev/null) || s=$(dd if=$d/device/vpd_pg80 bs=1 skip=4 2>/dev/null)
    echo "disk $s $n $(cat $d/size)"
done
while read -r device place rest; do
    case $device in /dev/[vs]d*) echo "mount ${device#/dev/} $place";; esac
done </proc/mounts
"""
"""Prints the disks of the buses virtio and SCSI with their serial numbers (virtio-blk's own, and
the unit serial number page of SCSI, SPC-4 7.8.18), and what is mounted of them."""


async def disks_seen(guest: Guest) -> dict[str, SeenDisk]:
    """The disks that a guest has, by serial number; those without one are left out.

    Raises:
        ChannelClosed: it died.
        CommandFailed: it has no such shell.
    """
    said = (await guest.succeed(_DISKS, timeout=CONNECT_TIMEOUT)).stdout
    found: dict[str, SeenDisk] = {}
    mounts: list[tuple[str, str]] = []
    for line in said.splitlines():
        kind, *words = line.split()
        if kind == "disk" and len(words) == 3:
            serial, device, sectors = words
            found[serial] = SeenDisk(f"/dev/{device}", int(sectors) * 512, ())
        elif kind == "mount" and len(words) == 2:
            mounts.append((words[0], words[1]))
    return {
        serial: SeenDisk(disk.device, disk.size, _mounts_of(disk.device, mounts))
        for serial, disk in found.items()
    }


def _mounts_of(device: str, mounts: list[tuple[str, str]]) -> tuple[str, ...]:
    name = device.removeprefix("/dev/")
    return tuple(
        place
        for mounted, place in mounts
        if mounted == name or (mounted.startswith(name) and mounted[len(name) :].isdigit())
    )

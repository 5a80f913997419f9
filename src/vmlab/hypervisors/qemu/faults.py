"""Faults that a running QEMU can be given: on its disks, its wires, its memory, its vCPUs, itself.

A disk's errors come from QEMU's blkdebug filter, put between the disk and its image while it runs.

`kill` ends the process as SIGKILL does: what the guest wrote is with the host's kernel by then and
stays, flushed or not. `power-cut`, which takes what was not flushed, is not declared: QEMU keeps no
writes back that could be lost.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import disk_device, nic_device
from vmlab.machine.errors import ResourceNotFound, UnsupportedOperation, VmlabError
from vmlab.machine.faults import (
    At,
    DiskError,
    Fault,
    KillFault,
    MemoryPressure,
    NetPartition,
    PauseFault,
)

if TYPE_CHECKING:
    from vmlab.hypervisors.qemu.machine import QemuMachine

Clear = Callable[[], Awaitable[None]]

_ERRNO: Final = {"EIO": 5, "ENOSPC": 28}
_IOTYPES: Final = {
    "read": ("read",),
    "write": ("write", "write-zeroes", "discard"),
    "flush": ("flush",),
    "any": ("read", "write", "write-zeroes", "discard", "flush"),
}
"""BlkdebugIOType of each operation (QEMU's block-core.json)."""


@dataclass
class _Armed:
    """A fault that waits for its time, works, or is over."""

    fault: Fault
    clear: Clear | None = None
    task: asyncio.Task[None] | None = None


class Faults:
    """The faults of one machine."""

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine
        self._armed: dict[str, _Armed] = {}
        self._numbers = itertools.count(1)

    async def inject(self, fault: Fault) -> str:
        """Break something now or at its time; returns the fault's id.

        Raises:
            UnsupportedOperation: its trigger is not one of time.
            ResourceNotFound: the machine has no such disk or NIC.
        """
        if not isinstance(fault.when, At):
            raise UnsupportedOperation(
                f"fault trigger {fault.when.on}",
                hypervisor="qemu",
                machine=self._machine.name,
                operation="inject",
                hint="QEMU's faults begin at a time: when = {on = 'time', seconds = 1.5}",
            )
        self._check(fault)
        number = next(self._numbers)
        identity = fault.id or f"{fault.kind.value}-{number}"
        armed = self._armed[identity] = _Armed(fault)
        if fault.when.seconds == 0:
            await self._break(identity, armed)
        else:
            armed.task = self._later(self._at(fault.when.seconds, identity, armed))
        return identity

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(work)

    def _check(self, fault: Fault) -> None:
        spec = self._machine.spec
        if isinstance(fault, DiskError) and spec.disk(fault.disk) is None:
            raise self._unknown("disk", fault.disk)
        if isinstance(fault, NetPartition) and spec.nic(fault.nic) is None:
            raise self._unknown("NIC", fault.nic)

    def _unknown(self, kind: str, name: str) -> ResourceNotFound:
        return ResourceNotFound(
            f"machine {self._machine.name!r} has no {kind} {name!r}",
            machine=self._machine.name,
            hypervisor="qemu",
            operation="inject",
        )

    async def _at(self, seconds: float, identity: str, armed: _Armed) -> None:
        await asyncio.sleep(seconds)
        # A machine that is gone by then cannot be broken any more.
        with suppress(VmlabError):
            await self._break(identity, armed)

    async def _break(self, identity: str, armed: _Armed) -> None:
        armed.clear = await self._apply(armed.fault)
        if armed.clear is not None and armed.fault.duration is not None:
            armed.task = self._later(self._until(armed.fault.duration, identity))

    async def _until(self, seconds: float, identity: str) -> None:
        await asyncio.sleep(seconds)
        with suppress(VmlabError):
            await self._end(identity)
            self._machine.fault_ended(identity)

    async def clear(self, identity: str) -> None:
        """End a fault; one that has ended is none.

        Raises:
            ResourceNotFound: there never was one of that id.
        """
        if identity not in self._armed:
            raise ResourceNotFound(
                f"machine {self._machine.name!r} never had a fault {identity!r}",
                hint="`inject` returns the fault's id",
                machine=self._machine.name,
                hypervisor="qemu",
                operation="clear_fault",
            )
        if (task := self._armed[identity].task) is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._end(identity)

    async def _end(self, identity: str) -> None:
        armed = self._armed[identity]
        clear, armed.clear = armed.clear, None
        if clear is not None and self._machine.emulator is not None:
            await clear()

    def forget(self) -> None:
        """The machine has no process any more: nothing of it is broken."""
        for armed in self._armed.values():
            armed.clear = None
            if armed.task is not None and armed.task is not asyncio.current_task():
                armed.task.cancel()
                armed.task = None

    # What each kind does.

    async def _apply(self, fault: Fault) -> Clear | None:
        emulator = self._machine.need()
        if isinstance(fault, DiskError):
            return await self._fail_disk(emulator, fault)
        if isinstance(fault, NetPartition):
            return await self._cut_wire(emulator, fault.nic)
        if isinstance(fault, MemoryPressure):
            return await self._squeeze(emulator, fault.leave)
        if isinstance(fault, PauseFault):
            return await self._freeze(emulator)
        assert isinstance(fault, KillFault), "capabilities name no other kind"
        emulator.process.kill()
        return None

    async def _fail_disk(self, emulator: Emulator, fault: DiskError) -> Clear:
        disk = self._machine.disks[fault.disk]
        broken = f"broken-{next(self._numbers)}"
        rules = [
            {"event": "none", "iotype": kind, "errno": _ERRNO[fault.errno], "once": False}
            for kind in _IOTYPES[fault.operation]
        ]
        await emulator.execute(
            "blockdev-add",
            {
                "driver": "blkdebug",
                "node-name": broken,
                "image": disk.node,
                "read-only": disk.readonly,
                "inject-error": rules,
            },
        )
        await self._insert(emulator, fault.disk, broken)

        async def mend() -> None:
            await self._insert(emulator, fault.disk, disk.node)
            await emulator.execute("blockdev-del", {"node-name": broken})

        return mend

    async def _insert(self, emulator: Emulator, disk: str, node: str) -> None:
        """Have a disk's device use another block node."""
        device = f"/machine/peripheral/{disk_device(disk)}"
        if self._machine.layout.buses[disk] == "virtio":
            device += "/virtio-backend"
        await emulator.execute("qom-set", {"path": device, "property": "drive", "value": node})

    async def _cut_wire(self, emulator: Emulator, nic: str) -> Clear:
        await emulator.execute("set_link", {"name": nic_device(nic), "up": False})
        self._machine.cut.add(nic)

        async def mend() -> None:
            self._machine.cut.discard(nic)
            await emulator.execute("set_link", {"name": nic_device(nic), "up": True})

        return mend

    async def _squeeze(self, emulator: Emulator, leave: int) -> Clear:
        size = self._machine.spec.memory.size
        await emulator.execute("balloon", {"value": min(leave, size)})

        async def mend() -> None:
            await emulator.execute("balloon", {"value": size})

        return mend

    async def _freeze(self, emulator: Emulator) -> Clear | None:
        if not (await emulator.execute("query-status"))["running"]:
            return None
        await emulator.execute("stop")
        self._machine.paused_by_fault()

        async def mend() -> None:
            await emulator.execute("cont")
            self._machine.resumed_by_fault()

        return mend

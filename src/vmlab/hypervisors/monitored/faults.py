"""Faults of a running process: on its disks, its wires, its memory, its vCPUs, itself.

How a disk, a wire or a vCPU is broken is the back end's, which also counts its occasions, where
they are counted.

`kill` ends the process as SIGKILL does: what the guest wrote is with the host's kernel by then and
stays, flushed or not. `power-cut` takes what was not flushed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.monitored.names import nic_device
from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import ResourceNotFound, UnsupportedOperation, VmlabError
from vmlab.machine.faults import (
    COUNTED,
    At,
    CpuStall,
    DiskCorrupt,
    DiskError,
    DiskSlow,
    DiskTornWrite,
    Fault,
    KillFault,
    MemoryPressure,
    NetDelay,
    NetLoss,
    NetPartition,
    PauseFault,
    PowerCut,
)

if TYPE_CHECKING:
    from vmlab.hypervisors.monitored.machine import MonitoredMachine

Clear = Callable[[], Awaitable[None]]
"""Ends a fault."""
_ONE_DISK: Final = (DiskError, DiskSlow, DiskTornWrite, DiskCorrupt)
_ONE_NIC: Final = (NetLoss, NetDelay, NetPartition)


@dataclass
class _Armed:
    """A fault that waits for its time, works, or is over."""

    fault: Fault
    clear: Clear | None = None
    task: asyncio.Task[None] | None = None


class Faults:
    """The faults of one machine."""

    def __init__(self, machine: MonitoredMachine[Any]) -> None:
        self._machine = machine
        self._armed: dict[str, _Armed] = {}
        self._numbers = itertools.count(1)
        self._beginnings: set[asyncio.Task[None]] = set()

    async def inject(self, fault: Fault) -> str:
        """Break something now or at its time; returns the fault's id.

        Raises:
            UnsupportedOperation: its trigger is one that nobody here waits for.
            ResourceNotFound: the machine has no such disk, NIC or vCPU.
        """
        await self._check_trigger(fault)
        self._check(fault)
        number = next(self._numbers)
        identity = fault.id or f"{fault.kind.value}-{number}"
        armed = self._armed[identity] = _Armed(fault)

        async def mend() -> None:
            await self._away(identity)
            del self._armed[identity]

        self._machine.on_failure(mend)
        if isinstance(fault.when, At) and fault.when.seconds > 0:
            armed.task = self._later(self._at(fault.when.seconds, identity, armed))
        else:
            await self._break(identity, armed)
        return identity

    async def _check_trigger(self, fault: Fault) -> None:
        if isinstance(fault.when, At):
            return
        hypervisor = self._machine.hypervisor
        hint = "it begins at a time: when = {on = 'time', seconds = 1.5}"
        if isinstance(fault.when, COUNTED):
            counted = (await hypervisor.capabilities()).counted
            if fault.kind in counted:
                return
            known = ", ".join(sorted(kind.value for kind in counted)) or "no fault"
            hint = f"{hint}; counted are the occasions of {known}"
        raise UnsupportedOperation(
            f"fault trigger {fault.when.on}",
            hypervisor=hypervisor.name,
            machine=self._machine.name,
            operation="inject",
            hint=hint,
        )

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(work)

    def _check(self, fault: Fault) -> None:
        spec = self._machine.spec
        if isinstance(fault, _ONE_DISK) and spec.disk(fault.disk) is None:
            raise self._unknown("disk", fault.disk)
        if isinstance(fault, _ONE_NIC) and spec.nic(fault.nic) is None:
            raise self._unknown("NIC", fault.nic)
        if isinstance(fault, CpuStall) and fault.vcpu >= spec.cpus.count:
            raise self._unknown("vCPU", fault.vcpu)

    def _unknown(self, kind: str, name: str | int) -> ResourceNotFound:
        return ResourceNotFound(
            f"machine {self._machine.name!r} has no {kind} {name!r}",
            machine=self._machine.name,
            hypervisor=self._machine.hypervisor.name,
            operation="inject",
        )

    async def _at(self, seconds: float, identity: str, armed: _Armed) -> None:
        await asyncio.sleep(seconds)
        # A machine that is gone by then cannot be broken any more.
        with suppress(VmlabError):
            await self._break(identity, armed)

    async def _break(self, identity: str, armed: _Armed) -> None:
        async def whole() -> None:
            armed.clear = await self._apply(identity, armed.fault)

        # To its end: nobody would know how to mend a part of it.
        await uninterrupted(whole())
        # Whoever counts its occasions knows from when on it lasts.
        seconds = armed.fault.duration if isinstance(armed.fault.when, At) else None
        if armed.clear is not None and seconds is not None:
            armed.task = self._later(self._until(seconds, identity))

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
                hypervisor=self._machine.hypervisor.name,
                operation="clear_fault",
            )
        await self._away(identity)

    async def _away(self, identity: str) -> None:
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

    async def _apply(self, identity: str, fault: Fault) -> Clear | None:
        emulator = self._machine.need()
        if isinstance(fault, NetPartition):
            return await self._cut_wire(emulator, fault.nic)
        if isinstance(fault, MemoryPressure):
            return await self._squeeze(emulator, fault.leave)
        if isinstance(fault, PauseFault):
            return await self._freeze(emulator)
        if isinstance(fault, KillFault):
            await uninterrupted(self._kill(emulator))
            return None
        if isinstance(fault, PowerCut):
            await uninterrupted(self._cut_power(emulator, identity, fault))
            return None
        return await self._machine.break_device(emulator, identity, fault)

    async def _cut_power(self, emulator: Emulator, identity: str, fault: PowerCut) -> None:
        """Have the disks lose what was not flushed, and end the process."""
        await self._machine.break_device(emulator, identity, fault)
        await self._kill(emulator)
        if fault.restart:
            self._begin_again()

    async def _kill(self, emulator: Emulator) -> None:
        """End the process; the machine has failed when this returns."""
        emulator.process.kill()
        await emulator.process.wait()
        await emulator.noticed()
        await self._machine.ended()

    def _begin_again(self) -> None:
        """Start the machine when its turn comes."""

        async def begin() -> None:
            # What is done with it meanwhile is its owner's affair.
            with suppress(VmlabError):
                await self._machine.start()

        task = self._later(begin())
        self._beginnings.add(task)
        task.add_done_callback(self._beginnings.discard)

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

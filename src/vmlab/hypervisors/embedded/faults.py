"""Faults of the engine's disks, wires and harts, and of its power."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from vmlab.hypervisors.monitored import device_faults
from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.monitored.names import nic_device, node_name
from vmlab.machine.errors import UnsupportedOperation
from vmlab.machine.faults import (
    CpuStall,
    DiskCorrupt,
    DiskSlow,
    Fault,
    FaultKind,
    NetDelay,
    NetLoss,
    PowerCut,
)
from vmlab.machine.spec import MachineSpec

Clear = Callable[[], Awaitable[None]]

COUNTED: Final = frozenset(
    {
        FaultKind.DISK_ERROR,
        FaultKind.DISK_SLOW,
        FaultKind.DISK_TORN_WRITE,
        FaultKind.NET_LOSS,
        FaultKind.NET_DELAY,
    }
)
"""Kinds whose occasions the engine counts."""
FAULTS: Final = COUNTED | {
    FaultKind.DISK_CORRUPT,
    FaultKind.POWER_CUT,
    FaultKind.NET_PARTITION,
    FaultKind.PAUSE,
    FaultKind.KILL,
    FaultKind.MEMORY_PRESSURE,
    FaultKind.CPU_STALL,
}


async def break_device(
    emulator: Emulator, spec: MachineSpec, identity: str, fault: Fault
) -> Clear | None:
    """Break a device of an engine's; what is returned mends it.

    Raises:
        UnsupportedOperation: the machine's time is deterministic, and no host's time passes for it.
    """
    if isinstance(fault, PowerCut):
        await emulator.execute("x-power-cut")
        return None
    if isinstance(fault, DiskCorrupt):
        await emulator.execute(*device_faults.corruption(fault, node_name(fault.disk)))
        return None
    if isinstance(fault, CpuStall):
        return await _stall(emulator, fault.vcpu)
    if isinstance(fault, NetLoss | NetDelay):
        device = nic_device(fault.nic)
        command = device_faults.net_fault(fault, device, identity, spec.seed)
    else:
        if isinstance(fault, DiskSlow) and spec.deterministic:
            raise UnsupportedOperation(
                f"fault {fault.kind.value}",
                hypervisor="embedded",
                machine=spec.name,
                operation="inject",
                hint="where time is deterministic, a request takes none of it",
            )
        assert isinstance(fault, device_faults.RequestFault), "capabilities name no other kind"
        command = device_faults.disk_fault(fault, node_name(fault.disk), identity, spec.seed)
    await emulator.execute(*command)

    async def mend() -> None:
        await emulator.execute(*device_faults.ending(identity))

    return mend


async def _stall(emulator: Emulator, vcpu: int) -> Clear:
    await emulator.execute("x-hart-stall", {"hart": vcpu, "on": True})

    async def mend() -> None:
        await emulator.execute("x-hart-stall", {"hart": vcpu, "on": False})

    return mend

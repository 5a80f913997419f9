"""Breakable disks: a process beside QEMU serves them, and is told what befalls their requests.

QEMU's own filters fail requests, and no more. Faults of single requests, torn writes and a loss of
power need somebody who sees each request and flush.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.hypervisors.monitored import device_faults
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.qemu.companion import Companion
from vmlab.machine.errors import UnsupportedOperation
from vmlab.machine.faults import DiskCorrupt, Fault, FaultKind, PowerCut
from vmlab.machine.spec import MachineSpec

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.processes import OwnedProcess

Clear = Callable[[], Awaitable[None]]

MODULE: Final = "vmlab.hypervisors.qemu.disk_server"

COUNTED: Final = frozenset({FaultKind.DISK_ERROR, FaultKind.DISK_SLOW, FaultKind.DISK_TORN_WRITE})
"""Kinds whose occasions are counted."""
KINDS: Final = COUNTED - {FaultKind.DISK_ERROR} | {FaultKind.DISK_CORRUPT, FaultKind.POWER_CUT}
"""Kinds that only breakable disks have; others fail as well, from a time on."""


def companion(directory: Path) -> Companion:
    """The process that serves the breakable disks of the QEMU in `directory`."""
    return Companion(MODULE, "serves breakable disks", "disks", directory)


async def start(
    disks: Iterable[DiskFile], directory: Path, *, owner: Owner, machine: str
) -> OwnedProcess | None:
    """Start the process that serves those of the disks that are breakable, if there are any.

    Their sockets are there when this returns.

    Args:
        disks: The disks.
        directory: That of the QEMU process; it is made if it is not there.
        owner: Whose they are.
        machine: Id of the machine.

    Raises:
        OperationFailed: it did not start; with what it said.
    """
    served = [
        {
            "node": disk.node,
            "file": str(disk.path),
            "format": disk.format,
            "read-only": disk.readonly,
            "socket": disk.socket,
        }
        for disk in disks
        if disk.breakable
    ]
    if not served:
        return None
    return await companion(directory).start(served, owner=owner, machine=machine)


def check(spec: MachineSpec, disks: Iterable[DiskFile], fault: Fault) -> None:
    """Refuse a fault that strikes disks which are not breakable.

    Raises:
        UnsupportedOperation: naming the fault, and the disks.
    """
    struck = [
        disk.name
        for disk in disks
        if not disk.breakable
        and (not disk.readonly if isinstance(fault, PowerCut) else _is_of(fault, disk))
    ]
    if struck:
        raise UnsupportedOperation(
            f"fault {fault.kind.value}",
            hypervisor="qemu",
            machine=spec.name,
            operation="inject",
            hint=f"give {', '.join(struck)} of its specification `breakable = true`",
        )


def _is_of(fault: Fault, disk: DiskFile) -> bool:
    return getattr(fault, "disk", None) == disk.name


async def break_disk(
    directory: Path, spec: MachineSpec, disk: DiskFile | None, identity: str, fault: Fault
) -> Clear | None:
    """Break a breakable disk, or take the power of all; what is returned mends it."""
    served = companion(directory)
    if isinstance(fault, PowerCut):
        await served.tell(spec.name, "x-power-cut", {})
        return None
    assert disk is not None, "only a power cut is of no disk"
    if isinstance(fault, DiskCorrupt):
        await served.tell(spec.name, *device_faults.corruption(fault, disk.node))
        return None
    assert isinstance(fault, device_faults.RequestFault), "capabilities name no other kind"
    command = device_faults.disk_fault(fault, disk.node, identity, spec.seed)
    await served.tell(spec.name, *command)

    async def mend() -> None:
        await served.tell(spec.name, *device_faults.ending(identity))

    return mend

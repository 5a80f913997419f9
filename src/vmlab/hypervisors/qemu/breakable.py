"""Breakable disks: a process beside QEMU serves them, and is told what befalls their requests.

QEMU's own filters fail requests, and no more. Faults of single requests, torn writes and a loss of
power need somebody who sees each request and flush.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors import processes
from vmlab.hypervisors.monitored import device_faults
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qmp import QmpConnection, QmpLost
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import OperationFailed, UnsupportedOperation
from vmlab.machine.faults import DiskCorrupt, Fault, FaultKind, PowerCut
from vmlab.machine.spec import MachineSpec

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.processes import OwnedProcess

Clear = Callable[[], Awaitable[None]]

MODULE: Final = "vmlab.hypervisors.qemu.disk_server"
MESSAGES: Final = "disks.log"
_DESCRIPTION: Final = "disks.json"
_SOCKET: Final = "disks-qmp.sock"
_QMP_LOG: Final = "disks-qmp.log"
_START_S: Final = 120.0

COUNTED: Final = frozenset({FaultKind.DISK_ERROR, FaultKind.DISK_SLOW, FaultKind.DISK_TORN_WRITE})
"""Kinds whose occasions are counted."""
KINDS: Final = COUNTED - {FaultKind.DISK_ERROR} | {FaultKind.DISK_CORRUPT, FaultKind.POWER_CUT}
"""Kinds that only breakable disks have; others fail as well, from a time on."""


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
    await done_in_thread(_prepare, directory, json.dumps(served))
    process = await processes.spawn(
        # The directory that it is started in is no place for modules of anybody's.
        [sys.executable, "-P", "-m", MODULE, _DESCRIPTION],
        owner=owner,
        machine=machine,
        stdout=directory / MESSAGES,
        stderr=directory / MESSAGES,
        cwd=directory,
    )
    try:
        conversation = await _talk(directory, machine, process, timeout=_START_S)
        await conversation.close()
    except BaseException as error:
        await uninterrupted(_end(process))
        if isinstance(error, QmpLost):
            raise OperationFailed(
                f"the process that serves breakable disks did not start: {said(directory)}",
                hint=f"its messages are in {directory / MESSAGES}",
                hypervisor="qemu",
                operation="start",
            ) from error
        raise
    return process


def _prepare(directory: Path, description: str) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / _DESCRIPTION).write_text(description, "utf-8")


async def _end(process: OwnedProcess) -> None:
    process.kill()
    await process.wait()


def said(directory: Path) -> str:
    """What the process said last, if anything."""
    try:
        return (directory / MESSAGES).read_text("utf-8", "replace").strip().rpartition("\n")[2]
    except OSError:
        return ""


async def _talk(
    directory: Path, machine: str, process: OwnedProcess | None, timeout: float
) -> QmpConnection:
    def ended() -> str | None:
        gone = process is not None and not process.running
        return "the process that serves the disks has ended" if gone else None

    return await QmpConnection.open(
        directory / _SOCKET,
        machine=machine,
        hypervisor="qemu",
        log=directory / _QMP_LOG,
        ended=ended,
        timeout=timeout,
    )


async def tell(directory: Path, machine: str, command: str, arguments: dict[str, Any]) -> None:
    """Have the process of the QEMU in `directory` do something.

    Raises:
        QmpError: it refused.
        QmpLost: it has ended.
    """
    conversation = await _talk(directory, machine, None, timeout=_START_S)
    try:
        await conversation.execute(command, arguments)
    finally:
        await conversation.close()


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
    if isinstance(fault, PowerCut):
        await tell(directory, spec.name, "x-power-cut", {})
        return None
    assert disk is not None, "only a power cut is of no disk"
    if isinstance(fault, DiskCorrupt):
        await tell(directory, spec.name, *device_faults.corruption(fault, disk.node))
        return None
    assert isinstance(fault, device_faults.RequestFault), "capabilities name no other kind"
    command = device_faults.disk_fault(fault, disk.node, identity, spec.seed)
    await tell(directory, spec.name, *command)

    async def mend() -> None:
        await tell(directory, spec.name, *device_faults.ending(identity))

    return mend

"""What a machine's operations do about its networks and its guest: wires, seeds, and their end.

On a simulated host wires are simulated, too: nothing is made on this host for a guest that is not
there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy.orm import Session

from vmlab.machine.errors import VmlabError
from vmlab.machine.spec import Disk, MachineSpec
from vmlab.manager.operator.definition import SIMULATED
from vmlab.manager.store.queries import find_machine

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager
    from vmlab.manager.networks.networks import Networks

__all__ = ["SEED_DISK", "connect", "ended", "wired"]

_LOG: Final = logging.getLogger(__name__)

SEED_DISK: Final = "cidata"
"""The disk that cloud-init finds what it is told on; its name is that of the file system, too."""


async def connect(manager: Manager, machine_id: str, host: str) -> None:
    """Have the networks of a machine there before it starts; again changes nothing.

    Raises:
        OperationFailed: a network cannot be made on this host.
    """
    if manager.hosts.setting(host).hypervisor != SIMULATED:
        await manager.networks.machine_starting(machine_id)


def _wires(session: Session, networks: Networks, machine_id: str) -> dict[str, str]:
    """What each NIC's `network` is in the machine's specification, by the NIC's name."""
    return {nic.name: networks.wire(nic) for nic in find_machine(session, machine_id).nics}


async def wired(manager: Manager, machine_id: str, spec: MachineSpec) -> MachineSpec:
    """A machine's specification with its wires, and with a disk for cloud-init if it has a use."""
    networks = await manager.database.read(_wires, manager.networks, machine_id)
    nics = tuple(
        nic.model_copy(update={"network": networks.get(nic.name, nic.network)}) for nic in spec.nics
    )
    disks = spec.disks
    seed = await manager.database.read(_seed, manager.networks, machine_id)
    if seed is not None and spec.disk(SEED_DISK) is None:
        disks = (*disks, Disk(name=SEED_DISK, source=seed, format="raw", readonly=True))
    return spec.with_changes(nics=nics, disks=disks)


def _seed(session: Session, networks: Networks, machine_id: str) -> Path | None:
    """The disk with what a machine's guest is told, written now; None if it is told nothing."""
    row = find_machine(session, machine_id)
    if not row.metadata_.get("user_data") and not row.metadata_.get("ssh_keys"):
        return None
    return networks.seed(row)


async def ended(manager: Manager, machine_id: str, *, deleted: bool = False) -> None:
    """A machine is at rest, or is no more: what it had of networks goes, and its guest.

    What cannot be cleared is told in the log and found by the networks' own reconciliation: it
    keeps no machine from being stopped.
    """
    await manager.guests.forget(machine_id)
    try:
        if deleted:
            await manager.networks.machine_deleted(machine_id)
        else:
            await manager.networks.machine_stopped(machine_id)
    except (VmlabError, OSError) as error:
        _LOG.warning("networks of machine %s are not all let go of: %s", machine_id, error)

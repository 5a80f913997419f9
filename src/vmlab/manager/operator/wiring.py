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
from vmlab.machine.states import MachineState
from vmlab.manager.networks.in_guest import addresses_script
from vmlab.manager.operator.definition import SIMULATED, json_of
from vmlab.manager.store.queries import find_machine
from vmlab.manager.store.tables import MachineRow

if TYPE_CHECKING:
    from vmlab.hypervisors.base import Machine
    from vmlab.manager.manager import Manager
    from vmlab.manager.networks.networks import Networks
    from vmlab.manager.networks.seed import Identity
    from vmlab.manager.operator.journal import Step

__all__ = [
    "SEED_DISK",
    "connect",
    "ended",
    "is_untold",
    "knows",
    "remembers",
    "reseed",
    "tell_guest",
    "wired",
    "write_spec",
]

_LOG: Final = logging.getLogger(__name__)

_GUEST_ANSWERS_S: Final = 120.0
"""Seconds that a guest that runs already has to answer."""

_REMEMBERED: Final = "remembered"
"""In a NIC's data: the MAC address that the guest remembers."""

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
        disks = (*disks, _seed_disk(seed))
    return spec.with_changes(nics=nics, disks=disks)


async def reseed(manager: Manager, machine_id: str, machine: Machine) -> None:
    """Have a machine have the disk for cloud-init that the store wants it to have now.

    One that somebody gave the machine under that name stays. Of a live machine the disk is
    hot-plugged, which its guest has a part in.

    Args:
        manager: Whose machine it is.
        machine_id: Its id.
        machine: The machine at its hypervisor.

    Raises:
        VmlabError: the disk cannot be taken off it, or put into it.
    """
    seed = await manager.database.read(_seed, manager.networks, machine_id)
    had = machine.spec.disk(SEED_DISK)
    if had is not None and not manager.networks.is_seed(had.source):
        return
    wanted = _seed_disk(seed) if seed is not None else None
    if wanted == had and (had is None or await _of_its_size(machine, had)):
        return
    if machine.state is MachineState.FAILED:
        # What is left of it goes; only then it can be changed.
        await machine.kill()
    if had is not None:
        await machine.unplug_disk(SEED_DISK)
    if wanted is not None:
        await machine.plug_disk(wanted)


def remembers(row: MachineRow, source: MachineRow | None = None) -> None:
    """Note that a live machine's guest is to be told of its NICs, by `tell_guest`.

    Args:
        row: The machine.
        source: What it is a copy of, whose MAC addresses its guest remembers; else its own.
    """
    had = {nic.name: nic for nic in (source or row).nics}
    for nic in row.nics:
        known = had.get(nic.name, nic)
        nic.data = {**nic.data, _REMEMBERED: known.data.get(_REMEMBERED, known.mac)}


def knows(row: MachineRow) -> None:
    """Note that a machine's guest knows its NICs, or is not there any more."""
    for nic in row.nics:
        nic.data = {key: value for key, value in nic.data.items() if key != _REMEMBERED}


def is_untold(session: Session, machine_id: str) -> bool:
    """Whether a machine's guest is still to be told of its NICs."""
    return any(_REMEMBERED in nic.data for nic in find_machine(session, machine_id).nics)


async def tell_guest(
    manager: Manager, machine_id: str, state: MachineState, step: Step, *, copy: bool = False
) -> None:
    """Have a guest that runs, and remembers another time, be who and where it is now.

    One that stands still is told when it is resumed. One that cannot be told is no reason to fail,
    and is not asked again: many have nobody to ask.

    Args:
        manager: Whose machine it is.
        machine_id: Its id.
        state: What the machine does.
        step: The step that it is, which says what came of it.
        copy: Whether it has another name and another id, too; one that remembers other MAC
            addresses has.
    """
    if state is not MachineState.RUNNING:
        step.skip("it is told when it is resumed" if state.is_live else "its guest does not run")
        return
    try:
        await _tell(manager, machine_id, copy=copy)
    except VmlabError as error:
        step.failed(error.message.partition("\n")[0])
    await manager.database.write(lambda session: knows(find_machine(session, machine_id)))


async def _tell(manager: Manager, machine_id: str, *, copy: bool) -> None:
    def read(session: Session) -> tuple[str, Identity, dict[str, str]]:
        row = find_machine(session, machine_id)
        macs = {nic.data.get(_REMEMBERED, nic.mac): nic.mac for nic in row.nics}
        changed = {before: mac for before, mac in macs.items() if before != mac}
        return row.host, manager.networks.identity(row), changed

    host, who, macs = await manager.database.read(read)
    await connect(manager, machine_id, host)
    guest = await manager.guests.get(machine_id, timeout=_GUEST_ANSWERS_S)
    copy = copy or bool(macs)
    await guest.refresh(
        hostname=who.hostname if copy else None, machine_id=machine_id if copy else None, macs=macs
    )
    if script := addresses_script(who.nics):
        await guest.succeed(script, timeout=_GUEST_ANSWERS_S)


def _seed_disk(path: Path) -> Disk:
    return Disk(name=SEED_DISK, source=path, format="raw", readonly=True)


async def _of_its_size(machine: Machine, disk: Disk) -> bool:
    """Whether a hypervisor takes a disk to be as large as its file, which may be another by now."""
    assert disk.source is not None
    there = {found.name: found.size for found in (await machine.info()).disks}
    return there.get(disk.name) == disk.source.stat().st_size


def write_spec(session: Session, machine_id: str, spec: MachineSpec) -> None:
    """Have the store say how a machine is made."""
    session.get_one(MachineRow, machine_id).spec = json_of(spec)


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

"""The manager's networks: addresses in the store, and what the host needs, kept in step.

What a machine's start and end need of its networks is here. The store says what there is to be;
`host` makes it and writes down first what it makes, and `reconcile` clears what the two do not
agree on, as after the manager was killed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import select

from vmlab.hypervisors.ownership import Store
from vmlab.machine.errors import OperationFailed, ResourceNotFound, VmlabError
from vmlab.machine.states import MachineState
from vmlab.manager.networks import addresses, links, names
from vmlab.manager.networks.host import HostNetworks
from vmlab.manager.networks.layout import Layout, Lease, subnets_of
from vmlab.manager.networks.metadata import Instance, InstanceNic, MetadataService
from vmlab.manager.networks.seed import Identity, SeedNic, instance_id, write_seed
from vmlab.manager.operator.definition import SIMULATED
from vmlab.manager.store.tables import AddressRow, MachineRow, NetworkRow, NicRow

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from vmlab.manager.settings import Settings
    from vmlab.manager.store.database import Database

__all__ = ["Networks"]

_LOG: Final = logging.getLogger(__name__)

_LIVE: Final = tuple(state.value for state in MachineState if state.is_live)


class Networks:
    """The networks of a manager.

    `host` is what of them is on this host.

    Args:
        settings: Where its state is.
        database: The store.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._dry_run = settings.dry_run
        # The name tells this home's interfaces from another's, also where a link leads to it.
        directory = settings.directory / "networks"
        directory.mkdir(mode=0o700, exist_ok=True)
        self._seeds = settings.directory / "seeds"
        self._seeds.mkdir(mode=0o700, exist_ok=True)
        self.host = HostNetworks(directory, Store.open(settings.home, "manager").owner)
        self._metadata = MetadataService(self._instance)
        self._changes: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def start(self) -> None:
        """Clear what nobody needs, and serve what live machines are on; a dry run does neither."""
        if not self._dry_run:
            await self.reconcile()

    async def close(self) -> None:
        """Let go of what needs this process; networks and their programs stay for machines."""
        await self._metadata.close_all()

    # ------------------------------------------------------------- of machines

    def prepare(self, s: Session, machine: MachineRow, *, operation: str | None = None) -> None:
        """Take the addresses that a machine needs, in the transaction that starts it.

        Raises:
            ResourceExhausted: a network of its has none left.
            Conflict: an address that was asked for is somebody else's.
        """
        addresses.take(s, machine, operation=operation)

    def wire(self, nic: NicRow) -> str:
        """What a NIC's `network` is in a machine's specification; it stays so for its life.

        The wire itself is there after `machine_starting`.
        """
        network = nic.network
        if network is None:
            return nic.mode
        layout = Layout.of(network, self.host.home)
        if layout.mode == "user":
            return "user"
        if layout.mode == "isolated":
            return f"segment:{names.segment(network.id)}"
        return f"bridge:{layout.bridge}"

    async def machine_starting(self, machine: str) -> None:
        """Have the networks of a machine there, which know of it; again is fine.

        Raises:
            OperationFailed: one of them cannot be made on this host.
        """
        for network in await self._database.read(_networks_of, machine):
            await self.ensure(network)

    async def machine_stopped(self, machine: str) -> None:
        """A machine is at rest: its addresses go if its policy says so."""
        await self._let_go(machine, "stop")

    async def machine_deleted(self, machine: str) -> None:
        """A machine is about to be no more: its addresses and its seed go."""
        await self._let_go(machine, "delete")
        for suffix in (".iso", ".json"):
            path = self._seed_path(machine).with_suffix(suffix)
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _let_go(self, machine: str, when: str) -> None:
        on = await self._database.read(_networks_of, machine, served=True)
        if await self._database.write(addresses.release, machine, when=when):
            for network in on:
                await self._tell_anew(network)

    async def _tell_anew(self, network: str) -> None:
        """Have who serves a network know who is on it now, if it is served."""
        if network not in self.host.recorded():
            return
        try:
            await self.ensure(network)
        except VmlabError as error:
            # The machine is gone either way; the next start on that network says what is wrong.
            _LOG.warning("network %s could not be told of a change: %s", network, error)

    def seed(self, machine: MachineRow) -> Path:
        """A disk for the guest's cloud-init (NoCloud), as the store has the machine now."""
        return write_seed(_identity(machine), self._seed_path(machine.id))

    def identity(self, machine: MachineRow) -> Identity:
        """What the guest of a machine is to be told about itself, as the store has it now."""
        return _identity(machine)

    def is_seed(self, path: Path | None) -> bool:
        """Whether a file is a disk of `seed`'s, for whichever machine."""
        return path is not None and path.parent == self._seeds

    def _seed_path(self, machine: str) -> Path:
        assert machine.isalnum(), "an id that the manager made"
        return self._seeds / f"{machine}.iso"

    # ------------------------------------------------------------- of networks

    async def ensure(self, network: str) -> Layout:
        """Have a network there as the store says, with all who are on it; again changes nothing.

        Raises:
            ResourceNotFound: the store has no network of that id.
            OperationFailed: it cannot be made on this host, and why.
        """
        async with self._changes[network]:
            wanted, leases = await self._database.read(_wanted, network, self.host.home)
            layout = await self.host.ensure(wanted, leases)
            if layout.foreign != wanted.foreign:
                await self._database.write(_note_foreign, network, layout.foreign)
            await self._serve_metadata(layout)
            return layout

    async def _serve_metadata(self, layout: Layout) -> None:
        if layout.mode != "bridged" or layout.foreign or not layout.gateways:
            return
        link = (await asyncio.to_thread(links.links)).get(layout.bridge)
        if link is None:
            raise OperationFailed(f"the bridge {layout.bridge} is gone again")
        await self._metadata.open(layout, link.index)

    async def teardown(self, network: str) -> list[str]:
        """Remove all that the host has of a network; returns what was removed, for a person."""
        async with self._changes[network]:
            await self._metadata.close(network)
            return await self.host.remove(network)

    async def missing(self, network: str) -> list[str]:
        """What of a network the host does not have and should; for a person.

        Raises:
            ResourceNotFound: the store has no network of that id.
        """
        wanted, _ = await self._database.read(_wanted, network, self.host.home)
        return await self.host.missing(wanted)

    async def reconcile(self) -> list[str]:
        """Remove what is of no network of the store; repair what live machines need.

        A network that cannot be repaired is told in the log and does not keep others from it.

        Returns:
            What was removed, for a person.
        """
        known, live = await self._database.read(_all_networks)
        removed = await self.host.sweep(known)
        for machine in await self._database.read(_unreleased):
            given = await self._database.write(addresses.release, machine, when="stop")
            removed += [f"address {each}" for each in given]
        for network in live:
            try:
                await self.ensure(network)
            except VmlabError as error:
                _LOG.warning("network %s cannot be made on this host: %s", network, error)
        if removed:
            _LOG.info("networks: removed %s", ", ".join(removed))
        return removed

    async def _instance(self, network: str, address: str) -> Instance | None:
        return await self._database.read(_instance, network, address)


# ------------------------------------------------------------------- what is asked of the store


def _network(s: Session, network: str) -> NetworkRow:
    row = s.get(NetworkRow, network)
    if row is None:
        raise ResourceNotFound(f"there is no network {network!r}")
    return row


def _wanted(s: Session, network: str, home: str) -> tuple[Layout, Sequence[Lease]]:
    """A network as the store has it: what the host needs for it, and who is on it."""
    return Layout.of(_network(s, network), home), addresses.leases(s, network)


def _note_foreign(s: Session, network: str, foreign: bool) -> None:
    row = s.get(NetworkRow, network)
    if row is not None:
        row.data = {**row.data, "foreign": foreign}


def _networks_of(s: Session, machine: str, *, served: bool = False) -> list[str]:
    """The networks that a machine is on.

    Args:
        s: The session.
        machine: Its id.
        served: Only those where somebody is to be told of it; on a simulated host nobody is.
    """
    found = select(NicRow.network_id).where(NicRow.machine_id == machine).distinct()
    if served:
        found = found.join(MachineRow, MachineRow.id == NicRow.machine_id).where(
            MachineRow.hypervisor != SIMULATED
        )
    return sorted(each for each in s.scalars(found) if each is not None)


def _all_networks(s: Session) -> tuple[frozenset[str], list[str]]:
    """The ids of all networks, and of those that live machines are on."""
    live = (
        select(NicRow.network_id)
        .join(MachineRow, MachineRow.id == NicRow.machine_id)
        .where(NicRow.network_id.is_not(None), MachineRow.state.in_(_LIVE))
        .distinct()
    )
    on = [each for each in s.scalars(live) if each is not None]
    return frozenset(s.scalars(select(NetworkRow.id))), sorted(on)


def _unreleased(s: Session) -> list[str]:
    """Machines at rest that have addresses, and nothing is being done with."""
    return list(
        s.scalars(
            select(AddressRow.machine_id)
            .join(MachineRow, MachineRow.id == AddressRow.machine_id)
            .where(MachineRow.state.not_in(_LIVE), MachineRow.operation_id.is_(None))
            .distinct()
        )
    )


def _identity(machine: MachineRow) -> Identity:
    told = machine.metadata_
    nics = []
    for nic in machine.nics:
        network = nic.network
        if network is None or network.mode == "user":
            if nic.mode != "none":
                nics.append(SeedNic(nic.name, nic.mac, dhcp=frozenset({4})))
            continue
        subnets = {subnet.version: subnet for subnet in subnets_of(network)}
        gateways = Layout.of(network, "").gateways if network.mode == "bridged" else ()
        # On a bridge that is the host's own nobody of ours answers.
        served = network.dhcp and not network.data.get("foreign")
        versions = [(each.address, 6 if ":" in each.address else 4) for each in nic.addresses]
        nics.append(
            SeedNic(
                nic.name,
                nic.mac,
                dhcp=frozenset(subnets if served else ()),
                addresses=tuple(
                    f"{address}/{subnets[version].prefixlen}"
                    for address, version in versions
                    if version in subnets
                ),
                gateways=tuple(each.partition("/")[0] for each in gateways),
                dns=tuple(network.dns),
            )
        )
    return Identity(
        instance=instance_id(machine.id, told.get("instance", 0)),
        hostname=addresses.host_name(machine),
        ssh_keys=tuple(told.get("ssh_keys") or ()),
        user_data=told.get("user_data"),
        nics=nics,
    )


def _instance(s: Session, network: str, address: str) -> Instance | None:
    found = addresses.machine_at(s, network, address)
    if found is None:
        return None
    machine, asked = found
    told = machine.metadata_
    others = [nic for nic in machine.nics if nic.id != asked.id]
    return Instance(
        id=instance_id(machine.id, told.get("instance", 0)),
        hostname=addresses.host_name(machine),
        image=machine.image or "none",
        kind=f"{machine.vcpus}x{machine.memory >> 20}m",
        host=machine.host,
        ssh_keys=tuple(told.get("ssh_keys") or ()),
        user_data=told.get("user_data"),
        nics=tuple(
            InstanceNic(
                nic.mac,
                tuple(each.address for each in nic.addresses),
                tuple(
                    str(ip_network(each)) for each in map(str, subnets_of(nic.network))
                ) if nic.network is not None else (),
            )
            for nic in (asked, *others)
        ),
    )  # fmt: skip

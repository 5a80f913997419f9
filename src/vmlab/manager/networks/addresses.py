"""Who has which address: taken and given back in the store, in the transaction of whoever asks.

That an address is somebody's once is the database's constraint; that it is the first free one is
found by `ipam`. Every taking and giving back is an event.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select

from vmlab.machine.errors import InvalidSpec, ResourceExhausted, SpecProblem
from vmlab.manager.networks import ipam
from vmlab.manager.networks.layout import Lease, network_pools
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.tables import AddressRow, MachineRow, NetworkRow, NicRow

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["check_request", "host_name", "leases", "machine_at", "release", "take"]

_HOST_NAME_LENGTH: Final = 63  # RFC 1035, 2.3.4


def host_name(machine: MachineRow) -> str:
    """What the guest of a machine is called: letters, digits and dashes (RFC 952, RFC 1123)."""
    name = machine.metadata_.get("hostname") or machine.name
    text = re.sub(r"[^A-Za-z0-9-]+", "-", str(name)).strip("-")[:_HOST_NAME_LENGTH].rstrip("-")
    return text or f"m-{machine.id[:12]}"


def _count(s: Session, network: str, version: int, first: int, last: int) -> int:
    """How many addresses of a network somebody has, from one number to another."""
    # As tables.AddressRow has them: the version, and 32 hexadecimal digits.
    low, high = f"{version}{first:032x}", f"{version}{last:032x}"
    where = AddressRow.network_id == network, AddressRow.number.between(low, high)
    return s.scalar(select(func.count()).select_from(AddressRow).where(*where)) or 0


def check_request(s: Session, network: NetworkRow, address: str) -> ipam.Address:
    """The address that somebody asks for by name, if it can be had.

    Raises:
        InvalidSpec: it is none of the network's, or nobody is given it.
        Conflict: somebody has it.
    """
    wanted = ipam.parse_address("nics.address", address)
    pools = {pool.subnet.version: pool for pool in network_pools(network)}
    pool = pools.get(wanted.version)
    refusal = pool.refusal(wanted) if pool else f"an address of the network {network.name!r}"
    if refusal is not None:
        raise InvalidSpec([SpecProblem("nics.address", address, refusal)], what="machine")
    holder = s.scalars(
        select(AddressRow).where(
            AddressRow.network_id == network.id, AddressRow.address == wanted.compressed
        )
    ).first()
    if holder is not None:
        whose = f"machine {holder.machine.name!r}" if holder.machine is not None else "nobody known"
        raise Conflict(
            f"the address {wanted} of the network {network.name!r} belongs to {whose}",
            hint="leave the address out to get the first free one",
        )
    return wanted


def take(s: Session, machine: MachineRow, *, operation: str | None = None) -> list[AddressRow]:
    """Have each NIC of a machine have an address of each subnet of its network.

    One that it has it keeps. What a NIC asks for by name it gets, or nothing is taken.

    Args:
        s: The session.
        machine: Whose NICs.
        operation: Id of the operation that does it.

    Returns:
        The addresses that were taken now.

    Raises:
        ResourceExhausted: all are taken.
        Conflict: what a NIC asks for is somebody else's.
    """
    made = []
    for nic in machine.nics:
        if nic.network_id is None:
            continue
        # Others that take of the same network wait: PostgreSQL has more than one writer.
        network = s.get(NetworkRow, nic.network_id, with_for_update=True)
        assert network is not None, "a NIC refers to it"
        had = s.scalars(select(AddressRow.address).where(AddressRow.nic_id == nic.id))
        versions = {ip_address(each).version for each in had}
        for pool in network_pools(network):
            if pool.subnet.version in versions:
                continue
            address = _choose(s, network, nic, pool)
            row = AddressRow(
                network_id=network.id,
                address=str(address),
                machine_id=machine.id,
                nic_id=nic.id,
                mac=nic.mac,
            )
            s.add(row)
            s.flush()
            made.append(row)
            _tell(s, "address.taken", network, row, machine=machine, operation=operation)
    return made


def _choose(s: Session, network: NetworkRow, nic: NicRow, pool: ipam.Pool) -> ipam.Address:
    wanted = nic.requested_address
    if wanted is not None and ip_address(wanted).version == pool.subnet.version:
        return check_request(s, network, wanted)
    address = pool.lowest_free(partial(_count, s, network.id, pool.subnet.version))
    if address is None:
        raise ResourceExhausted(
            f"the network {network.name!r} has no address left of {pool.size} in {pool.subnet}",
            hint="delete machines that are on it, or make a network with a larger subnet",
        )
    return address


def release(
    s: Session, machine: str, *, when: str | None = None, operation: str | None = None
) -> list[str]:
    """Give the addresses of a machine back; returns those that it had.

    Args:
        s: The session.
        machine: Its id; one that is no more has none.
        when: "stop" or "delete": only if its policy says that this is when; None is now.
        operation: Id of the operation that does it.
    """
    row = s.get(MachineRow, machine)
    if when is not None and row is not None:
        policy = row.policy.get("release_addresses", "delete")
        if when == "stop" and policy != "stop":
            return []
    released = []
    for address in s.scalars(select(AddressRow).where(AddressRow.machine_id == machine)).all():
        network = s.get_one(NetworkRow, address.network_id)
        _tell(s, "address.released", network, address, machine=row, operation=operation)
        released.append(address.address)
        s.delete(address)
    return released


def _tell(
    s: Session,
    kind: str,
    network: NetworkRow,
    address: AddressRow,
    *,
    machine: MachineRow | None,
    operation: str | None,
) -> None:
    add_event(
        s,
        kind,
        subject=network.id,
        name=network.name,
        operation=operation,
        data={
            "address": address.address,
            "machine": address.machine_id,
            "machine_name": machine.name if machine is not None else None,
            "mac": address.mac,
        },
    )


def leases(s: Session, network: str) -> Sequence[Lease]:
    """Who on a network is to be told which addresses, in the order of the MAC addresses."""
    rows = s.execute(
        select(AddressRow.mac, AddressRow.address, MachineRow)
        .join(MachineRow, MachineRow.id == AddressRow.machine_id)
        .where(AddressRow.network_id == network, AddressRow.mac.is_not(None))
        .order_by(AddressRow.mac, AddressRow.number)
    )
    told: dict[str, list[str]] = defaultdict(list)
    names: dict[str, str] = {}
    for mac, address, machine in rows:
        assert mac is not None, "the query has none without"
        told[mac].append(address)
        names[mac] = host_name(machine)
    return [Lease(mac, names[mac], tuple(addresses)) for mac, addresses in told.items()]


def machine_at(s: Session, network: str, address: str) -> tuple[MachineRow, NicRow] | None:
    """Who has an address of a network, by which of its NICs; None if nobody has."""
    row = s.scalars(
        select(AddressRow).where(
            AddressRow.network_id == network,
            AddressRow.address == ip_address(address).compressed,
        )
    ).first()
    if row is None or row.machine is None or row.nic is None:
        return None
    return row.machine, row.nic

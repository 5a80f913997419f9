"""Rows that tests put into a store: what does not matter is filled in."""

from __future__ import annotations

import itertools
from typing import Any

from sqlalchemy.orm import Session

from vmlab.manager.store.changes import add_event
from vmlab.manager.store.tables import DiskRow, HostRow, MachineRow, NetworkRow, NicRow

_numbers = itertools.count()


def add_host(s: Session, name: str = "simulated", **columns: Any) -> HostRow:
    """A host, if there is none of that name."""
    row = s.get(HostRow, name)
    if row is None:
        row = HostRow(name=name, hypervisor="simulated", **columns)
        s.add(row)
        s.flush()
    return row


def add_machine(s: Session, name: str, **columns: Any) -> MachineRow:
    """A machine of the simulator's, with its host and an event."""
    add_host(s, columns.get("host", "simulated"))
    row = MachineRow(
        **{
            "name": name,
            "host": "simulated",
            "hypervisor": "simulated",
            "architecture": "x86_64",
            "vcpus": 1,
            "memory": 256 << 20,
            "spec": {"name": name},
            **columns,
        }
    )
    s.add(row)
    s.flush()
    add_event(s, "machine.created", subject=row.id, name=name)
    return row


def add_nic(s: Session, machine: MachineRow, network: NetworkRow | None = None) -> NicRow:
    """A NIC of a machine's, on that network or on none."""
    number = next(_numbers)
    row = NicRow(
        machine=machine,
        position=len(machine.nics),
        name=f"net{len(machine.nics)}",
        mode="network" if network is not None else "user",
        network=network,
        mac=f"52:54:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
    )
    s.add(row)
    s.flush()
    return row


def add_network(s: Session, name: str, **columns: Any) -> NetworkRow:
    """An isolated network."""
    row = NetworkRow(**{"name": name, "mode": "isolated", **columns})
    s.add(row)
    s.flush()
    return row


def add_disk(s: Session, name: str, **columns: Any) -> DiskRow:
    """A disk that nothing has."""
    row = DiskRow(**{"name": name, "size": 1 << 20, "state": "available", **columns})
    s.add(row)
    s.flush()
    return row

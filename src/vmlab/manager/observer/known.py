"""What the store says at one moment, as far as it can be compared with the world.

Plain frozen data: nothing here reads a database. `collect.store` fills it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from vmlab.machine.states import MachineState

__all__ = [
    "Known",
    "KnownAddress",
    "KnownDisk",
    "KnownMachine",
    "KnownNetwork",
    "KnownNic",
    "KnownReservation",
]


@dataclass(frozen=True, slots=True)
class KnownNic:
    """A network interface of a machine, by the store.

    `network` is the id of a network of the store's, None for a NIC on none of them.
    """

    id: str
    name: str
    network: str | None
    mac: str


@dataclass(frozen=True, slots=True)
class KnownMachine:
    """A machine, by the store.

    `at` is its name at the hypervisor of `host`; `answers` says whether its guest is one that can
    be talked to; `policies` are its own ones, by code.
    """

    id: str
    name: str
    host: str
    at: str
    state: MachineState
    wanted: Literal["running", "paused", "stopped"] = "stopped"
    started: datetime | None = None
    answers: bool = False
    simulated: bool = False
    releases: Literal["stop", "delete"] = "delete"
    nics: tuple[KnownNic, ...] = ()
    policies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KnownDisk:
    """A disk, by the store; `path` is where its file has to be, `size` what its guest has."""

    id: str
    name: str
    state: str
    size: int
    path: Path
    machine: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class KnownNetwork:
    """A network, by the store; `bridge` is what its machines are on at the host, "" if nothing."""

    id: str
    name: str
    mode: Literal["isolated", "user", "bridged"] = "isolated"
    bridge: str = ""
    vlan: int | None = None


@dataclass(frozen=True, slots=True)
class KnownAddress:
    """An address that is taken, by the store; `nic` is None for one that nobody has any more."""

    id: str
    network: str
    address: str
    nic: str | None = None
    machine: str | None = None
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class KnownReservation:
    """What an operation has set aside; `ended` when that operation has ended all the same."""

    id: str
    operation: str
    what: str
    ended: bool


@dataclass(frozen=True)
class Known:
    """The store at one moment.

    Attributes:
        event: Number of the newest event that it holds.
        busy: Ids of everything that an operation is under way on, or waits for.
        since: When the oldest operation began that is under way, if there is one, or shortly
            before: what is younger may be that operation's.
    """

    machines: tuple[KnownMachine, ...] = ()
    disks: tuple[KnownDisk, ...] = ()
    networks: tuple[KnownNetwork, ...] = ()
    addresses: tuple[KnownAddress, ...] = ()
    reservations: tuple[KnownReservation, ...] = ()
    hosts: frozenset[str] = frozenset()
    busy: frozenset[str] = frozenset()
    since: datetime | None = None
    event: int = 0

    @cached_property
    def machine(self) -> dict[str, KnownMachine]:
        """The machines by id."""
        return {machine.id: machine for machine in self.machines}

    @cached_property
    def placed(self) -> dict[tuple[str, str], KnownMachine]:
        """The machines by host and by their name there."""
        return {(machine.host, machine.at): machine for machine in self.machines}

    @cached_property
    def named(self) -> dict[str, KnownMachine]:
        """The machines by their name at their hypervisor."""
        return {machine.at: machine for machine in self.machines}

    @cached_property
    def disk_at(self) -> dict[Path, KnownDisk]:
        """The disks by the path of their file."""
        return {disk.path: disk for disk in self.disks}

    @cached_property
    def disks_of(self) -> dict[str, list[KnownDisk]]:
        """By machine, the disks that it has."""
        found: dict[str, list[KnownDisk]] = {}
        for disk in self.disks:
            if disk.machine is not None:
                found.setdefault(disk.machine, []).append(disk)
        return found

    @cached_property
    def network(self) -> dict[str, KnownNetwork]:
        """The networks by id."""
        return {network.id: network for network in self.networks}

    @cached_property
    def nic(self) -> dict[str, tuple[KnownMachine, KnownNic]]:
        """The NICs by id, each with its machine."""
        return {nic.id: (machine, nic) for machine in self.machines for nic in machine.nics}

"""What the world shows at one moment: hypervisors, processes, files, locks, leases, guests.

Plain frozen data: nothing here looks at anything. What was not looked at is not in `Seen.looked`,
so that nothing is called missing that nobody looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from vmlab.machine.states import MachineState

__all__ = [
    "Seen",
    "SeenDisk",
    "SeenFile",
    "SeenGuest",
    "SeenInterface",
    "SeenLease",
    "SeenLock",
    "SeenMachine",
    "SeenNic",
    "SeenProcess",
    "SeenVolume",
]


@dataclass(frozen=True, slots=True)
class SeenDisk:
    """A disk that a machine has; `path` is the file of the host that it writes to."""

    name: str
    size: int
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class SeenNic:
    """A network interface that a machine has.

    `tap` is the host's interface that is its other end, where it is on a bridge.
    """

    name: str
    network: str
    mac: str
    tap: str = ""


@dataclass(frozen=True, slots=True)
class SeenMachine:
    """A machine as its hypervisor tells of it.

    `id` is the hypervisor's, `at` its name there; `disks` and `nics` are None where the machine's
    parts were not looked at this time.
    """

    host: str
    id: str
    at: str
    state: MachineState
    reason: str = ""
    disks: tuple[SeenDisk, ...] | None = None
    nics: tuple[SeenNic, ...] | None = None


@dataclass(frozen=True, slots=True)
class SeenProcess:
    """A process that belongs to the store; `machine` is the hypervisor's id of its machine.

    `start` tells it from a later one of the same number; `began` is when that was.
    """

    pid: int
    start: int
    began: datetime
    argv: tuple[str, ...]
    machine: str | None = None
    network: str | None = None


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A file where the store's disks are; `disk` is the id in its name, if there is one.

    `size` is what a guest would see of it, None where it cannot be read; `changed` is when its
    name or contents changed last.
    """

    path: Path
    disk: str | None
    size: int | None
    changed: datetime
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SeenLock:
    """A lock file and who holds it; `holder` is None where nobody does.

    `machine` is the hypervisor's id of the machine that it guards, None for the manager's own.
    `named` is the process that the file says it is held by; `ours` whether the holder is this
    manager or one of its children.
    """

    path: Path
    machine: str | None
    holder: int | None
    named: int | None = None
    alive: bool = False
    ours: bool = False


@dataclass(frozen=True, slots=True)
class SeenLease:
    """An address that a guest has, as a DHCP server's leases or the neighbour table tell."""

    network: str
    address: str
    mac: str
    source: Literal["lease", "neighbour", "guest"] = "lease"


@dataclass(frozen=True, slots=True)
class SeenInterface:
    """A network interface of the host that says it is this home's, for the network of that id."""

    name: str
    kind: str
    network: str
    up: bool = True


@dataclass(frozen=True, slots=True)
class SeenGuest:
    """What a guest said when it was asked; `drift` is its clock's lead over its hypervisor's.

    Args:
        machine: Id of the store's.
        answered: Whether it did.
        problem: Why not.
        drift: Seconds, None where its clock was not read.
        uncertainty: Seconds that asking took: the drift may be off by as much.
    """

    machine: str
    answered: bool
    problem: str = ""
    drift: float | None = None
    uncertainty: float = 0.0


@dataclass(frozen=True, slots=True)
class SeenVolume:
    """A file system that the manager keeps things on, in bytes."""

    path: Path
    size: int
    free: int


@dataclass(frozen=True)
class Seen:
    """The world at one moment.

    Attributes:
        at: When the look began.
        looked: What was looked at: "host:NAME" (its list of machines and their states), "parts:ID"
            (disks and NICs of a machine of the store's), "processes", "files", "locks", "leases",
            "interfaces", "guest:ID", "volumes", "store".
        guests: The guests that were asked.
        interfaces: Those of the host that are the manager's, `every_interface` the names of all,
            `joined` the names of those on a bridge, each with its bridge's.
    """

    at: datetime
    looked: frozenset[str] = frozenset()
    machines: tuple[SeenMachine, ...] = ()
    processes: tuple[SeenProcess, ...] = ()
    files: tuple[SeenFile, ...] = ()
    locks: tuple[SeenLock, ...] = ()
    leases: tuple[SeenLease, ...] = ()
    interfaces: tuple[SeenInterface, ...] = ()
    every_interface: frozenset[str] = frozenset()
    joined: frozenset[tuple[str, str]] = frozenset()
    guests: tuple[SeenGuest, ...] = ()
    volumes: tuple[SeenVolume, ...] = ()

    @cached_property
    def placed(self) -> dict[tuple[str, str], SeenMachine]:
        """The machines by host and name there."""
        return {(machine.host, machine.at): machine for machine in self.machines}

    @cached_property
    def file(self) -> dict[Path, SeenFile]:
        """The files by path."""
        return {file.path: file for file in self.files}

    def hosts_looked_at(self, hosts: frozenset[str]) -> bool:
        """Whether all of those hosts were looked at."""
        return all(f"host:{host}" in self.looked for host in hosts)

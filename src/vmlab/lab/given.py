"""What machines of a lab are given beside an image: disks, places on networks, and identities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vmlab.lab.networks import Address, LabNetwork
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.sizes import parse_size
from vmlab.machine.spec import Disk

__all__ = ["LabDisk", "Plug", "as_disk", "hostname_of", "made_machine_id", "size_of"]


@dataclass(frozen=True, slots=True)
class LabDisk:
    """A disk to be given to machines: each has its own copy of what it starts from.

    Attributes:
        disk: What it is like; its name is taken if `named`, else that of its position.
        named: Whether somebody chose its name.
    """

    disk: Disk
    named: bool

    def at(self, name: str) -> Disk:
        """The disk as a specification has it, by that name unless it has one."""
        return self.disk if self.named else self.disk.model_copy(update={"name": name})


@dataclass(frozen=True, slots=True)
class Plug:
    """A NIC of a machine on a private network, and the address that it has there."""

    nic: str
    network: LabNetwork
    address: Address


def as_disk(disk: LabDisk | Disk | str, name: str) -> Disk:
    """A disk as a specification has it; `name` is its name unless it has one.

    Raises:
        InvalidSpec: a text is no size.
    """
    if isinstance(disk, LabDisk):
        return disk.at(name)
    if isinstance(disk, Disk):
        return disk
    return Disk(name=name, size=size_of("disks", disk), breakable=True)


def size_of(field: str, value: int | str) -> int:
    """Bytes of a size.

    Raises:
        InvalidSpec: it is none, naming the field.
    """
    try:
        return parse_size(value)
    except ValueError as error:
        raise InvalidSpec([SpecProblem(field, value, str(error))]) from None


def hostname_of(name: str) -> str:
    """A machine's name as a hostname: letters, digits, dashes and dots."""
    return name.replace("_", "-").strip("-.") or "vm"


def made_machine_id(seed: int, name: str, number: int) -> str:
    """An id of machine-id(5), out of a lab's seed: for its machine of that name and number."""
    return hashlib.sha256(f"{seed}/{name}/{number}/machine-id".encode()).hexdigest()[:32]

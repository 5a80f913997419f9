"""The commands by which an engine process is broken on purpose; QEMU has none like them.

A fault has a name, under which it is ended. Disks are called by their nodes, NICs by their devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmlab.engine.devices.occasions import Trigger
from vmlab.engine.devices.storage.faulty import DiskFault, FaultyDisk
from vmlab.engine.devices.virtio.wire_faults import WireFault, WireFaults
from vmlab.engine.monitor.commands import CommandError, Commands

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmlab.engine.machine import Machine


@dataclass(frozen=True)
class PowerLoss:
    """Of x-power-cut: a disk, and the bytes that it had not flushed."""

    node_name: str
    lost: int


def check(when: Trigger) -> None:
    """Refuse a trigger whose numbers make no sense.

    Raises:
        CommandError: one does not.
    """
    if when.nth < 0 or when.duration < 0 or not 0 <= when.probability <= 1 or when.seed < 0:
        raise CommandError(
            "Parameter 'fault.when' expects nth, duration and seed from 0, a probability to 1"
        )


def check_wire(fault: WireFault) -> None:
    """Refuse a fault of a wire whose numbers make no sense.

    Raises:
        CommandError: one does not.
    """
    if not 0 <= fault.ratio <= 1 or fault.delay < 0 or fault.jitter < 0:
        raise CommandError("Parameter 'fault' expects a ratio to 1, delay and jitter from 0")
    check(fault.when)


class DiskFaultCommands:
    """Those of disks, for whoever serves some.

    Args:
        commands: Where they are added.
        disks: The disks by the names of their nodes.
    """

    def __init__(self, commands: Commands, disks: Callable[[], Mapping[str, FaultyDisk]]) -> None:
        self._disks = disks
        commands.add("x-disk-fault", self.disk_fault)
        commands.add("x-disk-corrupt", self.disk_corrupt)

    def disk_fault(self, id_: str, node_name: str, fault: DiskFault) -> None:
        """Have requests to a disk struck, until the fault is ended by its id."""
        if fault.errno <= 0 or fault.delay < 0 or fault.keep < 0:
            raise CommandError("Parameter 'fault' expects an errno, and a delay and keep from 0")
        check(fault.when)
        self._disk(node_name).add(id_, fault)

    def disk_corrupt(self, node_name: str, offset: int, length: int) -> None:
        """Invert bytes of a disk."""
        if offset < 0 or length < 1:
            raise CommandError("Parameters 'offset' and 'length' expect a range of the disk")
        try:
            self._disk(node_name).corrupt(offset, length)
        except OSError as error:
            raise CommandError(f"The disk cannot be written to: {error.strerror}") from error

    def fault_end(self, id_: str) -> None:
        """End a fault of any disk's; one that has ended is none."""
        for disk in self._disks().values():
            disk.remove(id_)

    def lose_power(self) -> list[PowerLoss]:
        """Have all disks lose what was not flushed."""
        lost = []
        for name, disk in self._disks().items():
            pages = disk.unflushed()
            try:
                disk.lose_power()
            except OSError as error:
                raise CommandError(f"{name} cannot be written to: {error.strerror}") from error
            lost.append(PowerLoss(name, pages * 4096))
        return lost

    def _disk(self, node_name: str) -> FaultyDisk:
        disk = self._disks().get(node_name)
        if disk is None:
            raise CommandError(f"Failed to find node with node-name='{node_name}'")
        return disk


class FaultCommands:
    """All of a machine's.

    Args:
        machine: Which.
        commands: Where they are added.
    """

    def __init__(self, machine: Machine, commands: Commands) -> None:
        self._machine = machine
        self._disks = DiskFaultCommands(commands, lambda: machine.faulty_disks)
        commands.add("x-net-fault", self.net_fault)
        commands.add("x-hart-stall", self.hart_stall)
        commands.add("x-fault-end", self.fault_end)
        commands.add("x-power-cut", self.power_cut)

    def net_fault(self, id_: str, name: str, fault: WireFault) -> None:
        """Have frames of a NIC struck, until the fault is ended by its id."""
        nic = self._machine.nics.get(name)
        if nic is None:
            raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
        check_wire(fault)
        if nic.faults is None:
            nic.faults = WireFaults(self._machine.clock)
        nic.faults.add(id_, fault)

    def hart_stall(self, hart: int, on: bool) -> None:
        """Have a hart stand still while the others run, or let it run again."""
        machine = self._machine
        if not 0 <= hart < len(machine.harts):
            raise CommandError(f"Parameter 'hart' expects a number below {len(machine.harts)}")
        # Devices need not stand for that.
        machine.harts.pause()
        machine.harts.stall(hart, on)
        if machine.running:
            machine.harts.resume()

    def fault_end(self, id_: str) -> None:
        """End a fault of a disk's or a NIC's; one that has ended is none."""
        self._disks.fault_end(id_)
        for nic in self._machine.nics.values():
            if nic.faults is not None:
                nic.faults.remove(id_)

    def power_cut(self) -> list[PowerLoss]:
        """Have the machine stand, and its disks lose what was not flushed; it never runs again."""
        self._machine.harts.pause()
        return self._disks.lose_power()

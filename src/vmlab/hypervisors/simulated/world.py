"""The simulated host: the machines that stand in it, its wires, ports and limits.

It outlives the hypervisor that looks after the machines: when that crashes, they run on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vmlab.hypervisors.simulated.chances import Chances
from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.hardware import Hardware
from vmlab.hypervisors.simulated.network import Ports, SimulatedNic
from vmlab.hypervisors.simulated.sparse import InPlace
from vmlab.machine.capabilities import Limits
from vmlab.machine.errors import InvalidSpec, OperationFailed, ResourceExhausted, SpecProblem
from vmlab.machine.sizes import format_size
from vmlab.machine.spec import Disk, MachineSpec, Nic

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.faults import FaultBox

Notice = Callable[[Hardware, str, str], None]


class World:
    """A simulated host.

    Args:
        now: Its clock, in seconds.
        chances: Source of all that is random in it.
        limits: Of the host, over-subscription included.
    """

    def __init__(self, now: Callable[[], float], chances: Chances, limits: Limits) -> None:
        self.now = now
        self.chances = chances
        self.limits = limits
        self.machines: dict[str, Hardware] = {}
        self.ports = Ports(limits.ports)
        self.faults: FaultBox
        self.on_notice: Notice | None = None
        self.on_change: Callable[[Hardware], None] | None = None

    def powered(self) -> Iterator[Hardware]:
        """The machines that are on."""
        return (machine for machine in self.machines.values() if machine.has_power)

    def notice(self, hardware: Hardware, event: str, reason: str) -> None:
        """Something happened to a machine by itself: tell who looks after it, if anybody does."""
        self.changed(hardware)
        if self.on_notice is not None and hardware.id in self.machines:
            self.on_notice(hardware, event, reason)

    def changed(self, hardware: Hardware) -> None:
        """Something that a journal would want to know has changed."""
        if self.on_change is not None:
            self.on_change(hardware)

    def printed(self, hardware: Hardware, text: str) -> None:
        """A guest printed something."""
        self.faults.printed(hardware, text)

    # Building and removing.

    def build(self, id_: str, spec: MachineSpec, *, copy: bool = False) -> Hardware:
        """Put a machine into the host, off. A `copy` takes any port where its own is in use.

        Raises:
            ResourceExhausted: the host is full, or out of ports or disk space.
            InvalidSpec: a disk's source cannot be used.
        """
        limit = self.limits.machines
        if limit is not None and len(self.machines) >= limit:
            raise ResourceExhausted(
                f"the host has {len(self.machines)} machines, and {limit} is the most",
                hint="delete machines that are not needed",
                machine=spec.name,
                operation="create",
            )
        hardware = Hardware(self, id_, spec)
        for position, disk in enumerate(spec.disks):
            if disk.name in hardware.disks:
                problem = SpecProblem(f"disks.{position}.name", disk.name, "used twice")
                raise InvalidSpec([problem])
            hardware.disks[disk.name] = SimulatedDisk.of(disk, f"disks.{position}")
        self.require_disk_space(spec.name, sum(disk.size for disk in hardware.disks.values()))
        try:
            for nic in spec.nics:
                hardware.nics[nic.name] = self.build_nic(hardware, nic, copy=copy)
        except BaseException:
            self._free_ports(hardware)
            raise
        self.machines[id_] = hardware
        return hardware

    def build_nic(self, hardware: Hardware, nic: Nic, *, copy: bool = False) -> SimulatedNic:
        """A NIC for a machine, with an address and its ports of the host.

        Raises:
            ResourceExhausted: no port is left, or one is in use.
        """
        built = SimulatedNic(nic.name, nic.network, nic.mac or self._mac(hardware, nic.name))
        try:
            for forward in nic.forwards:
                port = self.ports.take(forward.protocol, forward.host, hardware.name, or_any=copy)
                built.forwards.append((forward.protocol, port, forward.guest))
        except ResourceExhausted:
            self.free_nic(built)
            raise
        return built

    def free_nic(self, nic: SimulatedNic) -> None:
        """Give back what a NIC holds of the host."""
        for protocol, port, _guest in nic.forwards:
            self.ports.free(protocol, port)

    def build_disk(self, hardware: Hardware, disk: Disk) -> SimulatedDisk:
        """A disk for a machine.

        Raises:
            ResourceExhausted: the host has no room for it.
            InvalidSpec: its source cannot be used.
        """
        built = SimulatedDisk.of(disk, "disk")
        self.require_disk_space(hardware.name, built.size)
        return built

    def rebuild_like(self, hardware: Hardware, spec: MachineSpec) -> None:
        """Plug and unplug until a machine is built as `spec` says; what stays is kept as it is.

        Raises:
            ResourceExhausted: the host has no room for what has to be added.
            InvalidSpec: a disk's source cannot be used.
        """
        for gone in [name for name in hardware.nics if spec.nic(name) is None]:
            self.free_nic(hardware.nics.pop(gone))
        for nic in spec.nics:
            if nic.name not in hardware.nics:
                hardware.nics[nic.name] = self.build_nic(hardware, nic, copy=True)
        for name, held in hardware.disks.items():
            if spec.disk(name) is None:
                held.flush_quietly()
        hardware.disks = {
            disk.name: hardware.disks.get(disk.name) or self.build_disk(hardware, disk)
            for disk in spec.disks
        }
        hardware.vcpus = spec.cpus.count
        hardware.pinning = dict(spec.cpus.pinning)
        if hardware.ram.size != spec.memory.size:
            hardware.ram = hardware.ram.resized(spec.memory.size)

    def remove(self, id_: str) -> None:
        """Take a machine out of the host; one that is not there is no error."""
        hardware = self.machines.pop(id_, None)
        if hardware is not None:
            self._free_ports(hardware)
            hardware.retire()
            self.faults.machine_gone(hardware)
            self.changed(hardware)

    def _free_ports(self, hardware: Hardware) -> None:
        for nic in hardware.nics.values():
            self.free_nic(nic)

    def _mac(self, hardware: Hardware, nic: str) -> str:
        """A MAC address from the machine's seed and name that no other NIC of the host has."""
        taken = {other.mac for machine in self.machines.values() for other in machine.nics.values()}
        taken |= {other.mac for other in hardware.nics.values()}
        for attempt in range(1 << 24):
            tail = Chances(hardware.seed).raw(3, "mac", hardware.name, nic, attempt)
            mac = "52:54:00:" + ":".join(f"{byte:02x}" for byte in tail)
            if mac not in taken:
                return mac
        raise ResourceExhausted("no MAC address is left", machine=hardware.name)

    # Limits of the host.

    def require_disk_space(self, machine: str, more: int) -> None:
        """Refuse `more` bytes of disks where the host has no room (ResourceExhausted)."""
        limit = self.limits.disk_space
        if limit is None or not more:
            return
        used = sum(disk.size for other in self.machines.values() for disk in other.disks.values())
        _require(machine, "disk space", used, more, limit, size=True)

    def require_file(self, hardware: Hardware, *disks: SimulatedDisk) -> None:
        """Refuse files that another live machine of the host writes to (OperationFailed)."""
        wanted = {disk.stable.path for disk in disks if isinstance(disk.stable, InPlace)}
        for other in self.machines.values():
            if not wanted or other is hardware or not other.has_power:
                continue
            for disk in other.disks.values():
                held = disk.stable.path if isinstance(disk.stable, InPlace) else None
                if held in wanted and not disk.readonly:
                    raise OperationFailed(
                        f"the file {held} is in use: machine {other.name!r} writes to it",
                        hint="unplug it there first, or stop that machine",
                        machine=hardware.name,
                    )

    def require_power(self, hardware: Hardware, vcpus: int, memory: int) -> None:
        """Refuse vCPUs and bytes of memory that live machines leave no room for.

        Raises:
            ResourceExhausted: naming which, how much is used, and the limit.
        """
        for what, more, limit, size in (
            ("vCPUs", vcpus, self.limits.vcpus, False),
            ("memory", memory, self.limits.memory, True),
        ):
            if limit is not None and more > 0:
                used = sum(
                    other.ram.size if size else other.vcpus
                    for other in self.machines.values()
                    if other.has_power
                )
                _require(hardware.name, what, used, more, limit, size=size)


def _require(machine: str, what: str, used: int, more: int, limit: int, *, size: bool) -> None:
    if used + more <= limit:
        return
    show = format_size if size else str
    raise ResourceExhausted(
        f"{what}: {show(used)} of {show(limit)} are in use, and {show(more)} are asked for",
        hint="stop or delete machines, or ask for less",
        machine=machine,
    )

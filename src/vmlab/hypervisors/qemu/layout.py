"""Which disk and NIC sits where in a machine: the same in every QEMU process of the machine.

A clone, a restored machine and a migrated one have to have their devices at the same places as
the one whose state they take over, whatever was plugged and unplugged before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from vmlab.hypervisors.monitored.names import disk_device, made_mac, nic_device
from vmlab.hypervisors.qemu.boards import SPARE_PORTS, Board
from vmlab.machine.errors import ResourceExhausted
from vmlab.machine.spec import Disk, MachineSpec

_SCSI_TARGETS = 255
"""Targets of a virtio-scsi controller (VIRTIO_SCSI_MAX_TARGET in QEMU's virtio-scsi.h)."""
_PORTS = 8 * 14
"""Root ports that fit on the board: 14 of the 32 slots, with 8 functions each."""


def vcpu_device(number: int) -> str:
    """The id of a vCPU that came while the machine ran, by its number."""
    return f"vcpu-{number}"


def memory_object(number: int) -> str:
    """The id of a memory object: first those of the NUMA nodes, then those of modules."""
    return f"ram{number}"


def dimm_device(number: int) -> str:
    """The id of the memory module with the memory object of that number."""
    return f"dimm-{number}"


def effective_bus(disk: Disk, board: Board, *, live: bool) -> str:
    """The bus that a disk gets: virtio-scsi where a disk plugged in live needs it."""
    return "scsi" if live and board.hotplug == "scsi" else disk.bus


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the devices are.

    Attributes:
        ports: Number of root ports.
        places: Device id -> root port, place on the PCI bus, or SCSI target.
        buses: Disk -> "virtio" or "scsi".
        macs: NIC -> MAC address.
        modules: Bytes of each memory module that came while it ran.
        vcpus: The devices of the vCPUs that came while it ran, as `device_add` took them.
        virtiofs: Tags of the shares that the guest gets by virtiofs.
    """

    ports: int = 0
    places: dict[str, int] = field(default_factory=dict)
    buses: dict[str, str] = field(default_factory=dict)
    macs: dict[str, str] = field(default_factory=dict)
    modules: tuple[int, ...] = ()
    vcpus: tuple[dict[str, Any], ...] = ()
    virtiofs: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: MachineSpec, board: Board, virtiofs: Iterable[str] = ()) -> Self:
        """The layout of a machine that starts for the first time.

        Args:
            spec: The machine.
            board: Its machine type.
            virtiofs: Tags of the shares that the guest gets by virtiofs.
        """
        devices = len(spec.disks) + len(spec.nics)
        ports = devices + SPARE_PORTS if board.hotplug == "port" else 0
        layout = cls(ports=ports, virtiofs=tuple(virtiofs))
        for disk in spec.disks:
            layout = layout.with_disk(disk.name, disk.bus)
        for nic in spec.nics:
            layout = layout.with_nic(nic.name, nic.mac or made_mac(spec, nic.name))
        return layout

    def with_disk(self, disk: str, bus: str) -> Self:
        """The layout with one disk more, at the first place that is free.

        Raises:
            ResourceExhausted: none is.
        """
        device = disk_device(disk)
        place = self._free(bus == "scsi")
        return replace(
            self,
            places={**self.places, device: place},
            buses={**self.buses, disk: bus},
        )

    def with_nic(self, nic: str, mac: str) -> Self:
        """The layout with one NIC more.

        Raises:
            ResourceExhausted: no place is free.
        """
        place = self._free(scsi=False)
        return replace(
            self,
            places={**self.places, nic_device(nic): place},
            macs={**self.macs, nic: mac},
        )

    def without(self, device: str) -> Self:
        """The layout without the device of that id."""
        return replace(
            self,
            places={key: place for key, place in self.places.items() if key != device},
            buses={key: bus for key, bus in self.buses.items() if disk_device(key) != device},
            macs={key: mac for key, mac in self.macs.items() if nic_device(key) != device},
        )

    def with_macs(self, macs: dict[str, str]) -> Self:
        """The layout with other MAC addresses."""
        return replace(self, macs=macs)

    def with_module(self, size: int) -> Self:
        """The layout with one memory module more."""
        return replace(self, modules=(*self.modules, size))

    def with_vcpus(self, vcpus: Iterable[dict[str, Any]]) -> Self:
        """The layout with other vCPUs that came while it ran."""
        return replace(self, vcpus=tuple(vcpus))

    def _free(self, scsi: bool) -> int:
        on_scsi = {disk_device(disk) for disk, bus in self.buses.items() if bus == "scsi"}
        taken = {place for device, place in self.places.items() if (device in on_scsi) == scsi}
        limit = _SCSI_TARGETS if scsi else self.ports or _PORTS
        for place in range(limit):
            if place not in taken:
                return place
        raise ResourceExhausted(
            f"all {limit} places for {'SCSI' if scsi else 'PCI'} devices are taken",
            hint="unplug a disk or a NIC first, or restart the machine with those that it needs",
        )

    def to_record(self) -> dict[str, Any]:
        """The layout as JSON-ready data."""
        return {
            "ports": self.ports,
            "places": self.places,
            "buses": self.buses,
            "macs": self.macs,
            "modules": self.modules,
            "vcpus": self.vcpus,
            "virtiofs": self.virtiofs,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The layout that `to_record` described."""
        return cls(
            record["ports"],
            record["places"],
            record["buses"],
            record["macs"],
            # Records of earlier versions have none.
            tuple(record.get("modules", ())),
            tuple(record.get("vcpus", ())),
            tuple(record.get("virtiofs", ())),
        )

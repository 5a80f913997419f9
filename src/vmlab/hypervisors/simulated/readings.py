"""What a hypervisor reads off the hardware of a machine: its state, parts, use and snapshots."""

from __future__ import annotations

from typing import Final

from vmlab.hypervisors.base import DiskInfo, MachineInfo, NicInfo, NodeInfo, Snapshot
from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.hardware import Hardware, Power
from vmlab.hypervisors.simulated.network import SimulatedNic
from vmlab.hypervisors.simulated.saved import SavedState
from vmlab.hypervisors.simulated.sparse import InPlace
from vmlab.machine.metrics import (
    CpuMetrics,
    DiskMetrics,
    MachineMetrics,
    MemoryMetrics,
    NicMetrics,
)
from vmlab.machine.sizes import MIB
from vmlab.machine.states import MachineState

SEEN: Final = {
    Power.OFF: MachineState.STOPPED,
    Power.RUNNING: MachineState.RUNNING,
    Power.PAUSED: MachineState.PAUSED,
    Power.DEAD: MachineState.FAILED,
}


def state_of(hardware: Hardware) -> MachineState:
    """What a machine is, by its hardware alone: created, as long as nothing was done with it."""
    if hardware.power is Power.OFF and hardware.boots == 0 and not hardware.restored:
        return MachineState.CREATED
    return SEEN[hardware.power]


_OVERHEAD: Final = 2 * MIB
"""Bytes of the host's memory that a machine takes beside its guest's."""


def info_of(hardware: Hardware, *, owner: str, extra: dict[str, str]) -> MachineInfo:
    """What the hardware is made of."""
    return MachineInfo(
        id=hardware.id,
        name=hardware.name,
        architecture=hardware.architecture,
        vcpus=hardware.vcpus,
        memory=hardware.ram.size,
        disks=tuple(map(disk_info, hardware.disks.values())),
        nics=tuple(map(nic_info, hardware.nics.values())),
        nodes=tuple(NodeInfo(memory=memory, cpus=cpus) for memory, cpus in hardware.nodes),
        pinning=dict(hardware.pinning),
        consoles=tuple(hardware.consoles),
        channels=hardware.channels,
        accelerator="simulated",
        owner=owner,
        extra={"boots": str(hardware.boots), **extra},
    )


def metrics_of(hardware: Hardware) -> MachineMetrics:
    """What the hardware uses."""
    per_vcpu = tuple(hardware.vcpu_seconds(vcpu) for vcpu in range(hardware.vcpus))
    now = hardware.now()
    return MachineMetrics(
        time=now,
        uptime_seconds=max(0.0, now - hardware.booted_at),
        cpu=CpuMetrics(seconds=sum(per_vcpu), per_vcpu_seconds=per_vcpu, instructions=None),
        memory=MemoryMetrics(
            total_bytes=hardware.ram.size,
            resident_bytes=hardware.ram.allocated + _OVERHEAD,
            balloon_bytes=hardware.visible_memory,
        ),
        disks=tuple(map(_disk_metrics, hardware.disks.values())),
        nics=tuple(map(_nic_metrics, hardware.nics.values())),
    )


def disk_info(disk: SimulatedDisk) -> DiskInfo:
    """A disk as the hypervisor has it."""
    path = disk.stable.path if isinstance(disk.stable, InPlace) else None
    return DiskInfo(name=disk.name, size=disk.size, bus=disk.bus, readonly=disk.readonly, path=path)


def nic_info(nic: SimulatedNic) -> NicInfo:
    """A NIC as it is."""
    return NicInfo(
        name=nic.name,
        network=nic.network,
        mac=nic.mac,
        link=nic.link,
        forwards=tuple(nic.forwards),
    )


def _disk_metrics(disk: SimulatedDisk) -> DiskMetrics:
    return DiskMetrics(
        name=disk.name,
        read_bytes=disk.read_bytes,
        written_bytes=disk.written_bytes,
        reads=disk.reads,
        writes=disk.writes,
        flushes=disk.flushes,
        errors=disk.errors,
    )


def _nic_metrics(nic: SimulatedNic) -> NicMetrics:
    return NicMetrics(
        name=nic.name,
        received_bytes=nic.received_bytes,
        sent_bytes=nic.sent_bytes,
        received_packets=nic.received_packets,
        sent_packets=nic.sent_packets,
        dropped_packets=nic.dropped_packets,
    )


def snapshot_of(saved: SavedState) -> Snapshot:
    """A saved state as the contract describes it."""
    return Snapshot(
        name=saved.name,
        machine=saved.machine,
        spec=saved.spec,
        state=saved.state,
        memory=saved.memory is not None,
        time=saved.time,
        size=saved.size,
        digest=saved.digest,
    )

"""What a hypervisor can do, as it declares it and as the conformance suite makes it prove.

A capability is named here once; a back end's `capabilities()` returns the set of those that work
on this host now. Whatever needs one that is missing raises UnsupportedOperation with its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import UnsupportedOperation
from vmlab.machine.faults import FaultKind
from vmlab.machine.sizes import Size


class Capability(StrEnum):
    """One thing that a hypervisor may or may not be able to do; DESCRIPTIONS says what each is."""

    PAUSE = "pause"
    RESUME = "resume"
    SNAPSHOT = "snapshot"
    MEMORY_SNAPSHOT = "memory-snapshot"
    RESTORE = "restore"
    FORK = "fork"
    COLD_MIGRATION = "cold-migration"
    LIVE_MIGRATION = "live-migration"
    HOTPLUG_DISK = "hotplug-disk"
    HOTPLUG_NIC = "hotplug-nic"
    HOTPLUG_VCPU = "hotplug-vcpu"
    HOTPLUG_MEMORY = "hotplug-memory"
    RESIZE = "resize"
    RESIZE_DISK = "resize-disk"
    DISK_IN_PLACE = "disk-in-place"
    PINNING = "pinning"
    NUMA = "numa"
    CONSOLE = "console"
    GUEST_CHANNELS = "guest-channels"
    DISPLAY = "display"
    SHARE_9P = "share-9p"
    SHARE_VIRTIOFS = "share-virtiofs"
    SHARE_COPY = "share-copy"
    GPU_PASSTHROUGH = "gpu-passthrough"
    SRIOV_PASSTHROUGH = "sriov-passthrough"
    DETERMINISTIC = "deterministic"
    FAULTS = "faults"


DESCRIPTIONS: dict[Capability, str] = {
    Capability.PAUSE: "stop a running guest's vCPUs; nothing in it advances",
    Capability.RESUME: "let a paused guest run on where it was",
    Capability.SNAPSHOT: "save the contents of all disks under a name",
    Capability.MEMORY_SNAPSHOT: "save memory and vCPU state with the disks of a running guest",
    Capability.RESTORE: "bring a snapshot back, in the same machine and in a fresh one",
    Capability.FORK: "make an independent copy of a running machine",
    Capability.COLD_MIGRATION: "move a machine at rest to another hypervisor of the same kind",
    Capability.LIVE_MIGRATION: "move a running machine, its memory included, while it runs",
    Capability.HOTPLUG_DISK: "add and remove disks of a running machine",
    Capability.HOTPLUG_NIC: "add and remove network interfaces of a running machine",
    Capability.HOTPLUG_VCPU: "add vCPUs to a running machine; whether they go again is up to it",
    Capability.HOTPLUG_MEMORY: "change the memory of a running machine",
    Capability.RESIZE: "change vCPUs and memory of a machine at rest",
    Capability.RESIZE_DISK: "grow a disk",
    Capability.DISK_IN_PLACE: "use an image where it is, and keep it when its disk goes",
    Capability.PINNING: "bind vCPUs to CPUs of the host",
    Capability.NUMA: "show the guest several NUMA nodes",
    Capability.CONSOLE: "a serial console that can be read and written",
    Capability.GUEST_CHANNELS: "byte channels between host and guest beside the console",
    Capability.DISPLAY: "a display that can be looked at, and a keyboard beside it",
    Capability.SHARE_9P: "share a directory of the host by 9P2000.L",
    Capability.SHARE_VIRTIOFS: "share a directory of the host by virtiofs",
    Capability.SHARE_COPY: "copy a directory of the host into the guest at start",
    Capability.GPU_PASSTHROUGH: "give a GPU of the host to a guest",
    Capability.SRIOV_PASSTHROUGH: "give a virtual function of a host's device to a guest",
    Capability.DETERMINISTIC: "the same seed gives the same run",
    Capability.FAULTS: "inject the faults listed under `faults`",
}


class Limits(BaseModel):
    """The most that a hypervisor allows; None is no limit of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machines: int | None = Field(None, ge=1, description="machines at the same time")
    vcpus_per_machine: int | None = Field(None, ge=1, description="vCPUs of one machine")
    vcpus: int | None = Field(None, ge=1, description="vCPUs of all live machines together")
    memory_per_machine: Size | None = Field(None, description="memory of one machine")
    memory: Size | None = Field(None, description="memory of all live machines together")
    disks_per_machine: int | None = Field(None, ge=0, description="disks of one machine")
    disk_size: Size | None = Field(None, description="size of one disk")
    disk_space: Size | None = Field(None, description="size of all disks together")
    nics_per_machine: int | None = Field(None, ge=0, description="NICs of one machine")
    ports: int | None = Field(None, ge=0, description="ports of the host for forwards and displays")


class Capabilities(BaseModel):
    """What one hypervisor can do on this host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hypervisor: str = Field(description="name of the hypervisor")
    version: str = Field("", description="version of the hypervisor")
    supported: frozenset[Capability] = Field(description="what works")
    unsupported: dict[Capability, str] = Field(
        default_factory=dict, description="what does not work on this host, and why, where known"
    )
    architectures: frozenset[Architecture] = Field(description="guests that it can run")
    accelerators: tuple[str, ...] = Field((), description="accelerators, the preferred one first")
    faults: frozenset[FaultKind] = Field(frozenset(), description="faults that can be injected")
    counted: frozenset[FaultKind] = Field(
        frozenset(), description="those of them that can strike at the nth occasion or by chance"
    )
    breakable: frozenset[FaultKind] = Field(
        frozenset(),
        description="those of them that strike only disks which are `breakable`; where there are "
        "some, the occasions of the others are counted there only",
    )
    limits: Limits = Field(default_factory=Limits)

    def __contains__(self, capability: Capability) -> bool:
        return capability in self.supported

    def require(
        self, *needed: Capability, machine: str | None = None, operation: str | None = None
    ) -> None:
        """Refuse unless all of `needed` are supported.

        Raises:
            UnsupportedOperation: naming the first missing capability and the hypervisor.
        """
        for capability in needed:
            if capability not in self.supported:
                why = self.unsupported.get(capability)
                raise UnsupportedOperation(
                    capability.value,
                    hypervisor=self.hypervisor,
                    machine=machine,
                    operation=operation,
                    hint=f"why not: {why}" if why else None,
                )

    def without(self, *capabilities: Capability) -> Capabilities:
        """The same capabilities less the given ones."""
        return self.model_copy(update={"supported": self.supported - set(capabilities)})


def sorted_names(capabilities: Iterable[Capability]) -> list[str]:
    """The names of `capabilities` in the order in which they are declared here."""
    chosen = set(capabilities)
    return [capability.value for capability in Capability if capability in chosen]

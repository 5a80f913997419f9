"""Whether a hypervisor can make the machine that a specification asks for.

Asked before anything is created, so that a refusal leaves nothing behind. What the specification
has wrong for this hypervisor is an InvalidSpec, a missing capability an UnsupportedOperation, a
limit ResourceExhausted; within each kind everything is found at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmlab.machine.capabilities import Capabilities, Capability, Limits
from vmlab.machine.errors import (
    InvalidSpec,
    ResourceExhausted,
    SpecProblem,
    UnsupportedOperation,
)
from vmlab.machine.sizes import format_size
from vmlab.machine.spec import DEFAULT_CHANNELS, DEFAULT_CONSOLES, MachineSpec, ShareKind

_SHARES = {
    ShareKind.P9: Capability.SHARE_9P,
    ShareKind.VIRTIOFS: Capability.SHARE_VIRTIOFS,
    ShareKind.COPY: Capability.SHARE_COPY,
}
_DEVICES = {"gpu": Capability.GPU_PASSTHROUGH, "sriov": Capability.SRIOV_PASSTHROUGH}


def needed_capabilities(spec: MachineSpec) -> list[tuple[str, Capability]]:
    """The capabilities that `spec` cannot do without, each with the field that asks for it.

    The console and the channel that every machine has unless it says otherwise ask for nothing: a
    hypervisor without them leaves them out.
    """
    needed: list[tuple[str, Capability]] = []
    if spec.cpus.pinning:
        needed.append(("cpus.pinning", Capability.PINNING))
    nodes = spec.memory.nodes
    if len(nodes) > 1 or any(node.host_node is not None for node in nodes):
        needed.append(("memory.nodes", Capability.NUMA))
    if spec.cpus.maximum is not None and spec.cpus.maximum > spec.cpus.count:
        needed.append(("cpus.maximum", Capability.HOTPLUG_VCPU))
    if spec.memory.maximum is not None and spec.memory.maximum > spec.memory.size:
        needed.append(("memory.maximum", Capability.HOTPLUG_MEMORY))
    for position, disk in enumerate(spec.disks):
        if disk.file is not None:
            needed.append((f"disks.{position}.file", Capability.DISK_IN_PLACE))
    for position, share in enumerate(spec.shares):
        if share.kind is not ShareKind.AUTO:
            needed.append((f"shares.{position}.kind", _SHARES[share.kind]))
    if spec.consoles not in ((), DEFAULT_CONSOLES):
        needed.append(("consoles", Capability.CONSOLE))
    if spec.channels not in ((), DEFAULT_CHANNELS):
        needed.append(("channels", Capability.GUEST_CHANNELS))
    if spec.display:
        needed.append(("display", Capability.DISPLAY))
    for position, device in enumerate(spec.host_devices):
        needed.append((f"host_devices.{position}", _DEVICES[device.kind]))
    if spec.deterministic:
        needed.append(("deterministic", Capability.DETERMINISTIC))
    return needed


def _missing(spec: MachineSpec, capabilities: Capabilities) -> Iterator[tuple[str, Capability]]:
    """The capabilities that `spec` needs and the hypervisor lacks, with the fields that ask."""
    for field, capability in needed_capabilities(spec):
        if capability not in capabilities:
            yield field, capability
    if any(capability in capabilities for capability in _SHARES.values()):
        return
    for position, share in enumerate(spec.shares):
        if share.kind is ShareKind.AUTO:
            yield f"shares.{position}", Capability.SHARE_9P


def _problems(spec: MachineSpec, capabilities: Capabilities) -> Iterator[SpecProblem]:
    """What this hypervisor does not know about: its architecture or accelerator."""
    if spec.architecture not in capabilities.architectures:
        known = ", ".join(sorted(capabilities.architectures)) or "none on this host"
        yield SpecProblem(
            "architecture",
            spec.architecture.value,
            f"hypervisor {capabilities.hypervisor!r} runs {known}",
        )
    if spec.accelerator is not None and spec.accelerator not in capabilities.accelerators:
        known = ", ".join(capabilities.accelerators) or "none"
        yield SpecProblem(
            "accelerator", spec.accelerator, f"accelerators that work on this host: {known}"
        )


def _excess(spec: MachineSpec, limits: Limits) -> Iterator[tuple[str, str, str]]:
    """Where one machine of this kind would pass a limit: field, what is asked, the limit."""
    for field, asked, limit in (
        ("cpus.count", spec.cpus.count, limits.vcpus_per_machine),
        ("cpus.maximum", spec.cpus.maximum, limits.vcpus_per_machine),
        ("disks", len(spec.disks), limits.disks_per_machine),
        ("nics", len(spec.nics), limits.nics_per_machine),
    ):
        if limit is not None and asked is not None and asked > limit:
            yield field, str(asked), str(limit)
    sizes = [
        ("memory.size", spec.memory.size, limits.memory_per_machine),
        ("memory.maximum", spec.memory.maximum, limits.memory_per_machine),
    ]
    sizes += [
        (f"disks.{position}.size", disk.size, limits.disk_size)
        for position, disk in enumerate(spec.disks)
    ]
    for field, size, most in sizes:
        if size is not None and most is not None and size > most:
            yield field, format_size(size), format_size(most)


def check_fit(spec: MachineSpec, capabilities: Capabilities) -> None:
    """Refuse `spec` unless this hypervisor can make such a machine.

    Raises:
        InvalidSpec: architecture or accelerator are not to be had here.
        UnsupportedOperation: fields need capabilities that are missing; it names the first one.
        ResourceExhausted: one machine of this kind passes a limit.
    """
    hypervisor = capabilities.hypervisor
    problems = list(_problems(spec, capabilities))
    if problems:
        raise InvalidSpec(
            problems,
            machine=spec.name,
            hypervisor=hypervisor,
            hint="`vmlab hypervisors` lists what each one can do on this host",
        )
    missing = list(_missing(spec, capabilities))
    if missing:
        fields = ", ".join(f"{field} ({capability.value})" for field, capability in missing)
        why = capabilities.unsupported.get(missing[0][1])
        raise UnsupportedOperation(
            missing[0][1].value,
            hypervisor=hypervisor,
            machine=spec.name,
            operation="create",
            hint=f"what asks for it: {fields}" + (f"; why not: {why}" if why else ""),
        )
    excess = [
        f"{field} = {asked}: hypervisor {hypervisor!r} allows {limit}"
        for field, asked, limit in _excess(spec, capabilities.limits)
    ]
    if excess:
        raise ResourceExhausted(
            "; ".join(excess),
            hint="ask for less, or choose another hypervisor",
            machine=spec.name,
            hypervisor=hypervisor,
            operation="create",
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What machines take up of what their hypervisor has; sizes are bytes.

    vCPUs, memory and ports are those of live machines only.
    """

    machines: int = 0
    vcpus: int = 0
    memory: int = 0
    disk_space: int = 0
    ports: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.machines + other.machines,
            self.vcpus + other.vcpus,
            self.memory + other.memory,
            self.disk_space + other.disk_space,
            self.ports + other.ports,
        )


def usage_of(spec: MachineSpec, *, live: bool) -> Usage:
    """What a machine of this specification takes up; a disk without `size` counts as nothing."""
    return Usage(
        machines=1,
        vcpus=spec.cpus.count if live else 0,
        memory=spec.memory.size if live else 0,
        disk_space=sum(disk.size or 0 for disk in spec.disks),
        ports=sum(len(nic.forwards) for nic in spec.nics) + spec.display if live else 0,
    )


def check_totals(
    limits: Limits,
    usage: Usage,
    spec: MachineSpec,
    *,
    live: bool = False,
    hypervisor: str | None = None,
    operation: str = "create",
) -> None:
    """Refuse one machine more when all of them together would pass a limit.

    Args:
        limits: Of the hypervisor.
        usage: What the other machines take up.
        spec: The machine's.
        live: Whether it is to be live: a machine at rest takes up no vCPUs, memory or ports.
        hypervisor: Name for the error.
        operation: What would take it up, for the error.

    Raises:
        ResourceExhausted: naming each limit, what is in use and what was asked for.
    """
    asked = usage_of(spec, live=live)
    excess = []
    for what, used, more, limit, written in (
        ("machines", usage.machines, asked.machines, limits.machines, str),
        ("vCPUs", usage.vcpus, asked.vcpus, limits.vcpus, str),
        ("memory", usage.memory, asked.memory, limits.memory, format_size),
        ("disk space", usage.disk_space, asked.disk_space, limits.disk_space, format_size),
        ("ports", usage.ports, asked.ports, limits.ports, str),
    ):
        if limit is not None and more and used + more > limit:
            excess.append(
                f"{what}: {written(more)} more would make {written(used + more)} "
                f"of {written(limit)} that there are"
            )
    if excess:
        raise ResourceExhausted(
            f"cannot {operation} {spec.name!r}: " + "; ".join(excess),
            hint="stop or delete other machines first, or ask for less",
            machine=spec.name,
            hypervisor=hypervisor,
            operation=operation,
        )

"""Whether a hypervisor can make the machine that a specification asks for.

Asked before anything is created, so that a refusal leaves nothing behind. Every problem is found
at once; a missing capability is an UnsupportedOperation, a limit ResourceExhausted.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import InvalidSpec, ResourceExhausted, SpecProblem
from vmlab.machine.sizes import format_size
from vmlab.machine.spec import MachineSpec, ShareKind

_SHARES = {
    ShareKind.P9: Capability.SHARE_9P,
    ShareKind.VIRTIOFS: Capability.SHARE_VIRTIOFS,
    ShareKind.COPY: Capability.SHARE_COPY,
}
_DEVICES = {"gpu": Capability.GPU_PASSTHROUGH, "sriov": Capability.SRIOV_PASSTHROUGH}


def needed_capabilities(spec: MachineSpec) -> list[tuple[str, Capability]]:
    """The capabilities that `spec` cannot do without, each with the field that asks for it."""
    needed: list[tuple[str, Capability]] = []
    if spec.cpus.pinning:
        needed.append(("cpus.pinning", Capability.PINNING))
    if len(spec.memory.nodes) > 1:
        needed.append(("memory.nodes", Capability.NUMA))
    if spec.cpus.maximum is not None and spec.cpus.maximum > spec.cpus.count:
        needed.append(("cpus.maximum", Capability.HOTPLUG_VCPU))
    if spec.memory.maximum is not None and spec.memory.maximum > spec.memory.size:
        needed.append(("memory.maximum", Capability.HOTPLUG_MEMORY))
    for position, share in enumerate(spec.shares):
        if share.kind is not ShareKind.AUTO:
            needed.append((f"shares.{position}.kind", _SHARES[share.kind]))
    for position, device in enumerate(spec.host_devices):
        needed.append((f"host_devices.{position}", _DEVICES[device.kind]))
    if spec.deterministic:
        needed.append(("deterministic", Capability.DETERMINISTIC))
    return needed


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
    if (
        spec.shares
        and not {*_SHARES.values()} & capabilities.supported
        and all(share.kind is ShareKind.AUTO for share in spec.shares)
    ):
        yield SpecProblem("shares", len(spec.shares), "this hypervisor has no kind of share")


def _excess(spec: MachineSpec, capabilities: Capabilities) -> Iterator[tuple[str, str, str]]:
    """Where one machine of this kind would pass a limit: field, what is asked, the limit."""
    limits = capabilities.limits
    for field, asked, limit in (
        ("cpus.count", spec.cpus.maximum or spec.cpus.count, limits.vcpus_per_machine),
        ("disks", len(spec.disks), limits.disks_per_machine),
        ("nics", len(spec.nics), limits.nics_per_machine),
    ):
        if limit is not None and asked > limit:
            yield field, str(asked), str(limit)
    memory = spec.memory.maximum or spec.memory.size
    if limits.memory_per_machine is not None and memory > limits.memory_per_machine:
        yield "memory.size", format_size(memory), format_size(limits.memory_per_machine)
    for position, disk in enumerate(spec.disks):
        if disk.size is not None and limits.disk_size is not None and disk.size > limits.disk_size:
            yield f"disks.{position}.size", format_size(disk.size), format_size(limits.disk_size)


def check_fit(spec: MachineSpec, capabilities: Capabilities) -> None:
    """Refuse `spec` unless this hypervisor can make such a machine.

    Raises:
        InvalidSpec: architecture or accelerator are not to be had here.
        UnsupportedOperation: a field needs a capability that is missing.
        ResourceExhausted: one machine of this kind passes a limit.
    """
    problems = list(_problems(spec, capabilities))
    if problems:
        raise InvalidSpec(
            problems,
            machine=spec.name,
            hypervisor=capabilities.hypervisor,
            hint="`vmlab hypervisors` lists what each one can do on this host",
        )
    for _field, capability in needed_capabilities(spec):
        capabilities.require(capability, machine=spec.name, operation="create")
    for field, asked, limit in _excess(spec, capabilities):
        raise ResourceExhausted(
            f"{field} = {asked}: hypervisor {capabilities.hypervisor!r} allows {limit}",
            hint="ask for less, or choose another hypervisor",
            machine=spec.name,
            hypervisor=capabilities.hypervisor,
            operation="create",
        )

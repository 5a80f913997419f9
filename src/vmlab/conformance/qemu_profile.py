"""How the suite handles QEMU: a tiny Debian guest that answers by vmlab's agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vmlab.conformance.agent_probe import AgentProbe
from vmlab.conformance.profiles import ConformanceProfile
from vmlab.guests.agent import CHANNELS
from vmlab.hypervisors.base import Hypervisor, Machine, Snapshot
from vmlab.machine.architecture import Architecture, host_architecture, parse_architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.faults import FaultKind
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import Boot, Disk, MachineSpec, Nic

_IMAGES: Final = {
    Architecture.X86_64: "debian-12-amd64-tiny",
    Architecture.RISCV64: "debian-13-riscv64-tiny",
    Architecture.AARCH64: "debian-13-arm64-tiny",
    Architecture.PPC64LE: "debian-13-ppc64el-tiny",
}
_ECHO: Final = "conformance.echo"
"""Before the agent's channels, whose control port has to be the last one."""

_IN_DRIVER: Final = "it would be this project's own driver that fails, not QEMU"
_FAULTLESS: Final = {
    FaultKind.CLOCK_JUMP: "QEMU's clock is the host's",
    FaultKind.CPU_STALL: "QEMU stops all vCPUs or none",
    FaultKind.OPERATION_FAILURE: _IN_DRIVER,
    FaultKind.OPERATION_HANG: _IN_DRIVER,
    FaultKind.OPERATION_PARTIAL: _IN_DRIVER,
    FaultKind.LOST_EVENT: _IN_DRIVER,
    FaultKind.STALE_STATUS: _IN_DRIVER,
    FaultKind.HYPERVISOR_CRASH: "there is none beside the machines' processes, which `kill` ends",
}
"""What `vmlab.hypervisors.qemu.faults` does not do to a QEMU, and why."""


async def corrupt(hypervisor: Hypervisor, machine: Machine, snapshot: Snapshot) -> None:
    """Flip a bit in each of a snapshot's files."""
    directory = (await machine.info()).directory
    assert directory is not None
    for path in (directory / "snapshots" / snapshot.name).iterdir():
        if path.suffix != ".json" and (size := path.stat().st_size):
            with path.open("r+b") as file:
                file.seek(size // 2)
                (byte,) = file.read(1)
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))


def make_profile(architecture: Architecture) -> ConformanceProfile:
    """The profile for guests of that architecture; their image is built if it is not there."""
    from vmlab.images import ImageStore

    image = ImageStore().ensure(_IMAGES[architecture])
    never = {
        Capability.SHARE_VIRTIOFS,
        Capability.SHARE_COPY,
        Capability.GPU_PASSTHROUGH,
        Capability.SRIOV_PASSTHROUGH,
        Capability.DETERMINISTIC,
    }
    if architecture is not Architecture.X86_64:
        never |= {Capability.HOTPLUG_VCPU, Capability.HOTPLUG_MEMORY}
    if architecture in {Architecture.RISCV64, Architecture.PPC64LE}:
        never.add(Capability.HOTPLUG_NIC)
    if architecture is Architecture.RISCV64:
        # Linux hangs with the interrupt controller that QEMU's board has for each node.
        never.add(Capability.NUMA)
    if architecture is Architecture.PPC64LE:
        # Their decrementer is lost before QEMU 8.2 (vmlab.hypervisors.qemu.timers).
        never |= {Capability.MEMORY_SNAPSHOT, Capability.FORK, Capability.LIVE_MIGRATION}
    # The board of ppc64le takes memory in parts of 256 MiB only (QEMU's hw/ppc/spapr.c).
    least: Final = 256 * MIB if architecture is Architecture.PPC64LE else 192 * MIB
    bus: Final = "virtio" if architecture is Architecture.X86_64 else "scsi"
    return ConformanceProfile(
        hypervisor="qemu",
        options={"architecture": architecture.value},
        spec=MachineSpec(
            name="conformance",
            architecture=architecture,
            memory={"size": least},
            boot=Boot(kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline),
            disks=(
                Disk(name="data", size=64 * MIB, serial="data", bus=bus),
                Disk(name="extra", size=32 * MIB, serial="extra", bus=bus),
            ),
            nics=(Nic(name="net", network="segment:conformance"),),
            channels=(_ECHO, *CHANNELS),
        ),
        scratch=("data", "extra"),
        probe=AgentProbe,
        echo_channel=_ECHO,
        corrupt=corrupt,
        must_declare=frozenset(set(Capability) - never),
        sizes=((1, least), (2, 512 * MIB), (4, GIB)),
        many=8,
        cancel_points=(0.0, 0.5),
        bus=bus,
        settle=1.0,
        slack=300.0,
        lag=10.0,
        triggers=frozenset({"time", "nth", "chance"}),
        faultless=_FAULTLESS,
        patience=3600.0,
        variant=for_options,
    )


def for_options(options: Mapping[str, str]) -> ConformanceProfile:
    """The profile for guests of the architecture that the options name.

    Raises:
        InvalidSpec: there is no such architecture.
    """
    name = options["architecture"]
    try:
        return make_profile(parse_architecture(name))
    except ValueError as error:
        raise InvalidSpec(
            [SpecProblem("architecture", name, str(error))], hypervisor="qemu"
        ) from error


def __getattr__(name: str) -> ConformanceProfile:
    """`profile` is made when it is asked for: it needs an image."""
    if name == "profile":
        return make_profile(host_architecture() or Architecture.X86_64)
    raise AttributeError(name)

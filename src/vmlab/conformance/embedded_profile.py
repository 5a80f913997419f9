"""How the suite handles the embedded engine: a tiny Debian guest that answers by vmlab's agent."""

from __future__ import annotations

from typing import Final

from vmlab.conformance.agent_probe import AgentProbe
from vmlab.conformance.profiles import ConformanceProfile
from vmlab.guests.agent import CHANNELS
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import Boot, Disk, MachineSpec, Nic

IMAGE: Final = "debian-13-riscv64-tiny"
_ECHO: Final = "conformance.echo"
"""Before the agent's channels, whose control port has to be the last one."""

MUST_DECLARE: Final = frozenset(
    {
        Capability.PAUSE,
        Capability.RESUME,
        Capability.HOTPLUG_DISK,
        Capability.RESIZE,
        Capability.RESIZE_DISK,
        Capability.CONSOLE,
        Capability.GUEST_CHANNELS,
        Capability.DETERMINISTIC,
        Capability.FAULTS,
    }
)


def make_profile() -> ConformanceProfile:
    """The profile; the guest's image is built if it is not there."""
    from vmlab.images import ImageStore

    image = ImageStore().ensure(IMAGE)
    return ConformanceProfile(
        hypervisor="embedded",
        spec=MachineSpec(
            name="conformance",
            architecture=Architecture.RISCV64,
            memory={"size": 192 * MIB},
            boot=Boot(kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline),
            disks=(
                Disk(name="data", size=64 * MIB, serial="data", bus="scsi"),
                Disk(name="extra", size=32 * MIB, serial="extra", bus="scsi"),
            ),
            nics=(Nic(name="net", network="segment:conformance"),),
            channels=(_ECHO, *CHANNELS),
        ),
        scratch=("data", "extra"),
        probe=AgentProbe,
        echo_channel=_ECHO,
        must_declare=MUST_DECLARE,
        sizes=((1, 192 * MIB), (2, 512 * MIB), (4, GIB)),
        many=8,
        cancel_points=(0.0, 0.5),
        settle=1.0,
        slack=300.0,
        lag=10.0,
        patience=1800.0,
    )


def __getattr__(name: str) -> ConformanceProfile:
    """`profile` is made when it is asked for: it needs an image."""
    if name == "profile":
        return make_profile()
    raise AttributeError(name)

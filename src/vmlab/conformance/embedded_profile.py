"""How the suite handles the embedded engine: a tiny Debian guest that answers by vmlab's agent."""

from __future__ import annotations

import asyncio
from typing import Final

from vmlab.conformance.agent_probe import AgentProbe
from vmlab.conformance.probe import GuestProbe
from vmlab.conformance.profiles import ConformanceProfile
from vmlab.guests.agent import CHANNELS
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import Boot, Disk, MachineSpec, Nic

IMAGE: Final = "debian-13-riscv64-tiny"
_BOOTED: Final = b"activate this console"
"""What the console says when the guest has booted and waits for somebody."""
_BOOT: Final = 300.0
"""Seconds that a guest has to boot, several at once on a slow host."""
_ECHO: Final = "conformance.echo"
"""Before the agent's channels, whose control port has to be the last one."""

MUST_DECLARE: Final = frozenset(
    {
        Capability.PAUSE,
        Capability.RESUME,
        Capability.HOTPLUG_DISK,
        Capability.RESIZE,
        Capability.RESIZE_DISK,
        Capability.DISK_IN_PLACE,
        Capability.CONSOLE,
        Capability.GUEST_CHANNELS,
        Capability.DETERMINISTIC,
        Capability.FAULTS,
    }
)


async def drawn_at_boot(guest: GuestProbe) -> bytes:
    """Where the kernel put its first program: what a guest has drawn before it was told anything.

    What comes from outside comes at the host's time, and the kernel's entropy is made of that too.
    So nobody speaks to the guest before it has booted.
    """
    assert isinstance(guest, AgentProbe), "the profile's probe"
    async with asyncio.timeout(_BOOT), await guest._machine.console() as console:
        while _BOOTED not in await console.log():
            await console.read()
    return await guest.ask("cat /proc/1/maps")


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
        bus="scsi",
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
        triggers=frozenset({"time", "nth", "chance"}),
        drawn=drawn_at_boot,
    )


def __getattr__(name: str) -> ConformanceProfile:
    """`profile` is made when it is asked for: it needs an image."""
    if name == "profile":
        return make_profile()
    raise AttributeError(name)

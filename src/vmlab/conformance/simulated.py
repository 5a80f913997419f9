"""How the suite handles the simulated hypervisor."""

from __future__ import annotations

from collections.abc import Mapping

from vmlab.conformance.probe import PROBE_CHANNEL, ChannelProbe
from vmlab.conformance.profiles import ConformanceProfile
from vmlab.hypervisors.base import Hypervisor, Machine, Snapshot
from vmlab.machine.capabilities import Capability
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, MachineSpec, Nic

ECHO_CHANNEL = "vmlab.echo"
_NEVER = {
    Capability.SHARE_9P,
    Capability.SHARE_VIRTIOFS,
    Capability.GPU_PASSTHROUGH,
    Capability.SRIOV_PASSTHROUGH,
}


async def corrupt(hypervisor: Hypervisor, machine: Machine, snapshot: Snapshot) -> None:
    """Damage a snapshot where the simulated host keeps it."""
    from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor

    if not isinstance(hypervisor, SimulatedHypervisor):
        raise TypeError(f"{hypervisor!r} is not a simulated hypervisor")
    hypervisor.world.machines[machine.id].snapshots[snapshot.name].damage()


def reliable(options: Mapping[str, str]) -> bool:
    """Whether nothing is left to chance in the profile that the options name.

    Raises:
        InvalidSpec: there is no such profile.
    """
    from vmlab.hypervisors.simulated.profile import Luck, SimulationProfile

    luck = SimulationProfile.load(options.get("profile", "standard")).luck
    return luck == Luck()


profile = ConformanceProfile(
    hypervisor="simulated",
    spec=MachineSpec.of(
        name="conformance",
        memory="128M",
        disks=[Disk(name="data", size=64 * MIB), Disk(name="extra", size=32 * MIB)],
        nics=[Nic(name="net", network="segment:conformance")],
        channels=(PROBE_CHANNEL, ECHO_CHANNEL),
    ),
    scratch=("data", "extra"),
    probe=ChannelProbe,
    echo_channel=ECHO_CHANNEL,
    corrupt=corrupt,
    must_declare=frozenset(set(Capability) - _NEVER),
    seed_option="seed",
    triggers=frozenset({"time", "nth", "chance", "console"}),
    processes=False,
    own_clock=True,
    reliable=reliable,
)

"""What the registry knows of the simulated hypervisor: its options, and how it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from vmlab import __version__
from vmlab.hypervisors.base import Hypervisor, HypervisorProvider, Probe, ProbeItem

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner


class SimulatedProvider(HypervisorProvider):
    """Opens simulated hypervisors, in this process or in one of their own.

    Options: `profile` (a built-in one or a TOML file), `seed` (a number), `clock` ("virtual" or
    "wall"), or instead of profile and clock `socket` (of a `vmlab simulate`, which has its own).
    """

    name: ClassVar[str] = "simulated"
    summary: ClassVar[str] = "machines, guests and faults simulated in Python; needs nothing"

    def probe(self) -> Probe:
        return Probe(
            hypervisor=self.name,
            available=True,
            version=__version__,
            items=(ProbeItem(name="python", works=True, detail="runs in this process"),),
        )

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> Hypervisor:
        from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
        from vmlab.hypervisors.simulated.options import read_options
        from vmlab.hypervisors.simulated.profile import SimulationProfile

        chosen = read_options(options or {})
        if chosen.socket is not None:
            from vmlab.hypervisors.simulated.client import RemoteSimulatedHypervisor

            return RemoteSimulatedHypervisor(owner, chosen.socket, seed=chosen.seed)
        return SimulatedHypervisor(
            owner,
            SimulationProfile.load(chosen.profile),
            seed=chosen.seed,
            clock=chosen.clock,
            store=owner.directory / self.name if owner.kind == "store" else None,
        )

"""What a mutant is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vmlab.conformance.profiles import ConformanceProfile
from vmlab.conformance.runner import Subject
from vmlab.conformance.simulated import profile as simulated_profile
from vmlab.hypervisors.base import Hypervisor, HypervisorProvider, Probe
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.hypervisors.simulated.machine import SimulatedMachine
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

PROFILE = simulated_profile.with_changes(many=12)
"""The simulator's own profile, with fewer machines at once."""


class BrokenMachine(SimulatedMachine):
    """Breaks nothing yet."""


class BrokenHypervisor(SimulatedHypervisor):
    """Breaks nothing yet; its machines are of `machine_class`."""

    machine_class: ClassVar[type[BrokenMachine]] = BrokenMachine

    def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> SimulatedMachine:
        return self.machine_class(self, id_, spec, state)


@dataclass(frozen=True)
class Mutant:
    """A broken hypervisor.

    Attributes:
        name: Of its class.
        breaks: What is wrong with it.
        caught_by: The check or audit that has to find it.
        only: Whether nothing else may.
        hypervisor: Its class.
        profile: How the suite handles it.
    """

    name: str
    breaks: str
    caught_by: str
    only: bool
    hypervisor: type[BrokenHypervisor]
    profile: ConformanceProfile

    def subject(self, seed: int = 0) -> Subject:
        """The mutant as a back end under test."""
        return Subject(BrokenProvider(self.hypervisor), self.profile, seed)


class BrokenProvider(HypervisorProvider):
    """Opens a broken hypervisor."""

    name: ClassVar[str] = "simulated"
    summary: ClassVar[str] = "broken on purpose"

    def __init__(self, hypervisor: type[BrokenHypervisor]) -> None:
        self._hypervisor = hypervisor

    def probe(self) -> Probe:
        return Probe(hypervisor=self.name, available=True)

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> Hypervisor:
        chosen = dict(options or {})
        return self._hypervisor(
            owner,
            SimulationProfile.load(chosen.get("profile", "standard")),
            seed=int(chosen.get("seed", "0")),
            store=owner.directory / self.name if owner.kind == "store" else None,
        )


MUTANTS: list[Mutant] = []


def mutant(caught_by: str, *, only: bool = True, **profile: Any) -> Callable[[type], type]:
    """Register a broken machine or hypervisor; its docstring says what is wrong with it."""

    def register(broken: type) -> type:
        kind = broken
        if issubclass(broken, BrokenMachine):
            kind = type(broken.__name__, (BrokenHypervisor,), {"machine_class": broken})
        breaks = (broken.__doc__ or "").strip()
        assert breaks, f"{broken.__name__} does not say what it breaks"
        MUTANTS.append(
            Mutant(broken.__name__, breaks, caught_by, only, kind, PROFILE.with_changes(**profile))
        )
        return broken

    return register


def wipe(disk: SimulatedDisk) -> None:
    """Lose everything on a disk."""
    disk.cache.pages.clear()
    disk.stable.pages.clear()

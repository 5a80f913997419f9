"""A hypervisor as a lab has it: opened, with what it can do, and the loop that its calls run on."""

from __future__ import annotations

from dataclasses import dataclass

from vmlab.hypervisors.base import Hypervisor
from vmlab.lab.loop import LoopThread
from vmlab.machine.capabilities import Capabilities

__all__ = ["Venue"]


@dataclass(frozen=True, slots=True)
class Venue:
    """A hypervisor that a lab has opened, what it can do, and the loop that its calls run on."""

    hypervisor: Hypervisor
    capabilities: Capabilities
    loop: LoopThread

    @property
    def name(self) -> str:
        """The hypervisor's."""
        return self.hypervisor.name

    @property
    def has_guests(self) -> bool:
        """Whether its guests are real and take commands; simulated ones are not."""
        return self.name != "simulated"

"""The simulated hypervisor: machines, guests, wires and faults in Python, through the one contract.

The public face: `provider` is what the registry finds; the rest is private to the package, but for
`SimulatedHypervisor`, whose `trace`, `crash` and `restart` tests of callers use.
"""

from __future__ import annotations

from vmlab.hypervisors.simulated.provider import SimulatedProvider

__all__ = ["SimulatedProvider", "provider"]

provider = SimulatedProvider()

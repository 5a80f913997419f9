"""The embedded engine as a hypervisor: riscv64 machines, with nothing else installed.

`provider` is what the registry finds; the rest is this package's own affair.
"""

from __future__ import annotations

from vmlab.hypervisors.embedded.hypervisor import EmbeddedHypervisor, provider

__all__ = ["EmbeddedHypervisor", "provider"]

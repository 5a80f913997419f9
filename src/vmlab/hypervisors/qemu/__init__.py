"""QEMU 7.2 and later over QMP: x86_64, riscv64, aarch64 and ppc64le guests on KVM or TCG.

`provider` is what the registry finds; the rest is this package's own affair.
"""

from __future__ import annotations

from vmlab.hypervisors.qemu.hypervisor import QemuHypervisor, provider

__all__ = ["QemuHypervisor", "provider"]

"""The guest architectures that vmlab knows, by the names that Linux's `uname -m` gives them."""

from __future__ import annotations

import platform
from enum import StrEnum


class Architecture(StrEnum):
    """A guest's instruction set."""

    RISCV64 = "riscv64"
    AARCH64 = "aarch64"
    X86_64 = "x86_64"
    PPC64LE = "ppc64le"

    @property
    def debian(self) -> str:
        """Debian's name of the architecture (deb-version(7): "amd64", "arm64", "ppc64el")."""
        return _DEBIAN[self]

    @property
    def console(self) -> str:
        """The kernel's name of the first serial console on the machine types vmlab uses."""
        return _CONSOLE[self]


_DEBIAN = {
    Architecture.RISCV64: "riscv64",
    Architecture.AARCH64: "arm64",
    Architecture.X86_64: "amd64",
    Architecture.PPC64LE: "ppc64el",
}
_CONSOLE = {
    Architecture.RISCV64: "ttyS0",
    Architecture.AARCH64: "ttyAMA0",
    Architecture.X86_64: "ttyS0",
    Architecture.PPC64LE: "hvc0",
}
SPELLINGS = {
    **{architecture.value: architecture for architecture in Architecture},
    **{name: architecture for architecture, name in _DEBIAN.items()},
    "powerpc64le": Architecture.PPC64LE,
    "x86-64": Architecture.X86_64,
}
"""Every spelling that is understood, in lower case."""


def parse_architecture(value: object) -> Architecture:
    """The architecture of any usual spelling: "amd64", "x86_64", "arm64", "ppc64el", ...

    Raises:
        ValueError: naming the architectures that there are.
    """
    found = SPELLINGS.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        names = ", ".join(repr(architecture.value) for architecture in Architecture)
        raise ValueError(f"one of {names}")
    return found


def host_architecture() -> Architecture | None:
    """This host's architecture, or None where vmlab has no guest of the same kind."""
    return SPELLINGS.get(platform.machine().lower())

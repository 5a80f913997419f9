"""Which package of a Linux distribution, or of Homebrew, brings a program, and how to install it.

Names as the distributions have them; where one is not known, none is guessed.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["OUT_OF_PATH", "PACKAGES", "Distribution", "distribution", "install_command"]

OUT_OF_PATH: Final[Mapping[str, tuple[str, ...]]] = {
    "virtiofsd": ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd"),
    # Ordinary users of Debian do not have it.
    "dnsmasq": ("/usr/sbin/dnsmasq",),
    "nft": ("/usr/sbin/nft",),
    "ovs-vswitchd": ("/usr/sbin/ovs-vswitchd",),
}
"""Where distributions have programs that are not in PATH."""

_COMMANDS: Final[Mapping[str, str]] = {
    "debian": "apt-get install",
    "fedora": "dnf install",
    "arch": "pacman -S",
    "suse": "zypper install",
    "alpine": "apk add",
    "homebrew": "brew install",
}

PACKAGES: Final[Mapping[str, Mapping[str, str]]] = {
    "qemu-system-x86_64": {
        "debian": "qemu-system-x86",
        "fedora": "qemu-system-x86",
        "arch": "qemu-system-x86",
        "suse": "qemu-x86",
        "alpine": "qemu-system-x86_64",
        "homebrew": "qemu",
    },
    "qemu-system-aarch64": {
        "debian": "qemu-system-arm",
        "fedora": "qemu-system-aarch64",
        "arch": "qemu-system-aarch64",
        "suse": "qemu-arm",
        "alpine": "qemu-system-aarch64",
        "homebrew": "qemu",
    },
    "qemu-system-riscv64": {
        "debian": "qemu-system-misc",
        # Debian 13 and Ubuntu 25.04 took it out of qemu-system-misc.
        "debian-13": "qemu-system-riscv",
        "fedora": "qemu-system-riscv",
        "arch": "qemu-system-riscv",
        "suse": "qemu-extra",
        "alpine": "qemu-system-riscv64",
        "homebrew": "qemu",
    },
    "qemu-system-ppc64": {
        "debian": "qemu-system-ppc",
        "fedora": "qemu-system-ppc",
        "arch": "qemu-system-ppc",
        "suse": "qemu-ppc",
        "alpine": "qemu-system-ppc64",
        "homebrew": "qemu",
    },
    "qemu-img": {
        "debian": "qemu-utils",
        "fedora": "qemu-img",
        "arch": "qemu-img",
        "suse": "qemu-img",
        "alpine": "qemu-img",
        "homebrew": "qemu",
    },
    "passt": {
        "debian": "passt",
        "fedora": "passt",
        "arch": "passt",
        "suse": "passt",
        "alpine": "passt",
    },
    "virtiofsd": {
        # In Debian 12, qemu-system-common brings it.
        "debian": "qemu-system-common",
        "debian-13": "virtiofsd",
        "fedora": "virtiofsd",
        "arch": "virtiofsd",
        "suse": "virtiofsd",
        "alpine": "virtiofsd",
    },
    "mmdebstrap": {"debian": "mmdebstrap"},
    "dnsmasq": {
        "debian": "dnsmasq-base",
        "fedora": "dnsmasq",
        "arch": "dnsmasq",
        "suse": "dnsmasq",
        "alpine": "dnsmasq",
    },
    "nft": {
        "debian": "nftables",
        "fedora": "nftables",
        "arch": "nftables",
        "suse": "nftables",
        "alpine": "nftables",
    },
    "ovs-vswitchd": {
        "debian": "openvswitch-switch",
        "fedora": "openvswitch",
        "arch": "openvswitch",
        "suse": "openvswitch",
        "alpine": "openvswitch",
    },
}
"""Package of each program, by family of distributions; "debian-13" is Debian from there on."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """What this host runs: its name for people, and the family whose packages it has."""

    name: str
    family: str | None = None
    recent: bool = False

    def package(self, program: str) -> str | None:
        """The package that brings `program`; None where that is not known."""
        known = PACKAGES.get(program, {})
        newer = known.get(f"{self.family}-13") if self.recent else None
        return newer or known.get(self.family or "")


def distribution(root: Path = Path("/"), system: str = sys.platform) -> Distribution:
    """Which distribution this is, as os-release(5) says.

    Args:
        root: Where the host's files are.
        system: The platform, as `sys.platform` names it.
    """
    if system == "darwin":
        return Distribution("macOS", "homebrew")
    for path in ("etc/os-release", "usr/lib/os-release"):
        try:
            fields = _parse((root / path).read_text("utf-8"))
        except OSError:
            continue
        return _identify(fields)
    return Distribution("an unknown system")


def _parse(text: str) -> dict[str, str]:
    """The variables of an os-release file: the shell's assignments."""
    fields = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            try:
                fields[name] = "".join(shlex.split(value))
            except ValueError:
                fields[name] = value  # an unbalanced quote
    return fields


def _identify(fields: Mapping[str, str]) -> Distribution:
    id_ = fields.get("ID", "linux")
    likes = [id_, *fields.get("ID_LIKE", "").split()]
    families = {
        "debian": "debian",
        "ubuntu": "debian",
        "fedora": "fedora",
        "rhel": "fedora",
        "centos": "fedora",
        "arch": "arch",
        "suse": "suse",
        "opensuse": "suse",
        "alpine": "alpine",
    }
    family = next((families[like] for like in likes if like in families), None)
    version = re.match(r"\d+(\.\d+)?", fields.get("VERSION_ID", ""))
    # Debian testing and unstable have no VERSION_ID.
    number = float(version[0]) if version else float("inf")
    recent = family == "debian" and number >= (25.04 if "ubuntu" in likes else 13)
    return Distribution(fields.get("PRETTY_NAME", id_), family, recent)


def install_command(programs: Iterable[str], where: Distribution) -> str | None:
    """The command that installs all of `programs` whose packages are known; None if none is."""
    packages = list(dict.fromkeys(filter(None, map(where.package, programs))))
    if not packages or where.family is None:
        return None
    root = "" if os.geteuid() == 0 or where.family == "homebrew" else "sudo "
    return f"{root}{_COMMANDS[where.family]} {' '.join(packages)}"

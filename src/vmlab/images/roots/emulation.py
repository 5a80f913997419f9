"""Running programs of another architecture while a root is built: qemu-user in a private place.

A registration with binfmt_misc is for the whole host and needs root; since Linux 6.7 a user
namespace has one of its own, which vanishes with the build. Where the host has a registration
already, that one is used. Follows Documentation/admin-guide/binfmt-misc.rst.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from vmlab.images.errors import ToolMissing
from vmlab.images.roots import tools
from vmlab.machine.architecture import Architecture

_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_QEMU = {
    Architecture.RISCV64: ("qemu-riscv64", 243),
    Architecture.AARCH64: ("qemu-aarch64", 183),
    Architecture.X86_64: ("qemu-x86_64", 62),
    Architecture.PPC64LE: ("qemu-ppc64le", 21),
}


def wrapped(command: list[str], architecture: Architecture) -> list[str]:
    """`command`, so that programs of `architecture` run in it.

    Raises:
        ToolMissing: there is no qemu-user for it.
    """
    name, machine = _QEMU[architecture]
    if (_BINFMT / name).exists():
        return command
    interpreter = tools.find(f"{name}-static") or tools.find(name)
    if interpreter is None:
        raise ToolMissing(
            f"installing packages for {architecture.value} on this host needs {name}-static",
            hint="install qemu-user-static; the tiny images do not need it",
        )
    # unshare gives the namespace its ids through newuidmap.
    found = tools.require(["unshare", "newuidmap"], what="a private binfmt_misc")
    unshare = found["unshare"]
    # Root maps all ids to themselves, so that ownership is as on the host; others map what
    # /etc/subuid lends them.
    ids = (
        ["--map-users=0,0,65536", "--map-groups=0,0,65536"]
        if os.geteuid() == 0
        else ["--map-auto", "--map-root-user"]
    )
    # Inside, the build is root of its namespace.
    inner = [*(("--mode=root" if word == "--mode=unshare" else word) for word in command)]
    script = (
        f"mount -t binfmt_misc binfmt_misc {_BINFMT} && "
        f"printf %s {shlex.quote(_registration(name, machine, interpreter))} "
        f'>{_BINFMT}/register && exec "$@"'
    )
    return [unshare, "--user", *ids, "--mount", "--kill-child", "--fork", "--",
            "/bin/sh", "-ec", script, "sh", *inner]  # fmt: skip


def _registration(name: str, machine: int, interpreter: str) -> str:
    """binfmt_misc's line for 64-bit little-endian ELF programs of a machine, executable or
    shared; F keeps the interpreter open, so that it need not be in the root."""
    magic = b"\x7fELF\x02\x01\x01\x00" + bytes(8) + b"\x02\x00" + machine.to_bytes(2, "little")
    mask = b"\xff" * 7 + b"\x00" + b"\xff" * 8 + b"\xfe\xff\xff\xff"
    escaped = ["".join(f"\\x{byte:02x}" for byte in data) for data in (magic, mask)]
    return f":{name}:M::{escaped[0]}:{escaped[1]}:{interpreter}:F"

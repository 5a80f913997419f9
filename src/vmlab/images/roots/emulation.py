"""Running programs of another architecture while a root is built: qemu-user in a private place.

A registration with binfmt_misc is for the whole host and needs root; since Linux 6.7 a user
namespace has one of its own, which vanishes with the build. Where the host has a registration
already, that one is used. Follows Documentation/admin-guide/binfmt-misc.rst.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.errors import BuildFailed, ToolMissing
from vmlab.images.roots import tools
from vmlab.machine.architecture import Architecture

_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_SECONDS_TO_UNSHARE = 5.0
_QEMU = {
    Architecture.RISCV64: ("qemu-riscv64", 243),
    Architecture.AARCH64: ("qemu-aarch64", 183),
    Architecture.X86_64: ("qemu-x86_64", 62),
    Architecture.PPC64LE: ("qemu-ppc64le", 21),
}


@dataclass(frozen=True)
class Wrapped:
    """A command to run, and what has to be done to its process before it goes on."""

    command: list[str]
    admit: Callable[[int], None] | None = None


def wrapped(command: list[str], architecture: Architecture) -> Wrapped:
    """`command`, so that programs of `architecture` run in it.

    Raises:
        ToolMissing: there is no qemu-user for it.
    """
    name, machine = _QEMU[architecture]
    if (_BINFMT / name).exists():
        return Wrapped(command)
    interpreter = tools.find(f"{name}-static") or tools.find(name)
    if interpreter is None:
        raise ToolMissing(
            f"installing packages for {architecture.value} on this host needs {name}-static",
            hint="install qemu-user-static; the tiny images do not need it",
        )
    # Inside, the build is root of its namespace.
    inner = ["--mode=root" if word == "--mode=unshare" else word for word in command]
    script = (
        f"mount -t binfmt_misc binfmt_misc {_BINFMT} && "
        f"printf %s {shlex.quote(_registration(name, machine, interpreter))} "
        f'>{_BINFMT}/register && exec "$@"'
    )
    if os.geteuid() == 0:
        found = tools.require(["unshare"], what="a private binfmt_misc")
        script = f"read -r admitted && {script}"
        start = [found["unshare"], "--user", "--mount", "--"]
        return Wrapped([*start, "/bin/sh", "-ec", script, "sh", *inner], admit_all_ids)
    # An ordinary user is lent ids by /etc/subuid, and newuidmap hands them out.
    found = tools.require(["unshare", "newuidmap"], what="a private binfmt_misc")
    start = [found["unshare"], "--user", "--map-auto", "--map-root-user", "--mount", "--"]
    return Wrapped([*start, "/bin/sh", "-ec", script, "sh", *inner])


def admit_all_ids(pid: int) -> None:
    """Give a process's new user namespace all ids of this one, user_namespaces(7).

    Raises:
        BuildFailed: it did not enter one.
    """
    own = Path("/proc/self/ns/user").readlink()
    end = time.monotonic() + _SECONDS_TO_UNSHARE
    try:
        while (Path("/proc") / str(pid) / "ns" / "user").readlink() == own:
            if time.monotonic() > end:
                raise BuildFailed("unshare did not make a user namespace")
            time.sleep(0.005)
        for kind in ("uid_map", "gid_map"):
            (Path("/proc") / str(pid) / kind).write_text("0 0 65536", encoding="ascii")
    except OSError as error:
        raise BuildFailed(
            f"a user namespace for the build cannot be made: {error.strerror}",
            hint="allow user namespaces (user.max_user_namespaces), or register qemu-user with "
            "the host's binfmt_misc",
        ) from error


def _registration(name: str, machine: int, interpreter: str) -> str:
    """binfmt_misc's line for 64-bit little-endian ELF programs of a machine, executable or
    shared; F keeps the interpreter open, so that it need not be in the root."""
    magic = b"\x7fELF\x02\x01\x01\x00" + bytes(8) + b"\x02\x00" + machine.to_bytes(2, "little")
    mask = b"\xff" * 7 + b"\x00" + b"\xff" * 8 + b"\xfe\xff\xff\xff"
    escaped = ["".join(f"\\x{byte:02x}" for byte in data) for data in (magic, mask)]
    return f":{name}:M::{escaped[0]}:{escaped[1]}:{interpreter}:F"

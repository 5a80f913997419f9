"""Installing packages in namespaces of their own: what is started or mounted there ends with it.

Inside, the installer is root and process 1: when it is killed, all that it started dies, and its
mounts go with it, user_namespaces(7), pid_namespaces(7), mount_namespaces(7). Programs of another
architecture run by qemu-user: a registration with binfmt_misc is for the whole host and needs
root, but since Linux 6.7 a user namespace has one of its own (Documentation/admin-guide/
binfmt-misc.rst). Where the host has a registration already, that one is used.
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.errors import BuildFailed, ToolMissing
from vmlab.images.roots import tools
from vmlab.machine.architecture import Architecture, host_architecture

_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_SECONDS_TO_UNSHARE = 60.0
_SECONDS_TO_TRY = 60.0
_QEMU = {
    Architecture.RISCV64: ("qemu-riscv64", 243),
    Architecture.AARCH64: ("qemu-aarch64", 183),
    Architecture.X86_64: ("qemu-x86_64", 62),
    Architecture.PPC64LE: ("qemu-ppc64le", 21),
}
_NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child=KILL")
# Root of a user namespace, with the ids that /etc/subuid and /etc/subgid lend this user.
_AS_ROOT = ("--user", "--map-auto", "--map-root-user")


@dataclass(frozen=True)
class Confined:
    """A command to run, and what has to be done to its process before it goes on."""

    command: list[str]
    admit: Callable[[int], None] | None = None


def check(architecture: Architecture, *, what: str) -> None:
    """Whether this host and this user can install packages of an architecture.

    Raises:
        ToolMissing: naming what to install or to allow.
    """
    _interpreter(architecture)
    if os.geteuid() != 0:
        _check_user_namespace(what)


def confined(command: list[str], architecture: Architecture) -> Confined:
    """`command` in namespaces of its own, where it is root and runs `architecture`'s programs.

    Raises:
        ToolMissing: there is no qemu-user for the architecture, or no unshare.
    """
    interpreter = _interpreter(architecture)
    unshare = tools.require(["unshare"], what="installing packages")["unshare"]
    emulated = command
    if interpreter is not None:
        name, machine = _QEMU[architecture]
        script = (
            f"mount -t binfmt_misc binfmt_misc {_BINFMT} && "
            f"printf %s {shlex.quote(_registration(name, machine, interpreter))} "
            f'>{_BINFMT}/register && exec "$@"'
        )
        emulated = ["/bin/sh", "-ec", script, "sh", *command]
    if os.geteuid() != 0:
        return Confined([unshare, *_AS_ROOT, *_NAMESPACES, "--mount-proc", "--", *emulated])
    if interpreter is None:
        if not _permitted([unshare, *_NAMESPACES]):
            return Confined(command)  # root of a container that may not: as far as it gets there
        return Confined([unshare, *_NAMESPACES, "--mount-proc", "--", *command])
    # Of a user namespace only for its binfmt_misc: it has the same ids as outside, as soon as it
    # is given them.
    wait = 'read -r admitted && mount -t proc proc /proc && exec "$@"'
    return Confined(
        [unshare, "--user", *_NAMESPACES, "--", "/bin/sh", "-ec", wait, "sh", *emulated],
        admit_all_ids,
    )


def _interpreter(architecture: Architecture) -> str | None:
    """The qemu-user to register; None where the host runs the programs without."""
    if architecture is host_architecture():
        return None
    name, _ = _QEMU[architecture]
    if (_BINFMT / name).exists():
        return None
    interpreter = tools.find(f"{name}-static") or tools.find(name)
    if interpreter is None:
        raise ToolMissing(
            f"installing packages for {architecture.value} on this host needs {name}-static",
            hint="install qemu-user-static; the tiny images do not need it",
        )
    return interpreter


def _permitted(words: list[str]) -> bool:
    return _tried(words).returncode == 0


def _tried(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words, "--mount-proc", "--", "true"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        timeout=_SECONDS_TO_TRY, errors="replace",
    )  # fmt: skip


def _check_user_namespace(what: str) -> None:
    found = tools.require(["unshare", "newuidmap"], what=f"{what} as an ordinary user")
    user = getpass.getuser()
    for file, option in (("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")):
        if not _lent(Path(file), user):
            raise ToolMissing(
                f"{what} as an ordinary user needs ids to give files to: {file} lends none to "
                f"{user}",
                hint=f"usermod {option} 100000-165535 {user} (as root); or build it as root. The "
                "tiny images need none",
            )
    tried = _tried([found["unshare"], *_AS_ROOT, *_NAMESPACES])
    if tried.returncode != 0:
        raise ToolMissing(
            f"{what} as an ordinary user needs a user namespace, which cannot be made: "
            f"{tried.stderr.strip()}",
            hint="allow them (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
            "kernel.apparmor_restrict_unprivileged_userns), or build it as root",
        )


def _lent(file: Path, user: str) -> bool:
    """Whether subuid(5) or subgid(5) has a line for the user, by name or number."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split(":")[0] in (user, str(os.geteuid())) for line in lines)


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


def remove_lent(directory: Path) -> None:
    """Remove what a killed installation of an ordinary user left: files of the ids it was lent."""
    unshare = tools.find("unshare")
    remover = shutil.which("rm")
    if unshare is not None and remover is not None and os.geteuid() != 0:
        subprocess.run(
            [unshare, *_AS_ROOT, "--", remover, "-rf", "--one-file-system", "--", str(directory)],
            capture_output=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _registration(name: str, machine: int, interpreter: str) -> str:
    """binfmt_misc's line for 64-bit little-endian ELF programs of a machine, executable or
    shared; F keeps the interpreter open, so that it need not be in the root."""
    magic = b"\x7fELF\x02\x01\x01\x00" + bytes(8) + b"\x02\x00" + machine.to_bytes(2, "little")
    mask = b"\xff" * 7 + b"\x00" + b"\xff" * 8 + b"\xfe\xff\xff\xff"
    escaped = ["".join(f"\\x{byte:02x}" for byte in data) for data in (magic, mask)]
    return f":{name}:M::{escaped[0]}:{escaped[1]}:{interpreter}:F"

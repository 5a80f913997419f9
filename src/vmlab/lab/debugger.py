"""The command line of a debugger that a machine waits for: gdb on a Unix socket.

Follows Documentation/process/debugging/gdb-kernel-debugging.rst of Linux and docs/system/gdb.rst
of QEMU.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmlab.machine.architecture import Architecture, host_architecture

KERNEL_OPTION: Final = "nokaslr"
"""What the kernel is told, so that its addresses are those of its symbols."""

_NAMES: Final = {
    Architecture.X86_64: "i386:x86-64",
    Architecture.RISCV64: "riscv:rv64",
    Architecture.AARCH64: "aarch64",
    Architecture.PPC64LE: "powerpc:common64",
}
"""gdb's names of the architectures (`set architecture`)."""

_LEVELS_UP: Final = 4
"""From arch/x86/boot/bzImage to vmlinux."""


def gdb_command(
    architecture: Architecture,
    socket: Path,
    symbols: Path | None = None,
    *,
    find: Callable[[str], str | None] = shutil.which,
    host: Architecture | None = None,
) -> str:
    """The command line that connects gdb to a machine, to be pasted into a shell.

    Args:
        architecture: The guest's.
        socket: Where the machine waits.
        symbols: The kernel's vmlinux, if there is one.
        find: From a program's name to its path.
        host: The host's architecture; None is this one's.
    """
    native = architecture is (host or host_architecture())
    # Debian's and Fedora's gdb know the host's architecture only; elsewhere one gdb knows all.
    program = "gdb" if native or not find("gdb-multiarch") else "gdb-multiarch"
    words = [program, "-q", "-ex", f"set architecture {_NAMES[architecture]}"]
    if architecture is Architecture.PPC64LE:
        words += ["-ex", "set endian little"]
    words += ["-ex", f"target remote {socket}"]
    return shlex.join(words + ([str(symbols)] if symbols is not None else []))


def symbols_of(kernel: Path) -> Path | None:
    """The vmlinux that a kernel was made of, if it lies in the directories above it as a build
    leaves it; the kernel itself, if it is one."""
    if kernel.name.startswith("vmlinux"):
        return kernel.absolute()
    directories = list(kernel.absolute().parents)[:_LEVELS_UP]
    return next((path / "vmlinux" for path in directories if (path / "vmlinux").is_file()), None)

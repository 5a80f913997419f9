"""The command line that connects gdb to a machine which waits for it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from vmlab.lab.debugger import gdb_command, symbols_of
from vmlab.machine.architecture import Architecture

SOCKET = Path("/run/vm's/gdb.sock")


def has(*programs: str):  # a stand-in for shutil.which
    return lambda name: f"/usr/bin/{name}" if name in programs else None


def test_the_host_s_own_gdb_debugs_a_guest_of_its_architecture() -> None:
    command = gdb_command(
        Architecture.X86_64, SOCKET, host=Architecture.X86_64, find=has("gdb", "gdb-multiarch")
    )
    assert shlex.split(command) == [
        "gdb", "-q", "-ex", "set architecture i386:x86-64", "-ex", f"target remote {SOCKET}",
    ]  # fmt: skip


@pytest.mark.parametrize(("there", "program"), [(True, "gdb-multiarch"), (False, "gdb")])
def test_a_guest_of_another_architecture_needs_a_gdb_of_many(there: bool, program: str) -> None:
    command = gdb_command(
        Architecture.PPC64LE,
        SOCKET,
        Path("/k/vmlinux"),
        host=Architecture.X86_64,
        find=has("gdb", "gdb-multiarch") if there else has("gdb"),
    )
    words = shlex.split(command)
    assert words[0] == program and words[-1] == "/k/vmlinux"
    assert "set architecture powerpc:common64" in words and "set endian little" in words


def test_every_architecture_has_a_name_that_gdb_knows() -> None:
    for architecture in Architecture:
        assert "set architecture" in gdb_command(architecture, SOCKET)


def test_symbols_are_found_where_a_kernel_s_build_leaves_them(tmp_path: Path) -> None:
    kernel = tmp_path / "arch" / "x86" / "boot" / "bzImage"
    kernel.parent.mkdir(parents=True)
    kernel.touch()
    assert symbols_of(kernel) is None
    (tmp_path / "vmlinux").touch()
    assert symbols_of(kernel) == tmp_path / "vmlinux"
    assert symbols_of(tmp_path / "vmlinux") == tmp_path / "vmlinux"

"""Compiled C computes the same in a guest on the engine as in qemu-riscv64.

The programs need no C library: folder `compiled`. Each is compiled plainly and for the extensions
that compilers know, and brought into the guest on a disk.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from tests.integration.engine.guest import start

SOURCES = Path(__file__).parent / "compiled"
PROGRAMS = ("branches", "atomics", "floating", "integers")
COMPILER = shutil.which("riscv64-linux-gnu-gcc")
QEMU = shutil.which("qemu-riscv64-static") or shutil.which("qemu-riscv64")
MARCHES = {"plain": "rv64gc", "bits": "rv64gc_zba_zbb_zbs"}
LEVELS = ("-O1", "-O2", "-O3")
OPTIONS = ["-mabi=lp64d", "-static", "-nostdlib", "-ffreestanding", "-fno-math-errno"]
OPTIONS += ["-ffp-contract=off", "-Wl,--build-id=none"]

pytestmark = [
    pytest.mark.boots,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        COMPILER is None or QEMU is None,
        reason="needs Debian's gcc-riscv64-linux-gnu and qemu-user-static",
    ),
]


def compiled(folder: Path) -> dict[str, bytes]:
    """The programs, by the names of their files."""
    made = {}
    for program in PROGRAMS:
        for title, march in MARCHES.items():
            for level in LEVELS:
                path = folder / f"{program}-{title}{level}"
                command = [COMPILER, f"-march={march}", level, *OPTIONS, "-o", path]
                subprocess.run([*command, SOURCES / f"{program}.c", "-lgcc"], check=True)
                made[path.name] = path.read_bytes()
    return made


def test_they_say_what_they_say_in_qemu(tmp_path: Path) -> None:
    programs = compiled(tmp_path)
    expected = {
        name: subprocess.run([QEMU, tmp_path / name], capture_output=True, check=True).stdout
        for name in programs
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in programs.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "d.raw").write_bytes(packed.getvalue().ljust(4 << 20, b"\0"))
    guest = start(tmp_path, 2, "[[disks]]\nname = 'programs'\nfile = 'd.raw'\n")
    try:
        guest.run("mkdir /tmp/p && cd /tmp/p && tar xf /dev/vda")
        for name, said in expected.items():
            assert guest.run(f"/tmp/p/{name}") == said.decode(), name
    finally:
        guest.close()

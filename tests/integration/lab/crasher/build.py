"""Build the module for a kernel whose headers are installed, so that any kernel like it takes it.

    python build.py HEADERS OUTPUT [COMPILER-PREFIX]

HEADERS is /usr/src/linux-headers-VERSION (Debian's packages linux-headers-amd64, -riscv64). What
ties a module to one build of a kernel is taken out: the version in .modinfo, and the checksums of
symbols. Debian's kernels load such a module all the same (CONFIG_MODULE_FORCE_LOAD).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def build(headers: Path, output: Path, prefix: str = "") -> None:
    """Compile the module into the file `output`."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for source in ("crasher.c", "Makefile"):
            shutil.copy(HERE / source, directory)
        # The place where it was built is nobody's business.
        flags = f"KCFLAGS=-fmacro-prefix-map={directory}/="
        subprocess.run(["make", "-C", headers, f"M={directory}", flags, "modules"], check=True)
        loosen(directory / "crasher.ko", output, prefix)


def loosen(module: Path, output: Path, prefix: str = "") -> None:
    """Take out of a module what ties it to one build of a kernel."""
    untied = ["--strip-debug", "--remove-section=__versions", "--remove-section=.BTF"]
    subprocess.run([f"{prefix}objcopy", *untied, module, output], check=True)
    output.write_bytes(output.read_bytes().replace(b"\0vermagic=", b"\0wasmagic="))


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

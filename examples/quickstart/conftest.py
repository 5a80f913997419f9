"""Builds the program, and has it in each machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILERS = {
    "riscv64": "the Debian packages gcc-riscv64-linux-gnu and libc6-dev-riscv64-cross",
    "x86_64": "the Debian packages gcc-x86-64-linux-gnu and libc6-dev",
}


def pytest_configure(config):
    subprocess.run(["make", "--silent", "-C", str(HERE)], check=True)
    # The embedded engine's guests are riscv64: without a compiler for that, QEMU has to do.
    engine = (HERE / "build" / "ledger-riscv64").exists()
    if not engine and not config.option.vm_hypervisor and shutil.which("qemu-system-x86_64"):
        config.option.vm_hypervisor = ["qemu"]


@pytest.fixture
def ledger():
    """Puts the program into a machine; what is returned is its path there."""

    def install(vm):
        machine = vm.spec.architecture
        built = HERE / "build" / f"ledger-{machine}"
        if not built.exists():
            compiler = COMPILERS.get(machine, f"{machine}-linux-gnu-gcc")
            pytest.skip(f"needs {compiler}, to build for such a guest")
        vm.copy_in(built, "/bin/ledger")
        return "ledger"

    return install

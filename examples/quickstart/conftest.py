"""Builds the program, and has it in each machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


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
            pytest.skip(f"needs {machine}-linux-gnu-gcc and its libc, to build for such a guest")
        vm.copy_in(built, "/bin/ledger")
        return "ledger"

    return install

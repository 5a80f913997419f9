"""Builds the program, and has it in each machine."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection(session):
    subprocess.run(["make", "--silent", "-C", str(HERE)], check=True)


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

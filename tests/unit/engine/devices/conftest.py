"""Machines for tests of devices; what has QEMU's name runs on QEMU's devices as well."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.engine.devices.machines import Engine, Qemu, have_qemu


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a path short enough for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vmlab-d-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def engine() -> Iterator[Engine]:
    machine = Engine()
    yield machine
    machine.close()


@pytest.fixture
def qemu(short_path: Path) -> Iterator[Callable[..., Qemu]]:
    """Starts QEMU's board with further arguments."""
    if not have_qemu():
        pytest.skip("needs Debian's qemu-system-misc")
    machines: list[Qemu] = []

    def start(*arguments: str, harts: int = 1) -> Qemu:
        folder = short_path / f"q{len(machines)}"
        folder.mkdir()
        machines.append(Qemu(folder, *arguments, harts=harts))
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()

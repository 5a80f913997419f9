"""The embedded engine as a hypervisor, with guests of a few instructions: quick."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.store import IMAGE_STORE
from tests.unit.engine.process import programs

from vmlab.conformance.runner import Subject
from vmlab.hypervisors.embedded import EmbeddedHypervisor, provider
from vmlab.hypervisors.ownership import Home, Run, Store
from vmlab.machine.spec import MachineSpec

T = TypeVar("T")
MakeSpec = Callable[..., MachineSpec]


class Bench:
    """A run with the engine in it, and an event loop that its calls run on."""

    def __init__(self, home: Home) -> None:
        self.runner = asyncio.Runner()
        self.lease = Run.begin(home, reap=False)
        self.embedded: EmbeddedHypervisor = provider.open(self.lease.owner)

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 800) -> T:
        return self.runner.run(asyncio.wait_for(work, timeout))

    def close(self) -> None:
        try:
            self.run(self.embedded.close())
        finally:
            self.runner.close()
            left = self.lease.close()
        assert left == []


@pytest.fixture
def home() -> Iterator[Home]:
    """A home of the tests' own, with a path that no socket's address has room for."""
    directory = Path(tempfile.mkdtemp(prefix="vmlab-m-"))
    yield Home.open(directory / ("long" * 12))
    shutil.rmtree(directory)


@pytest.fixture
def bench(home: Home) -> Iterator[Bench]:
    made = Bench(home)
    yield made
    made.close()


@pytest.fixture
def store(home: Home) -> Store:
    return Store.open(home)


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    """A machine whose kernel is `code`; fields of the specification are given by name."""

    def make(name: str = "bare", code: bytes = programs.IDLE, **fields: Any) -> MachineSpec:
        kernel = tmp_path / f"{name}.bin"
        kernel.write_bytes(code)
        base: dict[str, Any] = {
            "name": name,
            "architecture": "riscv64",
            "memory": "8M",
            "boot": {"kernel": kernel},
            "channels": (),
        }
        return MachineSpec.of(**(base | fields))

    return make


@pytest.fixture
def image_store(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where images are: slow to fetch, they never change."""
    monkeypatch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
    return IMAGE_STORE


@pytest.fixture
def subject(image_store: Path) -> Subject:
    """The engine as the conformance suite has it."""
    from vmlab.conformance.embedded_profile import make_profile

    return Subject(provider, make_profile())

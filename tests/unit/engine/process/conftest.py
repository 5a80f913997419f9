"""Machines with small guests, in this process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmlab.engine.configuration import Boot, Configuration, Execution
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.machine import Happening, Machine

MEMORY = 8 << 20
Build = Callable[..., "Built"]


class Built:
    """A machine, and what it has told so far."""

    def __init__(self, configuration: Configuration) -> None:
        self.told: queue.SimpleQueue[tuple[Happening, str]] = queue.SimpleQueue()
        self.mistakes: list[BaseException] = []
        self.reactor = Reactor(self.mistakes.append)
        self.machine = Machine(configuration, self.reactor, lambda *told: self.told.put(told))
        self.reactor.start()

    def outcome(self) -> tuple[Happening, str]:
        return self.told.get(timeout=250)

    def close(self) -> None:
        self.machine.close()
        self.reactor.close()
        assert self.mistakes == []


@pytest.fixture(params=list(Execution), ids=lambda execution: execution.value)
def execution(request: pytest.FixtureRequest) -> Execution:
    return request.param


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Build a machine of a guest's code; fields of the configuration are changed by name."""
    made: list[Built] = []

    def make(code: bytes, **changes: Any) -> Built:
        kernel = tmp_path / f"kernel{len(made)}"
        kernel.write_bytes(code)
        fields = {"name": "vm", "memory": MEMORY, "qmp": str(tmp_path / "q.sock")}
        fields |= {"boot": Boot(kernel=str(kernel)), "scsi": False}
        made.append(Built(Configuration(**(fields | changes))))
        return made[-1]

    yield make
    for one in made:
        one.close()

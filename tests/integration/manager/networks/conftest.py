"""Networks in a network namespace of each test's own, with clients that are plugged into them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.integration.manager.wires import Client, run

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home, Store
from vmlab.manager.networks.host import HostNetworks


@pytest.fixture
def client(namespace: None) -> Iterator[Callable[[], Client]]:
    """Makes computers."""
    with contextlib.ExitStack() as stack:

        def make() -> Client:
            made = Client()
            stack.callback(made.close)
            return made

        yield make


class Bench:
    """Networks of a home in the test's namespace, and an event loop for them."""

    def __init__(self, home: Home) -> None:
        self.directory = home.directory / "manager" / "networks"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.machines = Store.open(home, "manager").owner
        self.host = HostNetworks(self.directory, self.machines)
        self._runner = asyncio.Runner()

    def run(self, work: Any, timeout: float = 280) -> Any:
        return self._runner.run(asyncio.wait_for(work, timeout))

    def another(self) -> HostNetworks:
        """The networks of the same home as another process has them, which knows nothing yet."""
        self.host = HostNetworks(self.directory, self.machines)
        return self.host

    def close(self) -> None:
        self.run(self.another().sweep([]))
        self._runner.close()
        processes.wait_for_dead_children()


@pytest.fixture
def bench(namespace: None, home: Home) -> Iterator[Bench]:
    """Networks that are removed after the test."""
    made = Bench(home)
    yield made
    made.close()


@pytest.fixture
def sh() -> Callable[..., str]:
    """`run`."""
    return run

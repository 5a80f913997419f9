"""A manager on simulated hosts that take no time, and ways to have things done by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.manager.documents import MachineDocument, OperationDocument
from vmlab.manager.manager import Manager
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.queries import find_machine, machine_document

WAIT = 120.0
"""Seconds that anything may take; nothing depends on how long it does."""

INSTANT = "\n".join(
    f"{name} = 0"
    for name in (
        *("create", "start", "stop", "kill", "pause", "resume", "delete", "status", "network"),
        *("disk", "snapshot", "restore", "fork", "resize", "fault", "migration"),
    )
)


class Place:
    """Where managers are opened: a home, and simulated hosts in it.

    `hosts` are names of hosts and what is written into their profiles.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hosts: dict[str, str] = {"simulated": ""}
        self.settings: dict[str, Any] = {}

    def profile(self, name: str, more: str) -> Path:
        """A profile of a host that takes no time, and `more`."""
        path = self.directory / f"{name}.toml"
        head = "" if "[latency]" in more else f"[latency]\n{INSTANT}\n"
        path.write_text(f'extends = "performance"\n{head}{more}\n', encoding="utf-8")
        return path

    def make(self, **changes: Any) -> Settings:
        """The settings of a manager."""
        hosts = tuple(
            HostSetting(
                name=name,
                hypervisor="simulated",
                options={"clock": "wall", "profile": str(self.profile(name, more)), "seed": "1"},
            )
            for name, more in self.hosts.items()
        )
        home = Home.open(self.directory / "home")
        return Settings(**{"home": home, "hosts": hosts, **self.settings, **changes})

    @asynccontextmanager
    async def manager(self, **changes: Any) -> AsyncIterator[Manager]:
        """A manager that is started, and closed."""
        async with await Manager.open(self.make(**changes)) as manager:
            yield manager


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Where managers are opened."""
    return Place(tmp_path)


async def do(manager: Manager, request: Any, **options: Any) -> OperationDocument:
    """Have something done, and wait for its end."""
    operation = await manager.operator.submit(request, **options)
    return await manager.operator.wait(operation.id, WAIT)


async def did(manager: Manager, request: Any, **options: Any) -> OperationDocument:
    """Have something done that has to work."""
    operation = await do(manager, request, **options)
    assert operation.state == "succeeded", operation.error or operation
    return operation


async def machine(manager: Manager, name: str) -> MachineDocument:
    """A machine as the store has it."""
    return await manager.database.read(lambda s: machine_document(s, find_machine(s, name)))


async def at_hypervisors(manager: Manager) -> Mapping[str, str]:
    """The states of all machines at all hosts, by their names there."""
    found = {}
    for host in manager.hosts.names:
        for each in await (await manager.hosts.get(host)).list():
            found[each.name] = (await each.status()).state.value
    return found


async def eventually(condition: Any, what: str) -> None:
    """Wait until `condition()`, a coroutine function, gives something true."""
    async with asyncio.timeout(WAIT):
        while not await condition():  # noqa: ASYNC110  # many things are waited for like this
            await asyncio.sleep(0.01)
    assert what


@pytest.fixture
def doing() -> Any:
    """The ways to have things done, as one object: test modules import nothing of each other."""
    return Doing


class Doing:
    """What tests do with a manager."""

    do = staticmethod(do)
    did = staticmethod(did)
    machine = staticmethod(machine)
    at_hypervisors = staticmethod(at_hypervisors)
    eventually = staticmethod(eventually)

"""A manager with an observer that looks when it is told to, on a simulated host."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.ownership import Home
from vmlab.machine.states import MachineState
from vmlab.manager.documents import (
    DiskDocument,
    FindingDocument,
    MachineDocument,
    OperationDocument,
)
from vmlab.manager.manager import Manager
from vmlab.manager.observer.checks import Thresholds
from vmlab.manager.observer.findings import documents
from vmlab.manager.observer.observer import Observer, Pace
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.requests import AttachDisk, CreateDisk, CreateMachine, Policy, RepairFinding
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.queries import (
    disk_document,
    find_disk,
    find_finding,
    find_machine,
    finding_document,
    list_operations,
    machine_document,
)
from vmlab.manager.store.tables import MachineRow, NetworkRow, OperationRow, now

WAIT = 240.0
"""Seconds that anything may take; nothing depends on how long it does."""

_TIMES = (
    *("create", "start", "stop", "kill", "pause", "resume", "delete", "status", "network"),
    *("disk", "snapshot", "restore", "fork", "resize", "fault", "migration"),
)
PROBE = "vmlab.probe"


class Watched:
    """A manager whose observer is told when to look.

    Args:
        manager: The manager, started.
    """

    def __init__(self, manager: Manager) -> None:
        self.manager = manager

    # What is done.

    async def do(self, request: Any, **options: Any) -> OperationDocument:
        """Have something done, and wait for its end."""
        operation = await self.manager.operator.submit(request, **options)
        return await self.manager.operator.wait(operation.id, WAIT)

    async def did(self, request: Any, **options: Any) -> OperationDocument:
        """Have something done that has to work."""
        operation = await self.do(request, **options)
        assert operation.state == "succeeded", operation.error or operation
        return operation

    async def machine_of(self, name: str, **fields: Any) -> MachineDocument:
        """A machine that runs."""
        spec = {"architecture": "x86_64", "memory": "64M", "channels": [PROBE]}
        given = {"host": "simulated", "start": True, "spec": spec} | fields
        await self.did(CreateMachine(name=name, **given))
        return await self.machine(name)

    async def disk_of(self, name: str, machine: str | None = None) -> DiskDocument:
        """A disk of a megabyte, attached to a machine if one is named."""
        await self.did(CreateDisk(name=name, size="1M"))
        if machine is not None:
            await self.did(AttachDisk(disk=name, machine=machine))
        return await self.disk(name)

    async def repaired(
        self, finding: FindingDocument, action: Policy, **options: Any
    ) -> OperationDocument:
        """Have a finding repaired, which has to work."""
        return await self.did(RepairFinding(finding=finding.id, action=action, **options))

    # What there is.

    async def machine(self, name: str) -> MachineDocument:
        """A machine as the store has it."""
        return await self.manager.database.read(
            lambda s: machine_document(s, find_machine(s, name))
        )

    async def disk(self, name: str) -> DiskDocument:
        """A disk as the store has it."""
        return await self.manager.database.read(lambda s: disk_document(s, find_disk(s, name)))

    async def at_host(self, name: str) -> Machine:
        """A machine of the store's at its hypervisor."""
        return await self.manager.machine((await self.machine(name)).id)

    async def state_at_host(self, name: str) -> MachineState:
        """What its hypervisor says that it does."""
        return (await (await self.at_host(name)).status()).state

    async def finding(self, id_: str) -> FindingDocument:
        """A finding, open or not."""
        return await self.manager.database.read(lambda s: finding_document(s, find_finding(s, id_)))

    async def operations(self) -> list[OperationDocument]:
        """All operations."""
        page = await self.manager.database.read(lambda s: list_operations(s, limit=200))
        return list(page.items)

    # What is found.

    async def sweep(self) -> list[FindingDocument]:
        """What there is to find."""
        return await self.manager.observer.sweep()

    async def found(self, code: str) -> FindingDocument:
        """The one thing that there is to find, which has that code."""
        findings = await self.sweep()
        assert [each.code for each in findings] == [code], findings
        return findings[0]

    async def nothing(self) -> None:
        """There is nothing to find."""
        assert await self.sweep() == []

    @asynccontextmanager
    async def under_way(self, *keys: str) -> AsyncIterator[None]:
        """An operation of another manager's, as far as the store tells, with those locks."""

        def begin(session: Any) -> str:
            row = OperationRow(
                kind="machine.stop",
                state="running",
                request={},
                lock_keys=list(keys),
                started=now(),
            )
            session.add(row)
            session.flush()
            return row.id

        def end(session: Any) -> None:
            session.get_one(OperationRow, id_).state = "succeeded"

        id_ = await self.manager.database.write(begin)
        yield
        await self.manager.database.write(end)

    async def told(self, kind: str) -> Any:
        """Wait for an event of that kind, from now on."""
        async for event in self.manager.database.events.subscribe(None):
            if event.kind == kind:
                return event
        raise AssertionError(f"the store was closed, and no {kind} came")

    async def forget(self, name: str) -> str:
        """Take a machine out of the store, and leave it where it is; its name there."""

        def remove(session: Any) -> str:
            row = session.get_one(MachineRow, id_)
            session.delete(row)
            return machine_name(row.id)

        id_ = (await self.machine(name)).id
        return await self.manager.database.write(remove)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path: sockets are made below it."""
    made = Path(tempfile.mkdtemp(prefix="vmh-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def settings(directory: Path) -> Settings:
    """Of a manager that sweeps when it is told to and not before."""
    profile = directory / "instant.toml"
    times = "\n".join(f"{name} = 0" for name in _TIMES)
    profile.write_text(f'extends = "performance"\n[latency]\n{times}\n', encoding="utf-8")
    options = {"clock": "wall", "profile": str(profile), "seed": "1"}
    host = HostSetting(name="simulated", hypervisor="simulated", options=options)
    return Settings(home=Home.open(directory / "home"), hosts=(host,), sweep_seconds=86400)


QUICK = Pace(settle=0.01, guest_every=86400)


@asynccontextmanager
async def watched(
    settings: Settings,
    *,
    events: bool = False,
    thresholds: Thresholds | None = None,
    pace: Pace = QUICK,
) -> AsyncIterator[Watched]:
    """A manager whose observer looks when it is told to, and with `events` by itself."""
    manager = await Manager.open(settings)
    manager.observer = Observer(
        manager, pace=pace, thresholds=thresholds or Thresholds(free_share=0.0)
    )
    if not events:
        manager.observer.start = _look_when_told
    async with manager:
        yield Watched(manager)
        # What serves networks lives on without a manager.
        for network in await manager.database.read(
            lambda s: list(s.scalars(select(NetworkRow.id)))
        ):
            await manager.networks.teardown(network)


async def _look_when_told() -> None:
    """In place of `Observer.start`: no task is begun."""


@pytest.fixture
def run(settings: Settings) -> Callable[..., None]:
    """Runs a coroutine function with what `watched` makes; settings may be changed for it."""

    def run_(test: Callable[[Watched], Awaitable[None]], **options: Any) -> None:
        made = {
            name: options.pop(name) for name in ("events", "thresholds", "pace") if name in options
        }

        async def whole() -> None:
            async with watched(settings.model_copy(update=options), **made) as manager:
                try:
                    async with asyncio.timeout(WAIT):
                        await test(manager)
                except TimeoutError as error:
                    found = await manager.manager.database.read(documents)
                    done = [(each.kind, each.state) for each in await manager.operations()]
                    raise AssertionError(f"it waits; findings: {found}; done: {done}") from error

        asyncio.run(whole())

    return run_


@pytest.fixture
def opened(settings: Settings) -> Callable[..., Any]:
    """Opens a manager of the same home each time, as `watched` does."""

    def open_(**options: Any) -> Any:
        return watched(settings, **options)

    return open_

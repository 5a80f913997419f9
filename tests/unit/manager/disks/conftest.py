"""A manager on simulated hosts, and a person who asks it for things and waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import VmlabError
from vmlab.manager.documents import DiskDocument, MachineDocument, OperationDocument
from vmlab.manager.manager import Manager
from vmlab.manager.requests import CreateMachine
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store import queries

PATIENCE = 120.0


class Asking:
    """What a person does with a manager."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager

    async def ask(self, request: Any, **more: Any) -> OperationDocument:
        """Have something done, whatever comes of it."""
        operation = await self.manager.operator.submit(request, **more)
        return await self.manager.operator.wait(operation.id, PATIENCE)

    async def do(self, request: Any, **more: Any) -> dict[str, Any]:
        """Have something done that works."""
        operation = await self.ask(request, **more)
        assert operation.state == "succeeded", operation.error or operation
        return operation.result or {}

    async def fail(self, request: Any, **more: Any) -> str:
        """Have something done that fails; what is said then."""
        operation = await self.ask(request, **more)
        assert operation.state == "failed", operation
        assert operation.error is not None
        return str(operation.error["message"])

    async def refuse(self, request: Any, **more: Any) -> VmlabError:
        """Ask for something that is refused at once."""
        with pytest.raises(VmlabError) as refused:
            await self.manager.operator.submit(request, **more)
        return refused.value

    async def machine(self, name: str) -> MachineDocument:
        """A machine by the store's word."""
        return await self.manager.database.read(
            lambda s: queries.machine_document(s, queries.find_machine(s, name))
        )

    async def disk(self, name: str) -> DiskDocument:
        """A disk by the store's word."""
        return await self.manager.database.read(
            lambda s: queries.disk_document(s, queries.find_disk(s, name))
        )

    async def create(self, name: str, **fields: Any) -> MachineDocument:
        """A machine at rest, with a disk and a NIC of its own."""
        spec = {
            "memory": "64M",
            "disks": [{"name": "root", "size": "16M"}],
            "nics": [{"name": "net0", "network": "none"}],
        }
        fields = {"spec": spec, "host": "simulated", **fields}
        await self.do(CreateMachine(name=name, **fields))
        return await self.machine(name)

    async def guest(self, name: str) -> Any:
        """The machine's hardware, whose guest writes to its disks."""
        return (await self.manager.machine((await self.machine(name)).id)).hardware

    async def events(self, kind: str) -> list[dict[str, Any]]:
        """What was told of one kind, the oldest first."""
        found = await self.manager.database.read(
            lambda s: queries.list_events(s, after=0, limit=1000)
        )
        return [dict(event.data) for event in found.items if event.kind == kind]


Story = Callable[[Asking], Awaitable[None]]


def simulated_hosts(directory: Path) -> Settings:
    """A home with two hosts of the simulated hypervisor."""
    return Settings(
        home=Home.open(directory / "home"),
        hosts=[
            HostSetting(name="simulated", hypervisor="simulated"),
            HostSetting(name="other", hypervisor="simulated"),
        ],
    )


def told(story: Story, settings: Settings) -> None:
    """Run a story with a manager that is opened for it."""

    async def with_manager() -> None:
        async with await Manager.open(settings) as manager:
            await story(Asking(manager))

    asyncio.run(with_manager())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two hosts of the simulated hypervisor."""
    return simulated_hosts(tmp_path)


@pytest.fixture
def tell(settings: Settings) -> Callable[..., None]:
    """Run a story with a manager that is opened for it; another one follows in the same home."""

    def run(story: Story, **changes: Any) -> None:
        told(story, settings.model_copy(update=changes))

    return run

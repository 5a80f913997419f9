"""A manager on real hypervisors, in a home of the tests' own, with the images that are there."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.manager.wires import own_namespace
from tests.patience import patient
from tests.store import IMAGE_STORE

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Home
from vmlab.manager.documents import DiskDocument, MachineDocument, OperationDocument
from vmlab.manager.manager import Manager
from vmlab.manager.operator import attachments
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store import queries

PATIENCE = 900.0
IMAGES = {"qemu": "debian-12-amd64-tiny", "embedded": "debian-13-riscv64-tiny"}


class Asking:
    """What a person does with a manager."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager

    async def ask(self, request: Any) -> OperationDocument:
        """Have something done, whatever comes of it."""
        operation = await self.manager.operator.submit(request)
        return await self.manager.operator.wait(operation.id, PATIENCE)

    async def do(self, request: Any) -> dict[str, Any]:
        """Have something done that works."""
        operation = await self.ask(request)
        assert operation.state == "succeeded", operation.error or operation
        return operation.result or {}

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

    async def run(self, name: str, command: str) -> str:
        """What a command in a machine's guest prints."""
        guest = await self.manager.guests.get((await self.machine(name)).id, timeout=PATIENCE)
        return (await guest.succeed(command, timeout=PATIENCE)).stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    with patient():
        yield


@pytest.fixture
def home() -> Iterator[Home]:
    directory = Path(tempfile.mkdtemp(prefix="vmlab-m-"))
    yield Home.open(directory)
    shutil.rmtree(directory)


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test is in a network namespace of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for a network namespace")
    with own_namespace():
        # Programs are started by a thread that may have been there before.
        monkeypatch.setattr(processes, "_spawner", None)
        yield


@pytest.fixture
def tell(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a story with a manager of two hosts of one hypervisor; nothing of it may be left."""
    monkeypatch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
    monkeypatch.setattr(attachments, "_GUEST_ANSWERS_S", PATIENCE)

    def run(story: Callable[[Asking], Awaitable[None]], hypervisor: str) -> None:
        hosts = [
            HostSetting(name=hypervisor, hypervisor=hypervisor),
            HostSetting(name="other", hypervisor=hypervisor),
        ]

        async def with_manager() -> None:
            async with await Manager.open(Settings(home=home, hosts=hosts)) as manager:
                asking = Asking(manager)
                try:
                    await story(asking)
                finally:
                    for host in ("other", hypervisor):
                        for machine in await (await manager.hosts.get(host)).list():
                            await machine.delete(force=True)

        asyncio.run(with_manager())

    return run

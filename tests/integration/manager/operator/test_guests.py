"""Machines with real guests through a manager's operations: their life, and their next manager."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.hypervisors.ownership import Home
from vmlab.manager.documents import OperationDocument
from vmlab.manager.manager import Manager
from vmlab.manager.operator import lifecycle
from vmlab.manager.requests import (
    CreateMachine,
    DeleteMachine,
    EmergencyStop,
    PauseMachine,
    RestartMachine,
    ResumeMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.queries import find_machine, machine_document

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(1800)]

PATIENCE = 600.0
IMAGES = {"embedded": "debian-13-riscv64-tiny", "qemu": "debian-12-amd64-tiny"}


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home with a path that is short enough for sockets; nothing is left in it."""
    monkeypatch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
    monkeypatch.setattr(lifecycle, "_TERMINATE_S", PATIENCE)
    directory = Path(tempfile.mkdtemp(prefix="vmlab-m-"))
    yield Home.open(directory)
    shutil.rmtree(directory)


async def do(manager: Manager, request: Any) -> OperationDocument:
    """Have something done that has to work."""
    operation = await manager.operator.submit(request)
    operation = await manager.operator.wait(operation.id, PATIENCE)
    assert operation.state == "succeeded", operation.error or operation
    return operation


async def state(manager: Manager, name: str) -> str:
    """What the store says that a machine does."""
    document = await manager.database.read(lambda s: machine_document(s, find_machine(s, name)))
    return document.state.value


@pytest.mark.parametrize("hypervisor", ["embedded", "qemu"])
def test_a_guest_lives_through_its_managers_and_ends_by_the_means_that_it_takes(
    home: Home, hypervisor: str
) -> None:
    if hypervisor == "qemu":
        need("qemu-system-x86_64")
    hosts = (HostSetting(name=hypervisor, hypervisor=hypervisor),)
    settings = Settings(home=home, hosts=hosts, sweep_seconds=3600)

    async def story() -> None:
        async with await Manager.open(settings) as manager:
            # The preferred host is found by the image's architecture.
            request = CreateMachine(name="web", image=IMAGES[hypervisor], memory="192M", start=True)
            made = await do(manager, request)
            machine_id = made.target
            assert machine_id is not None
            guest = await manager.guests.get(machine_id, timeout=PATIENCE)
            assert (await guest.succeed("hostname")).stdout.strip() == "web"
            boot = (await guest.succeed("cat /proc/sys/kernel/random/boot_id")).stdout
            pid = (await (await manager.machine(machine_id)).info()).pid
        # The machine lives on; the next manager finds the same one.
        async with await Manager.open(settings) as manager:
            assert (await (await manager.machine(machine_id)).info()).pid == pid
            guest = await manager.guests.get(machine_id, timeout=PATIENCE)
            assert (await guest.succeed("cat /proc/sys/kernel/random/boot_id")).stdout == boot
            await do(manager, PauseMachine(machine="web"))
            await do(manager, ResumeMachine(machine="web"))
            await do(manager, RestartMachine(machine="web"))
            guest = await manager.guests.get(machine_id, timeout=PATIENCE)
            assert (await guest.succeed("cat /proc/sys/kernel/random/boot_id")).stdout != boot
            stopped = await do(manager, StopMachine(machine="web", timeout=PATIENCE))
            assert stopped.result == {"how": "ask"}
            await do(manager, StartMachine(machine="web"))
            guest = await manager.guests.get(machine_id, timeout=PATIENCE)
            # A guest that does not obey, in no time: its process is told to end, and does.
            await guest.succeed("rm /etc/acpi/PWRF/00000080")
            stopped = await do(manager, StopMachine(machine="web", timeout=0.001))
            assert stopped.result == {"how": "terminate"}
            assert await state(manager, "web") == "stopped"
            await do(manager, StartMachine(machine="web"))
            done = await do(manager, EmergencyStop())
            assert done.result is not None
            assert done.result["stopped"] == ["web"]
            await do(manager, DeleteMachine(machine="web"))
            assert (
                list((await manager.hosts.get(hypervisor)).owner.directory.glob("machines/*/*"))
                == []
            )

    asyncio.run(story())

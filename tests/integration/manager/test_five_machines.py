"""Five machines of one template live at once, each with a guest of its own, and leave nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select
from tests.integration.manager.conftest import IMAGES, PATIENCE
from tests.needs import need

from vmlab.hypervisors import processes
from vmlab.machine.sizes import MIB
from vmlab.manager.requests import (
    CreateMachine,
    CreateNetwork,
    CreateTemplate,
    DeleteMachine,
    DeleteNetwork,
    NewNic,
    StopMachine,
)
from vmlab.manager.store.tables import (
    AddressRow,
    DiskRow,
    MachineRow,
    NetworkRow,
    NicRow,
    ReservationRow,
)

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(1800)]

STUTTERING = {"guest-agent-unreachable", "clock-drift"}
"""What is found of guests on a host that stands still for a while."""
NAMES = [f"web-{number}" for number in range(5)]


@pytest.mark.parametrize("hypervisor", ["qemu", "embedded"])
def test_five_machines_live_at_once_and_leave_nothing(
    tell: Callable[..., None], hypervisor: str
) -> None:
    if hypervisor == "qemu":
        need("qemu-system-x86_64")

    async def story(asking: Any) -> None:
        manager = asking.manager
        # All of them on two cores: none is said not to answer that only needs its time.
        manager.observer._eyes._guest_seconds = PATIENCE

        async def all_of_them(act: Callable[[str], Any]) -> list[Any]:
            return list(await asyncio.gather(*map(act, NAMES)))

        async def findings() -> list[str]:
            deadline = time.monotonic() + PATIENCE
            while True:
                # How much room there is here is nothing of the machines'.
                open_ = await manager.observer.sweep()
                found = [each for each in open_ if each.code != "storage-low"]
                # A host that stood still is soon found to go on; what else is there stays.
                waiting = {each.code for each in found} <= STUTTERING
                if not found or not waiting or time.monotonic() > deadline:
                    return [each.message for each in found]

        await asking.do(CreateTemplate(name="small", image=IMAGES[hypervisor], memory=192 * MIB))
        await asking.do(CreateNetwork(name="lan", mode="isolated", subnet="10.9.0.0/24"))
        nics = (NewNic(network="lan"),)
        await all_of_them(
            lambda name: asking.do(
                CreateMachine(name=name, template="small", host=hypervisor, nics=nics, start=True)
            )
        )
        # Each is itself, and all are there at the same time.
        said = await all_of_them(
            lambda name: asking.run(name, "hostname; cat /proc/sys/kernel/random/boot_id")
        )
        assert [each.split()[0] for each in said] == NAMES
        assert len({each.split()[1] for each in said}) == len(NAMES)
        machines = await all_of_them(asking.machine)
        assert {machine.state for machine in machines} == {"running"}
        assert len({machine.nics[0].addresses for machine in machines}) == len(NAMES)
        hypervisor_ = await manager.hosts.get(hypervisor)
        assert len({(await each.info()).pid for each in await hypervisor_.list()}) == len(NAMES)
        assert await findings() == []

        stopped = await all_of_them(
            lambda name: asking.do(StopMachine(machine=name, timeout=PATIENCE))
        )
        # Each guest had the time to obey.
        assert [each["how"] for each in stopped] == ["ask"] * len(NAMES)
        assert {machine.state for machine in await all_of_them(asking.machine)} == {"stopped"}
        await all_of_them(lambda name: asking.do(DeleteMachine(machine=name)))
        await asking.do(DeleteNetwork(network="lan"))

        def rows(session: Any) -> dict[str, int]:
            tables = (MachineRow, NicRow, DiskRow, AddressRow, NetworkRow, ReservationRow)
            return {
                table.__tablename__: session.scalar(select(func.count()).select_from(table))
                for table in tables
            }

        assert set((await manager.database.read(rows)).values()) == {0}
        assert await hypervisor_.list() == []
        owner = hypervisor_.owner
        assert [each for each in processes.recorded(owner.directory) if each.alive] == []
        assert list(owner.directory.glob("machines/*/*")) == []
        assert list(manager.storage.directory.iterdir()) == []
        assert list(manager.settings.directory.glob("boot/*")) == []
        assert await findings() == []

    tell(story, hypervisor)

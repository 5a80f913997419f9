"""While everything changes all the time, and the observer looks all the time, it finds nothing."""

from __future__ import annotations

import asyncio

from sqlalchemy import select

from vmlab.manager.observer.observer import Pace
from vmlab.manager.requests import (
    AttachDisk,
    CreateDisk,
    DeleteDisk,
    DeleteMachine,
    DetachDisk,
    PauseMachine,
    ResizeDisk,
    ResumeMachine,
    StartMachine,
    StopMachine,
)
from vmlab.manager.store.tables import FindingRow

LIVES = 6


def test_no_operation_ever_looks_like_a_difference(run):
    async def live(watched, number):
        name, disk = f"vm-{number}", f"disk-{number}"
        await watched.machine_of(name)
        await watched.did(CreateDisk(name=disk, size="1M"))
        await watched.did(AttachDisk(disk=disk, machine=name))
        await watched.did(PauseMachine(machine=name))
        await watched.did(ResumeMachine(machine=name))
        await watched.did(DetachDisk(disk=disk))
        await watched.did(ResizeDisk(disk=disk, size="2M"))
        await watched.did(AttachDisk(disk=disk, machine=name))
        await watched.did(StopMachine(machine=name))
        await watched.did(StartMachine(machine=name))
        await watched.did(DeleteMachine(machine=name, force=True))
        await watched.did(DeleteDisk(disk=disk))

    async def test(watched):
        await asyncio.gather(*(live(watched, number) for number in range(LIVES)))
        assert watched.manager.observer.sweeps > 0
        found = await watched.manager.database.read(
            lambda s: [(row.code, row.message) for row in s.scalars(select(FindingRow))]
        )
        assert found == []
        assert await watched.sweep() == []

    # As little time between two looks as can be, and hardly any between two sweeps.
    pace = Pace(settle=0.0, guest_every=0.05, guest_answers=120.0, share=1.0)
    run(test, events=True, sweep_seconds=0.001, pace=pace)

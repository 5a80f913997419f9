"""A backup of a manager that is at work: the next manager goes on from it, and all fits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tests.unit.manager.operator.conftest import Place

from vmlab.machine.states import MachineState
from vmlab.manager.documents import ENDED
from vmlab.manager.manager import Manager
from vmlab.manager.requests import AttachDisk, CreateDisk, CreateMachine, SnapshotMachine
from vmlab.manager.settings import Settings
from vmlab.manager.store import backup
from vmlab.manager.store.tables import (
    DiskRow,
    MachineRow,
    OperationRow,
    ReservationRow,
    StepRow,
)

MACHINES = 20
SPEC = {"memory": "64M", "disks": [{"name": "root", "size": "1M"}]}


async def work(manager: Manager) -> list[str]:
    """Have machines made, given disks and saved, all at once; ids of the operations."""
    ids = []
    for number in range(MACHINES):
        name = f"m{number}"
        more: Any = SnapshotMachine(machine=name, name="s")
        machine = CreateMachine(name=name, spec=SPEC, host="simulated", start=True)
        ids.append((await manager.operator.submit(machine)).id)
        if number % 2:
            disk = CreateDisk(name=f"d{number}", size=1 << 20)
            ids.append((await manager.operator.submit(disk)).id)
            more = AttachDisk(disk=f"d{number}", machine=name)
        for id_ in ids[-2:]:
            await manager.operator.wait(id_)
        ids.append((await manager.operator.submit(more)).id)
    return ids


def problems(s: Session) -> list[str]:
    """What does not fit together in a store in which nothing is under way."""
    wrong = []
    for row in s.scalars(select(OperationRow)):
        if row.state not in ENDED:
            wrong.append(f"{row.kind} of {row.target_name} is {row.state}")
        if row.error and "mistake in vmlab" in (row.error.get("hint") or ""):
            wrong.append(f"{row.kind} of {row.target_name}: {row.error['message']}")
    if promised := s.scalar(select(func.count()).select_from(ReservationRow)):
        wrong.append(f"{promised} promises are left")
    for machine in s.scalars(select(MachineRow)):
        if not MachineState(machine.state).is_stable or machine.operation_id is not None:
            wrong.append(f"machine {machine.name} is {machine.state}: {machine.operation_id}")
    for disk in s.scalars(select(DiskRow)):
        if disk.state != ("attached" if disk.machine_id else "available"):
            wrong.append(f"disk {disk.name} is {disk.state}")
    return wrong


def under_way(s: Session) -> int:
    """How many operations have a journal of which a part is done, and have not ended."""
    return len(
        s.scalars(
            select(OperationRow.id)
            .join(StepRow, StepRow.operation_id == OperationRow.id)
            .where(OperationRow.state == "running")
            .distinct()
        ).all()
    )


def restored_by_itself(file: Path, settings: Settings) -> int:
    """Restore without a manager; returns how many operations were under way."""
    from vmlab.manager.store.database import Database

    backup.restore(settings, file, replace=True)
    database = Database.open(settings)
    try:
        return database.read_now(under_way)
    finally:
        database.close()


@pytest.mark.timeout(900)
def test_manager_goes_on_from_a_backup_that_was_taken_while_it_worked(tmp_path: Path) -> None:
    place = Place(tmp_path)
    # Operations take a while, so that some are under way whenever one looks.
    place.hosts["simulated"] = "[latency]\ncreate = 0.02\nstart = 0.05\nsnapshot = 0.1\ndisk = 0.05"
    settings = place.make()
    files = [tmp_path / f"b{number}" for number in range(3)]

    async def at_work() -> None:
        async with await Manager.open(settings) as manager:
            events = manager.database.events.subscribe()
            async with asyncio.timeout(800), asyncio.TaskGroup() as group:
                working = group.create_task(work(manager))
                for file in files:
                    ended = 0
                    async for event in events:
                        ended += event.kind == "operation.ended"
                        if ended == 12:
                            break
                    await asyncio.to_thread(backup.save, settings, file)
            for id_ in working.result():
                await manager.operator.wait(id_)
            assert await manager.database.read(problems) == []

    async def afterwards() -> list[str]:
        async with await Manager.open(settings) as manager:
            ids = await manager.database.read(lambda s: list(s.scalars(select(OperationRow.id))))
            for id_ in ids:
                await manager.operator.wait(id_)
            return await manager.database.read(problems)

    asyncio.run(at_work())
    were = []
    for file in files:
        were.append(restored_by_itself(file, settings))
        assert asyncio.run(afterwards()) == []
    assert any(were), "no backup has met an operation that was under way: it was no load"

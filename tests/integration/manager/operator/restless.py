"""A manager that does mixed work at random until it is killed; run as a program by test_crashes.

It begins by taking up what the one before it left, says so when that has ended ("settled"), then
what is wrong ("problem ...") and that it has looked ("whole"), and goes on. Each operation that was
acknowledged is a line ("ack ID").
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import VmlabError
from vmlab.machine.states import MachineState
from vmlab.manager.documents import ENDED
from vmlab.manager.manager import Manager
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.requests import (
    REQUEST,
    AttachDisk,
    CloneMachine,
    CreateDisk,
    CreateMachine,
    CreateNetwork,
    DeleteDisk,
    DeleteMachine,
    DeleteSnapshot,
    DetachDisk,
    EmergencyStop,
    NewNic,
    PauseMachine,
    ResizeDisk,
    ResizeMachine,
    RestartMachine,
    RestoreMachine,
    ResumeMachine,
    SnapshotMachine,
    StartMachine,
    StopMachine,
    UpdateMachine,
)
from vmlab.manager.settings import HostSetting, Settings
from vmlab.manager.store.tables import (
    DiskRow,
    MachineRow,
    OperationRow,
    ReservationRow,
    SnapshotRow,
)

MACHINES = [f"m{n}" for n in range(8)]
DISKS = [f"d{n}" for n in range(6)]
SPEC = {"memory": "64M", "disks": [{"name": "root", "size": "1M"}]}
WAIT = 240.0
MOST_QUEUED = 24


def say(line: str) -> None:
    print(line, flush=True)


# ------------------------------------------------------------------------ what has to be true


async def problems(manager: Manager, acknowledged: list[str]) -> list[str]:
    """What is wrong with the store, and between it and the hypervisors; nothing is under way."""
    wrong = await manager.database.read(_in_the_store, acknowledged)
    rows = await manager.database.read(_machines)
    there: dict[str, Any] = {}
    for host in manager.hosts.names:
        for machine in await (await manager.hosts.get(host)).list():
            if machine.name in there:
                wrong.append(f"{machine.name} is on two hosts")
            there[machine.name] = machine
    known = {machine_name(row["id"]) for row in rows}
    wrong += [f"{name} is of no machine of the store" for name in sorted(set(there) - known)]
    wrong += [f"{name} is not at its hypervisor" for name in sorted(known - set(there))]
    for row in rows:
        machine = there.get(machine_name(row["id"]))
        if machine is None:
            continue
        state = (await machine.status(timeout=WAIT)).state
        failed_but_at_rest = row["state"] == "failed" and not state.is_live
        if row["state"] != state and not failed_but_at_rest:
            wrong.append(f"{row['name']} is {state}, and {row['state']} in the store")
        has = {disk.name for disk in machine.spec.disks if disk.file is not None}
        if has != set(row["disks"]):
            wrong.append(f"{row['name']} has {sorted(has)}, and {row['disks']} in the store")
        kept = sorted(snapshot.name for snapshot in await machine.snapshots(timeout=WAIT))
        if kept != sorted(row["snapshots"]):
            wrong.append(f"{row['name']} keeps {kept}, and {row['snapshots']} in the store")
    files = {found.disk for found in (await manager.storage.usage()).files}
    disks = await manager.database.read(lambda s: set(s.scalars(select(DiskRow.id))))
    wrong += [f"the file of disk {id_} is left" for id_ in sorted(map(str, files - disks))]
    wrong += [f"the file of disk {id_} is lost" for id_ in sorted(disks - files)]
    # The observer looks at processes, addresses, links and locks, too.
    found = await manager.observer.sweep(asked=len(rows) + 1)
    wrong += [f"{each.code}: {each.message}" for each in found if each.code != "storage-low"]
    # Who was told nothing, because the manager died, asks again with the same key.
    for row in await manager.database.read(_last_operations):
        request = REQUEST.validate_python(row["request"])
        again = await manager.operator.submit(request, idempotency_key=row["key"])
        if again.id != row["id"]:
            wrong.append(f"operation {row['id']} ({again.kind}) is doubled by {again.id}")
    return wrong


def _in_the_store(session: Session, acknowledged: list[str]) -> list[str]:
    wrong = []
    operations = {row.id: row for row in session.scalars(select(OperationRow))}
    wrong += [f"operation {id_} is lost" for id_ in acknowledged if id_ not in operations]
    for row in operations.values():
        if row.state not in ENDED:
            wrong.append(f"operation {row.id} ({row.kind}) is {row.state}: {row.message}")
        if row.error and "mistake in vmlab" in (row.error.get("hint") or ""):
            wrong.append(f"operation {row.id} ({row.kind}): {row.error['message']}")
        if row.error and row.error.get("notes"):
            wrong.append(f"operation {row.id} ({row.kind}): {row.error['notes']}")
    promised = session.scalar(select(func.count()).select_from(ReservationRow))
    if promised:
        wrong.append(f"{promised} promises are left")
    for row in session.scalars(select(MachineRow)):
        if row.operation_id is not None:
            wrong.append(f"machine {row.name} is still in the hands of {row.operation_id}")
        if not MachineState(row.state).is_stable:
            wrong.append(f"machine {row.name} is {row.state}")
    for disk in session.scalars(select(DiskRow)):
        expected = "attached" if disk.machine_id is not None else "available"
        if disk.state != expected:
            wrong.append(f"disk {disk.name} is {disk.state}, not {expected}: {disk.reason}")
    return wrong


def _last_operations(session: Session) -> list[dict[str, Any]]:
    query = select(OperationRow).order_by(OperationRow.number.desc()).limit(5)
    return [
        {"id": row.id, "request": dict(row.request), "key": row.idempotency_key}
        for row in session.scalars(query)
    ]


def _machines(session: Session) -> list[dict[str, Any]]:
    return [
        {
            "id": row.id,
            "name": row.name,
            "state": row.state,
            "disks": sorted(str(disk.device) for disk in row.disks),
            "snapshots": list(
                session.scalars(select(SnapshotRow.name).where(SnapshotRow.machine_id == row.id))
            ),
        }
        for row in session.scalars(select(MachineRow))
    ]


# ------------------------------------------------------------------------ work


def requests(luck: random.Random) -> list[Callable[[], Any]]:
    """Makes of requests, the more likely ones more than once."""

    def machine() -> str:
        return luck.choice(MACHINES)

    def disk() -> str:
        return luck.choice(DISKS)

    def create() -> CreateMachine:
        return CreateMachine(
            name=machine(),
            spec=SPEC,
            start=luck.random() < 0.6,
            nics=(NewNic(network="lan"),) if luck.random() < 0.5 else (),
            disks=(disk(),) if luck.random() < 0.2 else (),
        )

    return [
        *[create] * 6,
        *[lambda: StartMachine(machine=machine())] * 5,
        *[lambda: StopMachine(machine=machine(), graceful=luck.random() < 0.5)] * 4,
        *[lambda: DeleteMachine(machine=machine(), force=True)] * 3,
        *[lambda: AttachDisk(disk=disk(), machine=machine())] * 5,
        *[lambda: DetachDisk(disk=disk())] * 3,
        *[lambda: CreateDisk(name=disk(), size="1M")] * 3,
        lambda: DeleteDisk(disk=disk()),
        lambda: ResizeDisk(disk=disk(), size="2M"),
        lambda: PauseMachine(machine=machine()),
        lambda: ResumeMachine(machine=machine()),
        lambda: RestartMachine(machine=machine(), graceful=luck.random() < 0.5),
        lambda: UpdateMachine(machine=machine(), labels={"a": str(luck.random())}),
        lambda: ResizeMachine(machine=machine(), vcpus=luck.randint(1, 3)),
        lambda: SnapshotMachine(machine=machine(), name=luck.choice("st")),
        lambda: DeleteSnapshot(machine=machine(), name=luck.choice("st")),
        lambda: RestoreMachine(machine=machine(), snapshot=luck.choice("st")),
        lambda: CloneMachine(machine=machine(), name=machine()),
        lambda: CreateNetwork(name="lan", subnet="10.77.0.0/24"),
    ]


def requests_without_guest(luck: random.Random) -> list[Callable[[], Any]]:
    """The same for machines in which nobody answers: nothing that waits for a guest."""

    def machine() -> str:
        return luck.choice(MACHINES[:4])

    def create() -> CreateMachine:
        return CreateMachine(name=machine(), spec=SPEC, start=luck.random() < 0.6)

    return [
        *[create] * 5,
        *[lambda: StartMachine(machine=machine())] * 4,
        *[lambda: StopMachine(machine=machine(), graceful=False)] * 2,
        *[lambda: StopMachine(machine=machine(), timeout=0.05)] * 2,
        *[lambda: DeleteMachine(machine=machine(), force=True)] * 2,
        *[lambda: CreateDisk(name=luck.choice(DISKS), size="1M")] * 2,
        lambda: DeleteDisk(disk=luck.choice(DISKS)),
        lambda: PauseMachine(machine=machine()),
        lambda: ResumeMachine(machine=machine()),
        lambda: RestartMachine(machine=machine(), graceful=False),
        lambda: UpdateMachine(machine=machine(), labels={"a": str(luck.random())}),
    ]


async def work(manager: Manager, luck: random.Random, count: int, *, real: bool) -> None:
    """Ask for so many things at random; what cannot be is refused, and that is fine."""
    kinds = requests_without_guest(luck) if real else requests(luck)
    asked: list[str] = []
    for _ in range(count):
        while len(manager.operator) > MOST_QUEUED:
            await manager.operator.wait(asked[-1], 0.2)
        request: Any = EmergencyStop() if luck.random() < 0.01 else luck.choice(kinds)()
        try:
            operation = await manager.operator.submit(
                request, idempotency_key=luck.randbytes(8).hex()
            )
        except VmlabError:
            continue
        say(f"ack {operation.id}")
        asked.append(operation.id)
        if luck.random() < 0.1:
            try:
                await manager.operator.cancel(luck.choice(asked[-5:]))
            except VmlabError:
                continue


async def settled(manager: Manager) -> None:
    async with asyncio.timeout(WAIT):
        while not manager.operator.idle:  # noqa: ASYNC110  # many operations are waited for
            await asyncio.sleep(0.02)


async def main(
    home: Path, options: dict[str, str], acknowledged: list[str], seed: int, count: int
) -> None:
    options = dict(options)
    hypervisor = options.pop("hypervisor", "simulated")
    hosts = (HostSetting(name=hypervisor, hypervisor=hypervisor, options=options),)
    # Nobody but the operations is to change anything.
    settings = Settings(home=Home.open(home), hosts=hosts, workers=6, sweep_seconds=3600)
    async with await Manager.open(settings) as manager:
        await settled(manager)
        say("settled")
        for problem in await problems(manager, acknowledged):
            say(f"problem {problem}")
        say("whole")
        await work(manager, random.Random(seed), count, real=hypervisor != "simulated")
        await settled(manager)
        say("worked")


if __name__ == "__main__":
    acks = Path(sys.argv[3])
    asyncio.run(
        main(
            Path(sys.argv[1]),
            json.loads(sys.argv[2]),
            acks.read_text("ascii").split() if acks.exists() else [],
            int(sys.argv[4]),
            int(sys.argv[5]),
        )
    )

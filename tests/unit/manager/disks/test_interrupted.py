"""A manager that dies at any line of an operation's journal: the next one ends it, whole or undone.

Here it dies by being closed where its journal waits: what was begun is done again, as after a kill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select
from tests.unit.manager.disks.conftest import Asking, simulated_hosts

from vmlab.machine.sizes import MIB
from vmlab.manager.manager import Manager
from vmlab.manager.operator.journal import Work
from vmlab.manager.requests import (
    AttachDisk,
    CloneMachine,
    CreateDisk,
    DeleteDisk,
    DetachDisk,
    ExportMachine,
    ImportMachine,
    MigrateMachine,
    ResizeDisk,
    RestoreMachine,
    SnapshotMachine,
)
from vmlab.manager.settings import Settings
from vmlab.manager.store.tables import DiskRow, MachineRow, SnapshotRow

PATIENCE = 120.0
Setup = Callable[[Asking, str], Awaitable[Any]]


class Journal:
    """Stops whoever writes the journal of one kind of operation for the nth time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.left, self.ends_too = "", 0, False
        self.stopped: asyncio.Event | None = None
        begin, end = Work._begin, Work._end

        async def begins(work: Work[Any], *words: Any) -> None:
            await self.passed(work)
            await begin(work, *words)

        async def ends(work: Work[Any], *words: Any) -> None:
            if self.ends_too:
                await self.passed(work)
            await end(work, *words)

        monkeypatch.setattr(Work, "_begin", begins)
        monkeypatch.setattr(Work, "_end", ends)

    async def passed(self, work: Work[Any]) -> None:
        """A line is about to be written."""
        if work.request_kind != self.kind or self.stopped is None or self.stopped.is_set():
            return
        self.left -= 1
        if self.left == 0:
            self.stopped.set()
            # Until the manager goes.
            await asyncio.get_running_loop().create_future()


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    return Journal(monkeypatch)


@pytest.fixture
def fragile(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Journal:
    # Its ends are shielded from cancellation, which nobody is from the death of the manager.
    monkeypatch.setattr("vmlab.manager.operator.journal.uninterrupted", _as_it_is)
    journal.ends_too = True
    return journal


async def _as_it_is(work: Awaitable[Any]) -> Any:
    return await work


# ------------------------------------------------------------------------ what is interrupted


async def attaching(asking: Asking, name: str) -> Any:
    await asking.create(name, start=True)
    await asking.do(CreateDisk(name=f"d-{name}", size=MIB))
    return AttachDisk(disk=f"d-{name}", machine=name)


async def detaching(asking: Asking, name: str) -> Any:
    await asking.do(await attaching(asking, name))
    return DetachDisk(disk=f"d-{name}")


async def deleting(asking: Asking, name: str) -> Any:
    await asking.create(name)
    await asking.do(CreateDisk(name=f"d-{name}", size=MIB))
    await asking.do(AttachDisk(disk=f"d-{name}", machine=name))
    return DeleteDisk(disk=f"d-{name}")


async def copying(asking: Asking, name: str) -> Any:
    await asking.do(CreateDisk(name=f"d-{name}", size=MIB))
    return CreateDisk(name=f"c-{name}", source=f"d-{name}", size=2 * MIB)


async def growing(asking: Asking, name: str) -> Any:
    await asking.do(await attaching(asking, name))
    return ResizeDisk(disk=f"d-{name}", size=2 * MIB)


async def saving(asking: Asking, name: str) -> Any:
    await deleting(asking, name)
    return SnapshotMachine(machine=name, name="kept")


async def restoring(asking: Asking, name: str) -> Any:
    await asking.do(await saving(asking, name))
    return RestoreMachine(machine=name, snapshot="kept")


async def cloning(asking: Asking, name: str) -> Any:
    await deleting(asking, name)
    return CloneMachine(machine=name, name=f"clone-{name}")


async def forking(asking: Asking, name: str) -> Any:
    await asking.create(name, start=True)
    return CloneMachine(machine=name, name=f"clone-{name}")


async def moving(asking: Asking, name: str) -> Any:
    await asking.do(await attaching(asking, name))
    return MigrateMachine(machine=name, host="other")


async def exporting(asking: Asking, name: str) -> Any:
    await asking.create(name, spec={"memory": "64M"})
    await asking.do(CreateDisk(name=f"d-{name}", size=MIB))
    await asking.do(AttachDisk(disk=f"d-{name}", machine=name))
    return ExportMachine(machine=name, path=f"{name}.tar")


async def importing(asking: Asking, name: str) -> Any:
    await asking.do(await exporting(asking, name))
    return ImportMachine(path=f"{name}.tar", name=f"again-{name}")


WHAT: dict[str, Setup] = {
    "attach": attaching,
    "detach": detaching,
    "delete": deleting,
    "copy": copying,
    "grow": growing,
    "snapshot": saving,
    "restore": restoring,
    "clone": cloning,
    "fork": forking,
    "migrate": moving,
    "export": exporting,
    "import": importing,
}


async def sound(asking: Asking) -> None:
    """State that store, hypervisors and files agree, and that nothing half done is left."""
    manager = asking.manager

    def kept(session: Any) -> tuple[list[Any], list[Any], list[Any]]:
        disks = [
            (row.id, row.format, row.state, row.machine_id, row.device, row.size)
            for row in session.scalars(select(DiskRow))
        ]
        machines = [
            (row.id, row.host, [disk["name"] for disk in row.spec.get("disks", [])])
            for row in session.scalars(select(MachineRow))
        ]
        snapshots = [(row.machine_id, row.name) for row in session.scalars(select(SnapshotRow))]
        return disks, machines, snapshots

    disks, machines, snapshots = await manager.database.read(kept)
    files = {path.name: path.stat().st_size for path in manager.storage.directory.iterdir()}
    assert files == {f"{id_}.{form}": size for id_, form, _, _, _, size in disks}
    assert {state for _, _, state, _, _, _ in disks} <= {"available", "attached"}
    there = {}
    for host in ("simulated", "other"):
        for machine in await (await manager.hosts.get(host)).list():
            there[machine.name] = (host, machine)
    assert sorted(there) == sorted(f"m-{id_[:12]}" for id_, _, _ in machines)
    for id_, host, names in machines:
        where, machine = there[f"m-{id_[:12]}"]
        assert where == host
        assert [disk.name for disk in machine.spec.disks] == names
        own = {device for _, _, state, owner, device, _ in disks if owner == id_}
        assert own == {name for name in names if name.startswith("d-")}
        taken = sorted(name for owner, name in snapshots if owner == id_)
        assert sorted(each.name for each in await machine.snapshots()) == taken
    exports = manager.settings.directory / "exports"
    if exports.exists():
        assert [path.name for path in exports.iterdir() if path.name.startswith(".")] == []


def points() -> Iterator[int]:
    """The first line of a journal, the second one, ..."""
    return iter(range(1, 40))


QUICK = ("attach", "clone", "import", "snapshot")
"""What each change sees; the others are for the soak."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [what if what in QUICK else pytest.param(what, marks=pytest.mark.soak) for what in WHAT],
)
def test_next_manager_ends_what_was_interrupted(fragile: Journal, tmp_path: Any, what: str) -> None:
    settings = simulated_hosts(tmp_path)
    reached = 0
    for point in points():
        name = f"m{point}"
        id_, stopped = asyncio.run(interrupted(settings, fragile, WHAT[what], name, point))
        if not stopped:
            break
        reached += 1
        asyncio.run(ended(settings, id_))
    # Each of its steps is two lines.
    assert reached >= 2


async def interrupted(
    settings: Settings, journal: Journal, setup: Setup, name: str, point: int
) -> tuple[str, bool]:
    """Begin something, and have the manager end at a line; whether it came to that line."""
    async with await Manager.open(settings) as manager:
        asking = Asking(manager)
        request = await setup(asking, name)
        journal.kind, journal.left, journal.stopped = request.kind, point, asyncio.Event()
        operation = await manager.operator.submit(request)
        waits = [
            asyncio.ensure_future(journal.stopped.wait()),
            asyncio.ensure_future(manager.operator.wait(operation.id, PATIENCE)),
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
        stopped = journal.stopped.is_set()
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
        if not stopped:
            assert (await manager.operator.document(operation.id)).state == "succeeded"
            await sound(asking)
        return operation.id, stopped


async def ended(settings: Settings, id_: str) -> None:
    """Have the next manager end an operation."""
    async with await Manager.open(settings) as manager:
        operation = await manager.operator.wait(id_, PATIENCE)
        assert operation.state == "succeeded", operation.error
        await sound(Asking(manager))


@pytest.mark.parametrize("what", QUICK)
def test_what_is_cancelled_leaves_nothing(journal: Journal, tmp_path: Any, what: str) -> None:
    async def story() -> None:
        async with await Manager.open(simulated_hosts(tmp_path)) as manager:
            asking = Asking(manager)
            for point in points():
                request = await WHAT[what](asking, f"m{point}")
                journal.kind, journal.left, journal.stopped = request.kind, point, asyncio.Event()
                operation = await manager.operator.submit(request)
                stop = asyncio.ensure_future(journal.stopped.wait())
                wait = asyncio.ensure_future(manager.operator.wait(operation.id, PATIENCE))
                await asyncio.wait(
                    {stop, wait}, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE
                )
                if not journal.stopped.is_set():
                    stop.cancel()
                    assert (await wait).state == "succeeded"
                    break
                await manager.operator.cancel(operation.id)
                assert (await wait).state in {"cancelled", "succeeded"}
                await sound(asking)
            await sound(asking)

    asyncio.run(story())

"""Operations on a disk whose machine is deleted before their turn: what others claimed meanwhile is
left alone, and what is about to go is given to nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vmlab.machine.sizes import MIB
from vmlab.manager.documents import OperationDocument
from vmlab.manager.requests import (
    AttachDisk,
    CreateDisk,
    CreateMachine,
    DeleteDisk,
    DeleteMachine,
    DetachDisk,
    ResizeDisk,
    SnapshotMachine,
)

Tell = Callable[..., None]
PATIENCE = 120.0


class Line:
    """One worker, and operations in line for it: machine `one` is deleted before them.

    `submit` puts them in line behind that; `pass_on` has it deleted, and them still wait.
    """

    def __init__(self, asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asking = asking
        self.gates = [asyncio.Event(), asyncio.Event()]
        self.begun = [asyncio.Event(), asyncio.Event()]
        create = asking.manager.storage.create
        made = iter(range(2))

        async def slowly(*args: Any) -> Any:
            number = next(made)
            self.begun[number].set()
            await self.gates[number].wait()
            return await create(*args)

        monkeypatch.setattr(asking.manager.storage, "create", slowly)

    async def submit(self, request: Any) -> str:
        operation: OperationDocument = await self.asking.manager.operator.submit(request)
        return operation.id

    async def ended(self, operation: str) -> OperationDocument:
        ended: OperationDocument = await self.asking.manager.operator.wait(operation, PATIENCE)
        return ended


async def in_line(asking: Any, monkeypatch: pytest.MonkeyPatch, *requests: Any) -> tuple[Line, Any]:
    """Put requests in line behind the deletion of `one`; they wait when that is done."""
    line = Line(asking, monkeypatch)
    await line.submit(CreateDisk(name="busy1", size=MIB))
    await line.begun[0].wait()
    gone = await line.submit(DeleteMachine(machine="one"))
    # Deleting does not wait behind this; what is asked for after it does.
    await line.submit(CreateDisk(name="busy2", size=MIB))
    waiting = [await line.submit(request) for request in requests]
    line.gates[0].set()
    assert (await line.ended(gone)).state == "succeeded"
    await line.begun[1].wait()
    return line, waiting


@pytest.fixture
def tell_one(tell: Tell) -> Tell:
    """Run a story with one worker, machines `one` and `two`, and the disk `data`."""

    def run(story: Callable[[Any], Awaitable[None]], **changes: Any) -> None:
        async def begun(asking: Any) -> None:
            await asking.create("one")
            await asking.create("two")
            await asking.do(CreateDisk(name="data", size=MIB))
            await story(asking)

        tell(begun, workers=1, **changes)

    return run


@pytest.mark.parametrize("ends", ["runs", "cancelled"])
def test_who_was_to_attach_it_leaves_it_to_who_comes_after(
    tell_one: Tell, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    async def story(asking: Any) -> None:
        line, (first,) = await in_line(asking, monkeypatch, AttachDisk(disk="data", machine="one"))
        second = await line.submit(AttachDisk(disk="data", machine="two"))
        if ends == "cancelled":
            await asking.manager.operator.cancel(first)
        line.gates[1].set()
        ended = await line.ended(first)
        if ends == "runs":
            assert (ended.state, (ended.error or {})["kind"]) == ("failed", "MachineNotFound")
        else:
            assert ended.state == "cancelled"
        assert (await line.ended(second)).state == "succeeded"
        disk = await asking.disk("data")
        assert (disk.machine, disk.state) == ("two", "attached")

    tell_one(story)


@pytest.mark.parametrize("ends", ["runs", "cancelled"])
def test_who_was_to_detach_it_leaves_it_to_who_comes_after(
    tell_one: Tell, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    async def story(asking: Any) -> None:
        await asking.do(AttachDisk(disk="data", machine="one"))
        line, (first,) = await in_line(asking, monkeypatch, DetachDisk(disk="data"))
        second = await line.submit(AttachDisk(disk="data", machine="two"))
        if ends == "cancelled":
            await asking.manager.operator.cancel(first)
            assert (await asking.disk("data")).state == "attaching"
        line.gates[1].set()
        assert (await line.ended(first)).state == ("succeeded" if ends == "runs" else ends)
        assert (await line.ended(second)).state == "succeeded"
        disk = await asking.disk("data")
        assert (disk.machine, disk.state) == ("two", "attached")

    tell_one(story)


@pytest.mark.parametrize("ends", ["runs", "cancelled"])
def test_one_that_is_about_to_go_is_given_to_nobody(
    tell_one: Tell, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    async def story(asking: Any) -> None:
        await asking.do(AttachDisk(disk="data", machine="one"))
        line, (first,) = await in_line(asking, monkeypatch, DeleteDisk(disk="data"))
        error = await asking.refuse(AttachDisk(disk="data", machine="two"))
        assert "'data' is deleting" in error.message
        if ends == "cancelled":
            await asking.manager.operator.cancel(first)
            assert (await asking.disk("data")).state == "available"
            line.gates[1].set()
            await asking.do(AttachDisk(disk="data", machine="two"))
        else:
            line.gates[1].set()
            assert (await line.ended(first)).state == "succeeded"
            assert "data" in (await asking.refuse(AttachDisk(disk="data", machine="two"))).message

    tell_one(story)


def test_one_that_was_to_grow_in_its_machine_grows_where_it_is(
    tell_one: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(asking: Any) -> None:
        await asking.do(AttachDisk(disk="data", machine="one"))
        line, (first,) = await in_line(asking, monkeypatch, ResizeDisk(disk="data", size=2 * MIB))
        second = await line.submit(AttachDisk(disk="data", machine="two"))
        line.gates[1].set()
        assert (await line.ended(first)).state == "succeeded"
        assert (await line.ended(second)).state == "succeeded"
        disk = await asking.disk("data")
        assert (disk.machine, disk.state, disk.size) == ("two", "attached", 2 * MIB)

    tell_one(story)


@pytest.mark.parametrize("ends", ["runs", "cancelled"])
@pytest.mark.parametrize("before", ["snapshot", "create"])
def test_one_that_waits_for_its_turn_is_not_plugged_before(
    tell_one: Tell, monkeypatch: pytest.MonkeyPatch, before: str, ends: str
) -> None:
    async def story(asking: Any) -> None:
        spec = {"memory": "64M"}
        if before == "snapshot":
            await asking.do(CreateDisk(name="other", size=MIB))
            await asking.do(AttachDisk(disk="other", machine="two"))
            request, name = SnapshotMachine(machine="two", name="kept"), "two"
        else:
            request, name = CreateMachine(name="three", spec=spec, host="simulated"), "three"
        line = Line(asking, monkeypatch)
        await line.submit(CreateDisk(name="busy1", size=MIB))
        await line.begun[0].wait()
        first = await line.submit(request)
        await line.submit(CreateDisk(name="busy2", size=MIB))
        attaching = await line.submit(AttachDisk(disk="data", machine=name))
        line.gates[0].set()
        assert (await line.ended(first)).state == "succeeded"
        await line.begun[1].wait()
        assert (await asking.disk("data")).state == "attaching"
        if ends == "cancelled":
            await asking.manager.operator.cancel(attaching)
        line.gates[1].set()
        assert (await line.ended(attaching)).state == (
            "succeeded" if ends == "runs" else "cancelled"
        )
        machine = await asking.manager.machine((await asking.machine(name)).id)
        device = f"d-{(await asking.disk('data')).id[:12]}"
        assert (machine.spec.disk(device) is not None) is (ends == "runs")
        state = (await asking.disk("data")).state
        assert state == ("attached" if ends == "runs" else "available")

    tell_one(story)

"""Making machines, finding them, and the end of a run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.unit.hypervisors.toy import (
    PAUSED,
    RUNNING,
    STOPPED,
    Gate,
    ToyHypervisor,
    ToyMachine,
    fail,
    hang,
    in_loop,
    of_type,
)

from vmlab.hypervisors import operated_hypervisor
from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    CorruptSnapshot,
    DeadlineExceeded,
    HypervisorUnavailable,
    InvalidSpec,
    MachineExists,
    MachineNotFound,
    OperationFailed,
    ResourceExhausted,
    ResourceNotFound,
    UnsupportedOperation,
)
from vmlab.machine.events import Event, EventType
from vmlab.machine.fit import Usage, check_totals
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

STORE = Owner("store", "s1", Path("nowhere"))
OTHER = Owner("run", "r2", Path("nowhere"))
SPEC = MachineSpec.of(name="a")


# Making machines.


@in_loop
async def test_a_created_machine_is_announced_and_found_by_name_and_id() -> None:
    toy = ToyHypervisor()
    machine = await toy.create(SPEC)
    assert machine.state is MachineState.CREATED
    assert machine.hypervisor is toy
    assert await toy.get("a") is machine
    assert await toy.get(machine.id) is machine
    assert await toy.list() == [machine]
    events = toy.log.since(0)
    assert [event.type for event in events] == [
        EventType.OPERATION_STARTED,
        EventType.CREATED,
        EventType.OPERATION_FINISHED,
    ]
    assert {event.operation for event in events} == {"create-1"}
    assert {(event.machine, event.name) for event in events} == {(machine.id, "a")}
    assert events[1].data == {"owner": "run:r1", "state": "created"}
    toy.check()


@pytest.mark.parametrize(
    ("spec", "options", "error"),
    [
        ({"name": "a"}, {}, InvalidSpec),
        (None, {}, InvalidSpec),
        (MachineSpec.of(name="a", cpus=9), {"vcpus_per_machine": 8}, ResourceExhausted),
        (
            MachineSpec.of(name="a", deterministic=True),
            {"lacks": (Capability.DETERMINISTIC,)},
            UnsupportedOperation,
        ),
    ],
)
@in_loop
async def test_what_cannot_be_made_is_refused_and_leaves_no_trace(
    spec: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    toy = ToyHypervisor(**options)
    with pytest.raises(error):
        await toy.create(spec)
    assert (toy.log.last, toy.things, toy.hooks) == (0, set(), [])


@in_loop
async def test_a_name_is_taken_while_its_machine_is_made_and_lives() -> None:
    toy = ToyHypervisor()
    gate = toy.before["create"] = Gate()
    first = asyncio.create_task(toy.create(SPEC))
    await gate.reached.wait()
    assert await toy.list() == []
    with pytest.raises(MachineExists, match="there is a machine 'a' already") as caught:
        await toy.create(SPEC)
    assert caught.value.operation == "create"
    gate.open.set()
    machine = await first
    with pytest.raises(MachineExists):
        await toy.create(SPEC)
    await machine.delete()
    await toy.create(SPEC)
    toy.check()


@in_loop
async def test_of_many_that_ask_for_one_name_one_gets_it() -> None:
    toy = ToyHypervisor()
    ends = await asyncio.gather(*(toy.create(SPEC) for _ in range(5)), return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["MachineExists"] * 4 + ["ToyMachine"]
    toy.check()


@pytest.mark.parametrize("gate", ["before", "after"])
@pytest.mark.parametrize("error", [OSError("disk full"), TypeError("bug"), None])
@in_loop
async def test_a_machine_that_came_not_to_be_leaves_its_name_free(
    gate: str, error: Exception | None
) -> None:
    toy = ToyHypervisor()
    getattr(toy, gate)["create"] = fail(error) if error is not None else hang
    with pytest.raises((OperationFailed, TypeError, DeadlineExceeded)) as caught:
        await toy.create(SPEC, timeout=0.01)
    (failed,) = of_type(toy, EventType.OPERATION_FAILED)
    assert failed.data["error"] == caught.type.__name__
    assert toy.undone == ["a:create-1"]
    assert toy.things == set()
    toy.check()
    getattr(toy, gate).clear()
    await toy.create(SPEC)
    toy.check()


@pytest.mark.parametrize("trouble", ["fails", "hangs", "is cancelled"])
@in_loop
async def test_clearing_up_that_fails_does_not_hide_why_there_is_no_machine(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operated_hypervisor, "UNDO_TIMEOUT", 0.01)
    toy = ToyHypervisor()
    toy.before["create"] = fail(OSError("disk full"))
    toy.before["undo"] = {
        "fails": fail(TypeError("bug")),
        "hangs": hang,
        "is cancelled": fail(asyncio.CancelledError()),
    }[trouble]
    with pytest.raises(OperationFailed, match="disk full") as caught:
        await toy.create(SPEC)
    (note,) = caught.value.__notes__
    assert (
        note
        == {
            "fails": "clearing up failed too: bug",
            "hangs": "clearing up failed too: it did not end",
            "is cancelled": "clearing up failed too: CancelledError",
        }[trouble]
    )
    toy.before.clear()
    await toy.create(SPEC)
    toy.check()


@in_loop
async def test_a_machine_that_cannot_be_imagined_leaves_its_name_free() -> None:
    class Unimaginative(ToyHypervisor):
        def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> ToyMachine:
            raise OSError("no directory")

    toy = Unimaginative()
    for _ in range(2):
        with pytest.raises(OperationFailed, match="no directory"):
            await toy.create(SPEC)
    toy.check()


@in_loop
async def test_preparing_is_part_of_what_a_deadline_bounds() -> None:
    class Slow(ToyHypervisor):
        async def _prepare(self) -> None:
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded, match="create did not finish"):
        await Slow().create(SPEC, timeout=0.01)


@in_loop
async def test_what_a_machine_is_made_of_counts_from_when_it_is_begun() -> None:
    toy = ToyHypervisor(machines=2)
    await toy.machine(RUNNING, name="r", cpus=2, memory="1G")
    await toy.machine(MachineState.UNKNOWN, name="u")
    gate = toy.before["create"] = Gate()
    task = asyncio.create_task(toy.create(SPEC))
    await gate.reached.wait()
    usage = toy.usage()
    assert usage == Usage(machines=3, vcpus=3, memory=(1536 << 20), disk_space=2 << 20)
    making = toy._reserved["a"]
    assert toy.usage(without=making).machines == 2
    with pytest.raises(ResourceExhausted, match="machines: 1 more would make 3 of 2"):
        check_totals(toy._can.limits, toy.usage(without=making), SPEC)
    gate.open.set()
    await task
    assert toy.usage() == usage


# Making machines of snapshots.


@pytest.mark.parametrize(
    ("state", "memory", "becomes"),
    [(RUNNING, True, RUNNING), (PAUSED, True, PAUSED), (RUNNING, False, STOPPED),
     (MachineState.CREATED, False, STOPPED)],
)  # fmt: skip
@in_loop
async def test_a_machine_of_a_snapshot_has_the_snapshot_s_state(
    state: MachineState, memory: bool, becomes: MachineState
) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(state, nics=[{"name": "n", "mac": "52:54:00:00:00:01"}])
    snapshot = await machine.snapshot("s", memory=memory)
    made = await toy.create_from(snapshot, "b")
    assert (made.state, made.name) == (becomes, "b")
    assert made.spec.nics[0].mac is None
    toy.check()


@in_loop
async def test_a_machine_of_a_snapshot_that_cannot_be_is_refused() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(STOPPED)
    snapshot = await machine.snapshot("s")
    before = toy.log.last
    with pytest.raises(InvalidSpec, match="name = 'a b'"):
        await toy.create_from(snapshot, "a b")
    with pytest.raises(MachineExists):
        await toy.create_from(snapshot, "a")
    with pytest.raises(UnsupportedOperation):
        await ToyHypervisor(lacks=(Capability.RESTORE,)).create_from(snapshot, "b")
    assert toy.log.last == before
    toy.after["create_from"] = fail(CorruptSnapshot("damaged"))
    with pytest.raises(CorruptSnapshot):
        await toy.create_from(snapshot, "b")
    toy.check()


# Finding them.


@in_loop
async def test_machines_are_listed_by_name_and_missing_ones_are_told() -> None:
    toy = ToyHypervisor()
    for name in "cab":
        await toy.machine(name=name)
    assert [machine.name for machine in await toy.list()] == ["a", "b", "c"]
    with pytest.raises(MachineNotFound, match="there is no machine 'x'") as caught:
        await toy.get("x")
    assert caught.value.hint
    await (await toy.get("b")).delete()
    with pytest.raises(MachineNotFound):
        await toy.get("b")
    toy.check()


@in_loop
async def test_a_machine_that_was_there_before_is_adopted() -> None:
    toy = ToyHypervisor(STORE)
    machine = toy.new_machine("i1", SPEC, MachineState.PAUSED)
    toy.adopt(machine)
    toy.things |= {"machine i1", "process i1"}
    assert await toy.get("i1") is await toy.get("a") is machine
    (event,) = toy.log.since(0)
    assert (event.type, event.data) == (EventType.ADOPTED, {"owner": "store:s1", "state": "paused"})
    await machine.resume()
    toy.check()
    toy.forget(toy.new_machine("i1", SPEC, MachineState.PAUSED))
    assert await toy.get("i1") is await toy.get("a") is machine


@in_loop
async def test_events_are_read_and_followed() -> None:
    toy = ToyHypervisor()
    await toy.machine(name="a")
    follower = toy.subscribe()
    assert await toy.events(2) == toy.log.since(2)

    async def read() -> list[Event]:
        return [event async for event in follower]

    task = asyncio.create_task(read())
    await toy.machine(name="b")
    await toy.close()
    assert await task == toy.log.since(3)


# The end of a run.


@in_loop
async def test_closing_a_run_deletes_its_machines_whatever_they_do() -> None:
    toy = ToyHypervisor()
    for state in (MachineState.CREATED, RUNNING, PAUSED, MachineState.UNKNOWN):
        await toy.machine(state, name=state.value)
    await toy.close()
    assert toy.things == set()
    assert await toy.list() == []
    toy.check()
    await toy.close()


@in_loop
async def test_closing_a_store_lets_its_machines_live() -> None:
    async with ToyHypervisor(STORE) as toy:
        machine = await toy.machine(RUNNING)
    assert machine.state is RUNNING
    assert toy.things


@in_loop
async def test_a_run_may_have_many_machines() -> None:
    toy = ToyHypervisor()
    for number in range(operated_hypervisor.DELETED_AT_ONCE * 2 + 1):
        await toy.machine(RUNNING, name=f"m{number}")
    at_once: list[int] = []

    async def count(machine: ToyMachine) -> None:
        at_once.append(sum(one._current is not None for one in toy._machines.values()))

    toy.before["delete"] = count
    await toy.close()
    assert 1 < max(at_once) <= operated_hypervisor.DELETED_AT_ONCE
    assert toy.things == set()


@in_loop
async def test_one_machine_that_refuses_does_not_save_the_others() -> None:
    toy = ToyHypervisor()
    for name in "abc":
        await toy.machine(RUNNING, name=name)

    async def refuse(machine: ToyMachine) -> None:
        if machine.name != "c":
            raise OSError("busy")

    toy.before["kill"] = refuse
    with pytest.raises(OperationFailed) as caught:
        await toy.close()
    assert caught.value.message.startswith("2 machines could not be deleted: delete failed: OSErr")
    assert caught.value.hint
    assert [machine.name for machine in await toy.list()] == ["a", "b"]
    toy.before["kill"] = fail(TypeError("bug"))
    with pytest.raises(TypeError):
        await toy.close()
    toy.before.clear()
    await toy.close()
    assert toy.things == set()


@in_loop
async def test_what_is_being_made_when_a_run_is_closed_is_not_made() -> None:
    toy = ToyHypervisor()
    parent = await toy.machine(RUNNING, name="parent")
    gates = toy.before["create"], toy.before["fork"] = Gate(), Gate()
    tasks = [asyncio.create_task(toy.create(SPEC)), asyncio.create_task(parent.fork("child"))]
    for gate in gates:
        await gate.reached.wait()
    await toy.close()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [HypervisorUnavailable] * 2
    assert toy.things == set()
    toy.check()
    with pytest.raises(HypervisorUnavailable, match="cannot create 'a': the hypervisor was closed"):
        await toy.create(SPEC)


@in_loop
async def test_what_arrives_when_a_run_is_closed_is_deleted() -> None:
    here, there = ToyHypervisor(), ToyHypervisor(OTHER)
    machine = await here.machine(RUNNING)
    gate = here.before["hand_over"] = Gate()
    task = asyncio.create_task(machine.migrate(there))
    await gate.reached.wait()
    closing = asyncio.create_task(there.close())
    await asyncio.sleep(0)
    gate.open.set()
    await closing
    await task
    assert there.things == here.things == set()
    here.check()
    there.check()


@in_loop
async def test_ids_and_times_are_ones_of_their_own() -> None:
    toy = ToyHypervisor()
    first, second = (OperatedHypervisor.new_id(toy) for _ in range(2))
    assert first != second
    assert len(first) == 32
    assert OperatedHypervisor.now(toy) > 1_700_000_000
    assert (toy.next_operation(), toy.next_operation()) == (1, 2)
    await OperatedHypervisor._prepare(toy)


@in_loop
async def test_an_aborted_making_that_succeeds_all_the_same_is_unmade() -> None:
    toy = ToyHypervisor()
    operation = Operation("create", 1, 5)

    async def build(machine: Any) -> None:
        await machine._do_create(operation)
        operation.abort(HypervisorUnavailable("closed"))

    async def nothing(error: BaseException) -> None:
        """`make` clears up."""

    with pytest.raises(HypervisorUnavailable):
        await operation.run(
            lambda: toy.make(operation, SPEC, build), nothing, machine="a", hypervisor="toy"
        )
    assert toy.things == set()


def test_guests_of_every_architecture_may_be_asked_for() -> None:
    assert ToyHypervisor()._can.architectures == frozenset(Architecture)


@in_loop
async def test_events_that_are_gone_are_told() -> None:
    toy = ToyHypervisor()
    toy.log._events = type(toy.log._events)(maxlen=2)
    await toy.machine(RUNNING)
    with pytest.raises(ResourceNotFound):
        await toy.events(0)

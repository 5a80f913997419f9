"""The operations of the contract on the toy back end: what each does, refuses and announces."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.hypervisors.toy import (
    FAILED,
    PAUSED,
    RUNNING,
    STOPPED,
    Gate,
    ToyHypervisor,
    ToyMachine,
    fail,
    hang,
    happen,
    in_loop,
    of_type,
)

from vmlab.hypervisors import serialised_machine
from vmlab.hypervisors.operated_machine import check_part_name
from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    CorruptSnapshot,
    DeadlineExceeded,
    FaultInjected,
    HypervisorUnavailable,
    InvalidSpec,
    InvalidState,
    MachineCrashed,
    MachineExists,
    MigrationFailed,
    OperationAborted,
    OperationFailed,
    ResourceExhausted,
    ResourceNotFound,
    SnapshotNotFound,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import DiskError, NetPartition
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import OPERATIONS, MachineState

CREATED, UNKNOWN, DELETED = MachineState.CREATED, MachineState.UNKNOWN, MachineState.DELETED
OTHER = Owner("run", "r2", Path("nowhere"))
MIB = 1 << 20


def way(machine: ToyMachine, operation: str | None = None) -> list[str]:
    """The states that a machine went through, in an operation of that name or in all."""
    return [
        str(event.data["to"])
        for event in of_type(machine.toy, EventType.STATE)
        if event.machine == machine.id
        and (operation is None or str(event.operation).startswith(operation))
    ]


# The ways of operations.


@pytest.mark.parametrize(
    ("state", "operation", "passes"),
    [
        (CREATED, "start", ["starting", "running"]),
        (STOPPED, "start", ["starting", "running"]),
        (FAILED, "start", ["starting", "running"]),
        (RUNNING, "stop", ["stopping", "stopped"]),
        (PAUSED, "stop", ["stopping", "stopped"]),
        (UNKNOWN, "stop", ["stopping", "stopped"]),
        (RUNNING, "kill", ["stopping", "stopped"]),
        (PAUSED, "kill", ["stopping", "stopped"]),
        (FAILED, "kill", ["stopping", "stopped"]),
        (RUNNING, "pause", ["pausing", "paused"]),
        (PAUSED, "resume", ["resuming", "running"]),
        (RUNNING, "restart", ["restarting", "running"]),
        (CREATED, "delete", ["deleting", "deleted"]),
        (UNKNOWN, "delete", ["deleting", "deleted"]),
    ],
)
@in_loop
async def test_operations_lead_through_their_states(
    state: MachineState, operation: str, passes: list[str]
) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(state)
    before = toy.log.last
    await getattr(machine, operation)()
    toy.check()
    events = toy.log.since(before)
    assert [event.data["to"] for event in events if event.type is EventType.STATE] == passes
    assert machine.state.value == passes[-1]
    assert [event.type for event in events][:: len(events) - 1] == [
        EventType.OPERATION_STARTED,
        EventType.OPERATION_FINISHED,
    ]
    assert len({event.operation for event in events}) == 1
    assert toy.undone == []


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "snapshot": ("s",),
    "delete_snapshot": ("s",),
    "restore": ("s",),
    "fork": ("b",),
    "plug_disk": (Disk(name="d", size=MIB),),
    "unplug_disk": ("root",),
    "resize_disk": ("root", 2 * MIB),
    "plug_nic": (Nic(name="n"),),
    "unplug_nic": ("n",),
    "pin": ({0: (0,)},),
    "inject": (DiskError(disk="root"),),
    "clear_fault": ("f",),
    "channel": ("c",),
    "send_keys": (["a"],),
}


@pytest.mark.parametrize("state", [CREATED, RUNNING, PAUSED, STOPPED, FAILED, UNKNOWN, DELETED])
@in_loop
async def test_what_a_state_does_not_allow_is_refused_and_leaves_no_trace(
    state: MachineState,
) -> None:
    toy, other = ToyHypervisor(), ToyHypervisor(OTHER)
    machine = await toy.machine(CREATED if state is DELETED else state)
    if state is DELETED:
        await machine.delete()
    before, things = toy.log.last, set(toy.things)
    for name, allowed in OPERATIONS.items():
        if state in allowed or (name == "delete" and state is DELETED):
            continue
        arguments = (other,) if name == "migrate" else ARGUMENTS.get(name, ())
        options = {"vcpus": 2} if name == "resize" else {}
        with pytest.raises(InvalidState) as caught:
            await getattr(machine, name)(*arguments, **options)
        assert caught.value.operation == name
        assert caught.value.actual == state.value
        assert set(caught.value.expected) == set(allowed)
        assert (caught.value.machine, caught.value.hypervisor) == ("a", "toy")
    assert toy.log.last == before
    assert toy.things == things
    assert toy.undone == []


CAPABILITIES: list[tuple[MachineState, str, tuple[Any, ...], dict[str, Any], Capability]] = [
    (RUNNING, "pause", (), {}, Capability.PAUSE),
    (PAUSED, "resume", (), {}, Capability.RESUME),
    (RUNNING, "snapshot", ("s",), {}, Capability.SNAPSHOT),
    (RUNNING, "snapshot", ("s",), {"memory": True}, Capability.MEMORY_SNAPSHOT),
    (RUNNING, "delete_snapshot", ("s",), {}, Capability.SNAPSHOT),
    (STOPPED, "restore", ("s",), {}, Capability.RESTORE),
    (RUNNING, "fork", ("b",), {}, Capability.FORK),
    (RUNNING, "plug_disk", ARGUMENTS["plug_disk"], {}, Capability.HOTPLUG_DISK),
    (RUNNING, "unplug_disk", ("root",), {}, Capability.HOTPLUG_DISK),
    (STOPPED, "resize_disk", ("root", 2 * MIB), {}, Capability.RESIZE_DISK),
    (RUNNING, "plug_nic", ARGUMENTS["plug_nic"], {}, Capability.HOTPLUG_NIC),
    (RUNNING, "unplug_nic", ("n",), {}, Capability.HOTPLUG_NIC),
    (STOPPED, "resize", (), {"vcpus": 2}, Capability.RESIZE),
    (RUNNING, "resize", (), {"vcpus": 2}, Capability.HOTPLUG_VCPU),
    (RUNNING, "resize", (), {"memory": 1 << 30}, Capability.HOTPLUG_MEMORY),
    (RUNNING, "pin", ({0: (0,)},), {}, Capability.PINNING),
    (RUNNING, "inject", ARGUMENTS["inject"], {}, Capability.FAULTS),
    (RUNNING, "clear_fault", ("f",), {}, Capability.FAULTS),
    (RUNNING, "console", (), {}, Capability.CONSOLE),
    (RUNNING, "channel", ("c",), {}, Capability.GUEST_CHANNELS),
    (RUNNING, "screenshot", (), {}, Capability.DISPLAY),
    (RUNNING, "send_keys", (["a"],), {}, Capability.DISPLAY),
]


@pytest.mark.parametrize(("state", "name", "arguments", "options", "capability"), CAPABILITIES)
@in_loop
async def test_what_a_hypervisor_lacks_is_refused_and_leaves_no_trace(
    state: MachineState,
    name: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    capability: Capability,
) -> None:
    able = ToyHypervisor()
    machine = await able.machine(state, nics=[{"name": "n"}])
    able._can = able._can.without(capability)
    before = able.log.last
    with pytest.raises(UnsupportedOperation) as caught:
        await getattr(machine, name)(*arguments, **options)
    assert caught.value.capability == capability.value
    assert (caught.value.operation, caught.value.machine) == (name, "a")
    assert able.log.last == before
    able.check()


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "clear_fault"])
@in_loop
async def test_a_timeout_that_is_no_duration_is_refused_before_anything_happens(name: str) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    before = toy.log.last
    arguments = (ToyHypervisor(OTHER),) if name == "migrate" else ARGUMENTS.get(name, ())
    options = {"vcpus": 2} if name == "resize" else {}
    for timeout in (-1, math.nan, True):
        with pytest.raises(InvalidSpec, match="timeout = "):
            await getattr(machine, name)(*arguments, **options, timeout=timeout)
    with pytest.raises(InvalidSpec, match="timeout = "):
        await machine.status(timeout=-1)
    assert toy.log.last == before
    assert machine.state is RUNNING


# Order.


@in_loop
async def test_operations_wait_for_their_turn_in_the_order_of_the_calls() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    gate = toy.before["pause"] = Gate()
    calls = [machine.pause, machine.resume, machine.restart, machine.pause, machine.stop]
    tasks = [asyncio.create_task(call()) for call in calls]
    await gate.reached.wait()
    assert machine.state is MachineState.PAUSING
    assert (await machine.status()).operation == "pause-3"
    gate.open.set()
    await asyncio.gather(*tasks)
    started = of_type(toy, EventType.OPERATION_STARTED)[2:]
    names = [str(event.operation).partition("-")[0] for event in started]
    assert names == ["pause", "resume", "restart", "pause", "stop"]
    toy.check()


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["start", "stop", "kill", "pause", "resume", "restart", "snapshot", "fork",
                 "status", "info", "force", "crash", "shutdown", "migrate", "restore"]
            ),
            st.integers(0, 6),
            st.none() | st.tuples(st.integers(0, 12), st.integers(0, 12)),
        ),
        min_size=2,
        max_size=12,
    ),
)  # fmt: skip
def test_whatever_is_asked_at_once_is_never_interleaved(
    requests: list[tuple[str, int, tuple[int, int] | None]],
) -> None:
    async def ask(machine: ToyMachine, there: ToyHypervisor, name: str, number: int) -> None:
        if name in {"crash", "shutdown"}:
            if machine.guest in {RUNNING, PAUSED} and machine.toy is not there:
                crash = name == "crash"
                event = EventType.CRASHED if crash else EventType.GUEST_SHUTDOWN
                machine.befall(FAILED if crash else STOPPED, event, name)
            return
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "snapshot": lambda: machine.snapshot(f"s{number}"),
            "restore": lambda: machine.restore(f"s{number - 1}"),
            "fork": lambda: machine.fork(f"f{number}"),
            "migrate": lambda: machine.migrate(there),
            "force": lambda: machine.delete(force=True),
        }
        try:
            await calls.get(name, getattr(machine, name, None))()  # by name
        except VmlabError:
            return

    async def scenario() -> None:
        here, there = ToyHypervisor(), ToyHypervisor(OTHER)
        machine = await here.machine(RUNNING)
        tasks = []
        for number, (name, turns, cancelled) in enumerate(requests):
            task = asyncio.create_task(ask(machine, there, name, number))
            tasks.append(task)
            for _ in range(turns):
                await asyncio.sleep(0)
            if cancelled is not None:
                later, which = cancelled
                for _ in range(later):
                    await asyncio.sleep(0)
                tasks[which % len(tasks)].cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            assert end is None or isinstance(end, asyncio.CancelledError)
        here.check()
        there.check()
        for hypervisor in (here, there):
            await hypervisor.close()
            assert hypervisor.things == set()
            hypervisor.check()

    asyncio.run(scenario())


# Stopping.


@in_loop
async def test_a_guest_that_does_not_go_down_is_killed_after_its_grace() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["shutdown"] = hang
    await machine.stop(timeout=0.01)
    assert toy.hooks == ["a:shutdown", "a:kill"]
    assert machine.state is STOPPED
    toy.check()


@pytest.mark.parametrize("state", [RUNNING, PAUSED])
@in_loop
async def test_a_guest_that_is_not_to_be_killed_is_as_before(state: MachineState) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(state)
    toy.before["shutdown"] = hang
    with pytest.raises(DeadlineExceeded) as caught:
        await machine.stop(kill=False, timeout=0.01)
    assert caught.value.seconds == 0.01
    assert machine.state is state
    assert machine.reason == "stop took too long"
    assert "a:kill" not in toy.hooks
    toy.check()


@in_loop
async def test_a_grace_that_ends_in_an_error_of_the_hook_still_ends_in_a_kill() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)

    async def breaks(machine: ToyMachine) -> None:
        try:
            await hang(machine)
        finally:
            raise ConnectionResetError

    toy.before["shutdown"] = breaks
    await machine.stop(timeout=0.01)
    assert toy.hooks == ["a:shutdown", "a:kill"]


@in_loop
async def test_a_guest_that_cannot_be_asked_is_not_killed_for_that() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["shutdown"] = fail(OperationFailed("no agent"))
    with pytest.raises(OperationFailed, match="no agent"):
        await machine.stop()
    assert machine.state is RUNNING
    assert "a:kill" not in toy.hooks


@in_loop
async def test_the_guest_has_all_its_grace_however_long_the_stop_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(DEFAULT_TIMEOUTS, "kill", 0.01)
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    gate = toy.before["pause"] = Gate()
    first = asyncio.create_task(machine.pause())
    await gate.reached.wait()
    stop = asyncio.create_task(machine.stop(timeout=0.05))
    await asyncio.sleep(0.04)
    toy.before["shutdown"] = lambda _: asyncio.sleep(0.04)
    gate.open.set()
    await first
    await stop
    assert "a:kill" not in toy.hooks


@in_loop
async def test_stopping_without_end_of_grace() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(PAUSED)
    await machine.stop(timeout=math.inf)
    assert machine.state is STOPPED
    started = of_type(toy, EventType.OPERATION_STARTED)[-1]
    assert started.data["timeout"] is None
    started.model_dump_json()


@in_loop
async def test_a_cancelled_stop_of_a_paused_machine_leaves_it_paused() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(PAUSED)
    gate = toy.before["shutdown"] = Gate()
    task = asyncio.create_task(machine.stop())
    await gate.reached.wait()
    assert machine.guest is RUNNING
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert machine.state is PAUSED
    toy.check()


@pytest.mark.parametrize("kill", [True, False])
@in_loop
async def test_a_guest_that_dies_while_it_is_stopped_is_stopped(kill: bool) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)

    async def dies(machine: ToyMachine) -> None:
        machine.befall(FAILED, EventType.CRASHED, "panic")
        raise ConnectionResetError

    toy.before["shutdown"] = dies
    await machine.stop(kill=kill)
    assert machine.state is STOPPED
    toy.check()


@in_loop
async def test_how_a_machine_ended_once_says_nothing_of_the_next_time() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["shutdown"] = happen(FAILED, EventType.CRASHED, "panic")
    await machine.stop()
    toy.before["start"] = hang
    with pytest.raises(DeadlineExceeded):
        await machine.start(timeout=0.01)
    assert (machine.state, machine.reason) == (STOPPED, "start took too long")


# Killing.


@in_loop
async def test_a_kill_ends_what_is_under_way_and_all_that_waits() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["snapshot"] = hang
    tasks = [
        asyncio.create_task(call)
        for call in (machine.snapshot("s"), machine.pause(), machine.restart())
    ]
    await asyncio.sleep(0.001)
    await machine.kill()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [OperationAborted] * 3
    assert str(ends[1]).startswith("pause was ended because the machine was killed")
    assert machine.state is STOPPED
    assert toy.hooks[-2:] == ["a:observe", "a:kill"]
    toy.check()


@pytest.mark.parametrize("call", ["kill", "delete"])
@in_loop
async def test_a_kill_that_is_refused_ends_nothing(call: str) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    gate = toy.before["pause"] = Gate()
    pause = asyncio.create_task(machine.pause())
    await gate.reached.wait()
    with pytest.raises(InvalidSpec):
        await (
            machine.kill(timeout=-1) if call == "kill" else machine.delete(force=True, timeout=-1)
        )
    gate.open.set()
    await pause
    assert machine.state is PAUSED


@in_loop
async def test_several_kills_at_once_all_succeed() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    await asyncio.gather(*(machine.kill() for _ in range(4)))
    assert toy.hooks == ["a:kill"]
    assert machine.state is STOPPED
    toy.check()


@in_loop
async def test_a_kill_of_what_goes_back_to_rest_is_done() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(CREATED)
    gate = toy.before["start"] = Gate()
    start = asyncio.create_task(machine.start())
    await gate.reached.wait()
    await machine.kill()
    with pytest.raises(OperationAborted):
        await start
    assert machine.state is CREATED
    toy.check()


@in_loop
async def test_a_wrong_state_that_the_kill_itself_meets_is_not_swallowed() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    wrong = InvalidState("kill", expected=("x",), actual="y")

    async def gone(machine: ToyMachine) -> None:
        machine._set(STOPPED)
        raise wrong

    toy.before["kill"] = gone
    with pytest.raises(InvalidState) as caught:
        await machine.kill()
    assert caught.value is wrong
    assert machine.state is STOPPED
    toy.check()


@in_loop
async def test_a_kill_that_hangs_ends_at_its_deadline() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["kill"] = hang
    with pytest.raises(DeadlineExceeded):
        await machine.kill(timeout=0.01)
    assert machine.state is RUNNING
    toy.check()


# What happens by itself.


@in_loop
async def test_a_machine_at_peace_goes_where_it_goes_by_itself() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    machine.befall(PAUSED, EventType.FAULT_INJECTED, "disk error")
    assert (machine.state, machine.reason) == (PAUSED, "disk error")
    machine.befall(FAILED, EventType.CRASHED, "panic")
    assert (machine.state, machine.reason) == (FAILED, "panic")
    before = toy.log.last
    machine.befall(STOPPED, EventType.GUEST_SHUTDOWN, "late news")
    assert machine.state is FAILED
    assert toy.log.last == before + 1
    # What the table does not know is a fact all the same.
    machine.befall(RUNNING, EventType.GUEST_RESET, "somebody started it")
    assert way(machine)[-2:] == ["unknown", "running"]
    toy.check()


@in_loop
async def test_of_a_deleted_machine_nothing_is_heard() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(CREATED)
    await machine.delete()
    before = toy.log.last
    machine._happened(FAILED, EventType.CRASHED, "late news")
    assert toy.log.last == before
    assert machine.state is DELETED


@in_loop
async def test_a_crash_in_the_moment_of_success_is_no_success() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(CREATED)
    toy.after["start"] = happen(FAILED, EventType.CRASHED, "panic")
    with pytest.raises(MachineCrashed, match="start failed: panic"):
        await machine.start()
    assert (machine.state, machine.reason) == (FAILED, "panic")
    toy.check()


@in_loop
async def test_a_guest_that_goes_down_right_after_its_start_is_stopped() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(FAILED)
    toy.after["start"] = happen(STOPPED, EventType.GUEST_SHUTDOWN, "it powered off")
    with pytest.raises(OperationAborted, match="it powered off"):
        await machine.start()
    assert machine.state is STOPPED


@pytest.mark.parametrize(
    ("operation", "hook", "state", "event"),
    [
        ("pause", "pause", PAUSED, EventType.GUEST_PANIC),
        ("resume", "resume", RUNNING, EventType.GUEST_RESET),
        ("stop", "shutdown", STOPPED, EventType.GUEST_SHUTDOWN),
        ("restart", "shutdown", STOPPED, EventType.GUEST_SHUTDOWN),
    ],
)
@in_loop
async def test_what_an_operation_wanted_to_happen_does_not_end_it(
    operation: str, hook: str, state: MachineState, event: EventType
) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(PAUSED if operation == "resume" else RUNNING)
    toy.after[hook] = happen(state, event, "as wanted")
    await getattr(machine, operation)()
    assert machine.state is (RUNNING if operation == "restart" else state)
    toy.check()


@in_loop
async def test_a_guest_that_goes_down_while_it_boots_again_spoils_the_restart() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.after["start"] = happen(STOPPED, EventType.GUEST_SHUTDOWN, "no root disk")
    with pytest.raises(OperationAborted, match="no root disk"):
        await machine.restart()
    assert machine.state is STOPPED
    toy.check()


@in_loop
async def test_a_restart_whose_boot_fails_leaves_a_failed_machine() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["start"] = fail(OSError(12, "Cannot allocate memory"))
    with pytest.raises(OperationFailed, match="Cannot allocate memory"):
        await machine.restart()
    assert machine.state is FAILED
    toy.check()


@in_loop
async def test_a_machine_may_change_while_an_operation_is_still_looking() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    await machine.snapshot("s", memory=False)
    gate = toy.before["snapshots"] = Gate()
    task = asyncio.create_task(machine.restore("s"))
    await gate.reached.wait()
    machine.befall(FAILED, EventType.CRASHED, "panic")
    assert machine.state is FAILED
    gate.open.set()
    # It looks again, and now the snapshot without memory fits.
    del toy.before["snapshots"]
    with pytest.raises(InvalidState):
        await task
    await machine.restore("s")
    assert machine.state is STOPPED
    toy.check()


@in_loop
async def test_a_fault_that_ends_its_machine_was_injected_well() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.after["inject"] = happen(FAILED, EventType.CRASHED, "power cut")
    assert await machine.inject(DiskError(disk="root"))
    assert (machine.state, machine.reason) == (FAILED, "power cut")
    toy.check()


# Undoing.


@in_loop
async def test_a_start_that_fails_by_itself_is_remembered_and_can_be_repeated() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(CREATED)
    for error in (FaultInjected("no"), OSError("no"), TypeError("bug")):
        toy.before["start"] = fail(error)
        with pytest.raises((OperationFailed, TypeError)):
            await machine.start()
        assert machine.state is FAILED
        assert machine.reason.startswith("start failed: ")
    del toy.before["start"]
    await machine.start()
    toy.check()


@pytest.mark.parametrize(
    "error", [ResourceExhausted("no memory"), HypervisorUnavailable("gone"), None]
)
@in_loop
async def test_a_start_that_was_refused_or_late_never_was(error: VmlabError | None) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(STOPPED)
    toy.before["start"] = fail(error) if error is not None else hang
    with pytest.raises((ResourceExhausted, HypervisorUnavailable, DeadlineExceeded)):
        await machine.start(timeout=0.01)
    assert machine.state is STOPPED
    toy.check()


@in_loop
async def test_undoing_that_does_not_end_leaves_an_unknown_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serialised_machine, "UNDO_TIMEOUT", 0.01)
    toy = ToyHypervisor()
    machine = await toy.machine(CREATED)
    toy.after["start"], toy.before["undo"] = fail(OSError("no disk")), hang
    with pytest.raises(OperationFailed) as caught:
        await machine.start()
    assert machine.state is UNKNOWN
    assert "no disk" in machine.reason
    assert machine.reason.endswith("; undoing it did not end either")
    assert caught.value.__notes__ == ["undoing it did not end either"]
    await machine.delete(force=True)
    assert toy.things == set()


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route"),
        OperationFailed("no route"),
        TypeError("no route"),
        TimeoutError("no route"),
        asyncio.CancelledError("no route"),
    ],
    ids=lambda error: type(error).__name__,
)
@in_loop
async def test_undoing_that_fails_is_told_with_both_reasons(error: BaseException) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["pause"], toy.after["undo"] = fail(FaultInjected("no luck")), fail(error)
    with pytest.raises(FaultInjected, match="no luck") as caught:
        await machine.pause()
    assert machine.state is UNKNOWN
    assert machine.reason.startswith("pause failed: no luck")
    assert machine.reason.endswith("; undoing it failed too: no route")
    assert caught.value.__notes__ == ["undoing it failed too: no route"]
    assert (await machine.status()).state is RUNNING
    toy.check()


def test_the_end_of_the_program_while_undoing_leaves_a_stable_state() -> None:
    machines: list[ToyMachine] = []

    async def main() -> None:
        toy = ToyHypervisor()
        machines.append(await toy.machine(RUNNING))
        toy.before["pause"] = fail(OSError("x"))
        toy.before["undo"] = fail(KeyboardInterrupt())
        await machines[0].pause()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert machines[0].state is UNKNOWN
    assert not machines[0]._lock.locked()


@pytest.mark.parametrize("seen", [MachineState.STARTING, DELETED])
@in_loop
async def test_a_hypervisor_that_sees_what_cannot_be_is_not_believed(seen: MachineState) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.before["pause"] = fail(OSError("x"))
    toy.before["undo"] = lambda machine: asyncio.sleep(0, setattr(machine, "guest", seen))
    with pytest.raises(OperationFailed):
        await machine.pause()
    assert machine.state is UNKNOWN


@in_loop
async def test_a_mistake_in_a_hook_comes_out_as_it_is_and_is_undone() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.after["snapshot"] = fail(TypeError("bug"))
    with pytest.raises(TypeError, match="bug"):
        await machine.snapshot("s")
    assert machine.state is RUNNING
    assert toy.undone == ["a:snapshot-3"]
    toy.check()


@in_loop
async def test_a_cancelled_operation_is_announced_as_such() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    gate = toy.before["pause"] = Gate()
    task = asyncio.create_task(machine.pause())
    await gate.reached.wait()
    toy.time += 2.5
    task.cancel()
    await asyncio.wait((task,))
    (failed,) = of_type(toy, EventType.OPERATION_FAILED)
    assert failed.data == {
        "error": "CancelledError",
        "message": "it was cancelled",
        "seconds": 2.5,
    }
    assert machine.reason == "pause was cancelled"


@in_loop
async def test_a_deadline_may_pass_while_waiting_for_the_turn() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    gate = toy.before["pause"] = Gate()
    first = asyncio.create_task(machine.pause())
    await gate.reached.wait()
    with pytest.raises(DeadlineExceeded, match="restart did not finish"):
        await machine.restart(timeout=0.01)
    gate.open.set()
    await first
    assert toy.undone == []
    assert machine.state is PAUSED
    toy.check()


# Deleting.


@in_loop
async def test_deleting_is_idempotent_and_may_be_asked_by_many() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(STOPPED)
    await asyncio.gather(*(machine.delete(force=number % 2 == 1) for number in range(4)))
    await machine.delete()
    assert toy.hooks == ["a:delete"]
    assert len(of_type(toy, EventType.DELETED)) == 1
    toy.check()


@in_loop
async def test_a_live_machine_is_deleted_by_force_only_and_in_one_operation() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    with pytest.raises(InvalidState, match="delete a machine that is running"):
        await machine.delete()
    await machine.delete(force=True)
    assert way(machine, "delete") == ["stopping", "stopped", "deleting", "deleted"]
    toy.check()


@in_loop
async def test_a_delete_that_was_cancelled_is_done_and_announced() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(STOPPED)
    gate = toy.before["delete"] = Gate()
    task = asyncio.create_task(machine.delete())
    await gate.reached.wait()
    task.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert machine.state is DELETED
    assert str(of_type(toy, EventType.OPERATION_FINISHED)[-1].operation).startswith("delete")
    assert toy.undone == []
    toy.check()


@pytest.mark.parametrize("gate", ["before", "after"])
@in_loop
async def test_a_delete_that_fails_can_be_repeated(gate: str) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    getattr(toy, gate)["delete"] = fail(OSError("busy"))
    with pytest.raises(OperationFailed, match="busy"):
        await machine.delete(force=True)
    assert machine.state is STOPPED
    getattr(toy, gate).clear()
    await machine.delete()
    toy.check()
    assert toy.things == set()


@in_loop
async def test_a_delete_that_hangs_ends_at_its_deadline_and_can_be_repeated() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(STOPPED)
    toy.before["delete"] = hang
    with pytest.raises(DeadlineExceeded, match=r"delete did not finish within 0\.01 s"):
        await machine.delete(timeout=0.01)
    assert machine.state is STOPPED
    toy.before.clear()
    await machine.delete()
    toy.check()


@in_loop
async def test_a_forced_delete_whose_kill_fails_leaves_the_machine() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(PAUSED)
    toy.before["kill"] = fail(OperationFailed("stuck"))
    with pytest.raises(OperationFailed, match="stuck"):
        await machine.delete(force=True)
    assert machine.state is PAUSED
    toy.check()


# Questions.


@in_loop
async def test_status_agrees_with_what_changed_behind_vmlab_s_back() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    machine.guest = PAUSED
    assert (await machine.status()).state is PAUSED
    assert machine.state is PAUSED
    machine.guest = STOPPED
    machine.toy.things.discard(f"process {machine.id}")
    status = await machine.status()
    assert (status.state, status.reason) == (STOPPED, "the hypervisor says so")
    machine._set(RUNNING)
    assert (await machine.status()).state is RUNNING
    assert way(machine)[-2:] == ["unknown", "running"]
    toy.check()


@in_loop
async def test_a_machine_that_never_ran_or_failed_is_not_merely_off() -> None:
    toy = ToyHypervisor()
    for state in (CREATED, FAILED):
        machine = await toy.machine(state, name=state.value)
        machine.guest = STOPPED
        assert (await machine.status()).state is state


class Stale(ToyMachine):
    """Answers with what was true at some time."""

    answer: tuple[MachineState, float]

    async def _do_status(self) -> tuple[MachineState, float]:
        async with self._hook("status", question=True):
            return self.answer


@in_loop
async def test_a_stale_answer_is_told_with_its_time_and_not_believed() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    machine.__class__ = Stale
    assert isinstance(machine, Stale)
    toy.time = 2000
    await machine.pause()
    machine.answer = (RUNNING, 1990)
    status = await machine.status()
    assert (status.state, status.time) == (RUNNING, 1990)
    assert machine.state is PAUSED


@pytest.mark.parametrize("operation", ["pause", "delete"])
@in_loop
async def test_what_happened_while_it_was_asked_is_newer_than_the_answer(operation: str) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING if operation == "pause" else STOPPED)
    gate = toy.after["observe"] = Gate()
    asked = asyncio.create_task(machine.status())
    await gate.reached.wait()
    del toy.after["observe"]
    await getattr(machine, operation)()
    gate.open.set()
    expected = PAUSED if operation == "pause" else DELETED
    assert (await asked).state is expected
    assert machine.state is expected


@in_loop
async def test_status_while_an_operation_begins_is_the_operation_s() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    gates = toy.after["observe"], toy.before["plug_disk"] = Gate(), Gate()
    asked = asyncio.create_task(machine.status())
    await gates[0].reached.wait()
    plugging = asyncio.create_task(machine.plug_disk(Disk(name="d", size=MIB)))
    await gates[1].reached.wait()
    machine.guest = PAUSED
    gates[0].open.set()
    status = await asked
    assert (status.state, status.operation) == (RUNNING, "plug_disk-3")
    machine.guest = RUNNING
    gates[1].open.set()
    await plugging
    toy.check()


@in_loop
async def test_a_deleted_machine_tells_its_state() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(CREATED)
    toy.before["observe"] = fail(OperationFailed("gone"))
    with pytest.raises(OperationFailed):
        await machine.status()
    await machine.delete()
    assert (await machine.status()).state is DELETED
    again = await toy.machine(CREATED)
    toy.before["observe"] = gate = Gate()
    toy.after["observe"] = fail(OperationFailed("gone"))
    asked = asyncio.create_task(again.status())
    await gate.reached.wait()
    await again.delete()
    gate.open.set()
    assert (await asked).state is DELETED


@in_loop
async def test_questions_wait_for_nothing_but_their_answer() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    gate = toy.before["pause"] = Gate()
    task = asyncio.create_task(machine.pause())
    await gate.reached.wait()
    assert (await machine.info()).vcpus == 1
    assert (await machine.metrics()).memory.total_bytes == machine.spec.memory.size
    assert await machine.snapshots() == []
    for ask in (machine.console, lambda: machine.channel("c")):
        with pytest.raises(ResourceNotFound if ask == machine.console else InvalidState):
            await ask()
    gate.open.set()
    await task
    with pytest.raises(ResourceNotFound):
        await machine.channel("c")
    toy.before["info"] = hang
    with pytest.raises(DeadlineExceeded):
        await machine.info(timeout=0.01)
    toy.before["info"] = fail(OSError("x"))
    with pytest.raises(OperationFailed):
        await machine.info()
    toy.check()


# Snapshots and copies.


@pytest.mark.parametrize(
    ("state", "memory", "able", "saved"),
    [
        (RUNNING, None, True, True),
        (RUNNING, None, False, False),
        (RUNNING, False, True, False),
        (RUNNING, True, True, True),
        (PAUSED, None, True, True),
        (STOPPED, None, True, False),
        (CREATED, False, True, False),
    ],
)
@in_loop
async def test_a_snapshot_has_memory_if_it_can_and_is_not_told_otherwise(
    state: MachineState, memory: bool | None, able: bool, saved: bool
) -> None:
    toy = ToyHypervisor(lacks=() if able else (Capability.MEMORY_SNAPSHOT,))
    machine = await toy.machine(state)
    snapshot = await machine.snapshot("s", memory=memory)
    assert (snapshot.memory, snapshot.state) == (saved, state)
    assert machine.state is state
    assert await machine.snapshots() == [snapshot]
    toy.check()


@in_loop
async def test_snapshots_that_cannot_be_are_refused_before_they_begin() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(STOPPED)
    await machine.snapshot("s")
    before = toy.log.last
    with pytest.raises(OperationFailed, match="there is a snapshot 's' already"):
        await machine.snapshot("s")
    with pytest.raises(InvalidState, match="has to be running or paused") as caught:
        await machine.snapshot("t", memory=True)
    assert caught.value.hint is not None
    with pytest.raises(InvalidSpec, match=r"snapshot = '\.\./x'"):
        await machine.snapshot("../x")
    for call in (machine.delete_snapshot, machine.restore):
        with pytest.raises(SnapshotNotFound, match="has no snapshot 'x'"):
            await call("x")
    assert toy.log.last == before
    await machine.delete_snapshot("s")
    assert await machine.snapshots() == []
    assert len(of_type(toy, EventType.SNAPSHOT_TAKEN, EventType.SNAPSHOT_DELETED)) == 2
    toy.check()


@in_loop
async def test_a_snapshot_with_memory_brings_its_state_back() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(PAUSED)
    await machine.snapshot("s")
    for leave in (machine.resume, machine.kill):
        await leave()
        await machine.restore("s")
        assert machine.state is PAUSED
        toy.check()


@in_loop
async def test_a_snapshot_without_memory_is_for_a_machine_at_rest() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(CREATED)
    await machine.snapshot("s")
    await machine.start()
    before = toy.log.last
    with pytest.raises(InvalidState, match="has to be created or stopped or failed") as caught:
        await machine.restore("s")
    assert caught.value.hint == "the snapshot has no memory in it: stop the machine first"
    assert toy.log.last == before
    await machine.stop()
    await machine.restore("s")
    assert machine.state is STOPPED
    toy.check()


@in_loop
async def test_a_corrupt_snapshot_harms_nothing() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    await machine.snapshot("s")
    machine.saved["s"] = machine.saved["s"].model_copy(update={"digest": "corrupt"})
    with pytest.raises(CorruptSnapshot):
        await machine.restore("s")
    assert machine.state is RUNNING
    toy.check()


@pytest.mark.parametrize("state", [RUNNING, PAUSED])
@in_loop
async def test_a_fork_is_a_machine_of_its_own_in_the_same_state(state: MachineState) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(state, nics=[{"name": "n", "mac": "52:54:00:00:00:01"}])
    child = await machine.fork("b")
    assert (child.name, child.state, machine.state) == ("b", state, state)
    assert child.id != machine.id
    assert child.spec.nics[0].mac is None
    assert await toy.get("b") is child
    toy.check()
    await machine.delete(force=True)
    await child.stop()
    toy.check()


@in_loop
async def test_a_fork_needs_a_free_name_that_is_one() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    before = toy.log.last
    with pytest.raises(MachineExists):
        await machine.fork("a")
    with pytest.raises(InvalidSpec):
        await machine.fork("a b")
    assert toy.log.last == before
    gate = toy.before["fork"] = Gate()
    task = asyncio.create_task(machine.fork("b"))
    await gate.reached.wait()
    with pytest.raises(MachineExists):
        await toy.machine(name="b")
    gate.open.set()
    await task
    toy.check()


@in_loop
async def test_a_fork_that_fails_leaves_nothing_but_the_machine() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    toy.after["fork"] = fail(OSError("no memory"))
    with pytest.raises(OperationFailed, match="no memory"):
        await machine.fork("b")
    assert toy.undone == ["b:fork-3", "a:fork-3"]
    toy.check()
    toy.after.clear()
    await machine.fork("b")
    toy.check()


# Migration.


@pytest.mark.parametrize("state", [CREATED, RUNNING, PAUSED, STOPPED])
@in_loop
async def test_a_machine_migrates_with_its_state_and_id(state: MachineState) -> None:
    here, there = ToyHypervisor(), ToyHypervisor(OTHER)
    machine = await here.machine(state)
    seen: list[tuple[int, int]] = []
    arrived = await machine.migrate(there, progress=lambda *sent: seen.append(sent))
    assert (arrived.id, arrived.name, arrived.state) == (machine.id, "a", state)
    assert machine.state is DELETED
    assert seen == [(0, 100), (50, 100), (100, 100)]
    assert await here.list() == []
    assert await there.list() == [arrived]
    assert of_type(here, EventType.MIGRATED)[0].data == {"to": "run:r2"}
    here.check()
    there.check()
    back = await arrived.migrate(here, live=state in {RUNNING, PAUSED})
    assert back.state is state
    here.check()
    there.check()


@in_loop
async def test_a_migration_to_nowhere_is_refused() -> None:
    here, there = ToyHypervisor(), ToyHypervisor(OTHER)
    machine = await here.machine(RUNNING)
    before = here.log.last
    for target in (here, None, "there"):
        with pytest.raises(InvalidSpec, match="another hypervisor of the kind 'toy'"):
            await machine.migrate(target)  # that is refused
    with pytest.raises(InvalidState, match="has to be created or stopped"):
        await machine.migrate(there, live=False)
    await there.machine(name="a")
    with pytest.raises(MachineExists):
        await machine.migrate(there)
    weak = ToyHypervisor(OTHER, vcpus_per_machine=1)
    big = await here.machine(RUNNING, name="big", cpus=2)
    with pytest.raises(ResourceExhausted):
        await big.migrate(weak)
    cold = ToyHypervisor(OTHER, lacks=(Capability.LIVE_MIGRATION,))
    with pytest.raises(UnsupportedOperation) as caught:
        await machine.migrate(cold)
    assert caught.value.capability == "live-migration"
    assert not of_type(here, EventType.OPERATION_FAILED)
    assert here.log.last > before
    here.check()


@pytest.mark.parametrize(
    ("gate", "hook"), [("before", "migrate"), ("after", "migrate"), ("before", "hand_over")]
)
@in_loop
async def test_a_migration_that_fails_leaves_the_machine_here_and_nothing_there(
    hook: str, gate: str
) -> None:
    here, there = ToyHypervisor(), ToyHypervisor(OTHER)
    machine = await here.machine(RUNNING)
    getattr(here, gate)[hook] = fail(OSError("no route"))
    with pytest.raises(MigrationFailed, match="no route"):
        await machine.migrate(there)
    assert machine.state is RUNNING
    assert here.undone == there.undone == ["a:migrate-3"]
    assert await there.list() == []
    here.check()
    there.check()
    getattr(here, gate).clear()
    await machine.migrate(there)
    there.check()


@in_loop
async def test_a_migration_that_was_cancelled_while_it_is_handed_over_has_arrived() -> None:
    here, there = ToyHypervisor(), ToyHypervisor(OTHER)
    machine = await here.machine(RUNNING)
    gate = here.before["hand_over"] = Gate()
    task = asyncio.create_task(machine.migrate(there))
    await gate.reached.wait()
    task.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert machine.state is DELETED
    assert (await there.get("a")).state is RUNNING
    assert here.undone == there.undone == []
    here.check()
    there.check()


@in_loop
async def test_a_handover_that_hangs_ends_in_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmlab.hypervisors.operated_machine.UNDO_TIMEOUT", 0.01)
    here, there = ToyHypervisor(), ToyHypervisor(OTHER)
    machine = await here.machine(RUNNING)
    here.before["hand_over"] = hang
    with pytest.raises(DeadlineExceeded):
        await machine.migrate(there, timeout=0.01)
    assert machine.state is RUNNING
    here.check()
    there.check()


@pytest.mark.parametrize("error", [MachineCrashed("dead"), OperationAborted("ended")])
@in_loop
async def test_a_migration_that_did_not_fail_by_itself_tells_why(error: OperationFailed) -> None:
    here = ToyHypervisor()
    machine = await here.machine(RUNNING)
    here.before["migrate"] = fail(error)
    with pytest.raises(type(error)) as caught:
        await machine.migrate(ToyHypervisor(OTHER))
    assert caught.value is error


# Devices.


@in_loop
async def test_disks_and_nics_come_and_go_with_the_specification() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    await machine.plug_disk(Disk(name="d", size=MIB))
    await machine.plug_nic(Nic(name="n"))
    assert [disk.name for disk in machine.spec.disks] == ["root", "d"]
    resized = await machine.resize_disk("d", 2 * MIB)
    disk = machine.spec.disk("d")
    assert disk is not None
    assert resized.size == disk.size == 2 * MIB
    await machine.unplug_disk("root")
    await machine.unplug_nic("n")
    assert [disk.name for disk in machine.spec.disks] == ["d"]
    assert machine.spec.nics == ()
    data = [
        event.data for event in toy.log.since(0) if event.type.value.startswith(("disk-", "nic-"))
    ]
    assert data == [
        {"disk": "d"},
        {"nic": "n"},
        {"disk": "d", "size": 2 * MIB},
        {"disk": "root"},
        {"nic": "n"},
    ]
    toy.check()


@in_loop
async def test_machines_are_resized_and_pinned_with_the_specification() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(STOPPED, cpus={"count": 2, "sockets": 2})
    info = await machine.resize(vcpus=4, memory=1 << 30)
    assert (info.vcpus, info.memory) == (4, 1 << 30)
    assert (machine.spec.cpus.count, machine.spec.cpus.sockets) == (4, None)
    assert machine.spec.memory.size == 1 << 30
    await machine.resize(vcpus=3)
    await machine.resize(memory=2 << 30)
    await machine.pin({0: (0, 1), 2: (3,)})
    assert machine.spec.cpus.pinning == {0: (0, 1), 2: (3,)}
    (pinned,) = of_type(toy, EventType.PINNED)
    assert pinned.data == {"pinning": {"0": [0, 1], "2": [3]}}
    toy.check()


@pytest.mark.parametrize(
    ("operation", "arguments", "options", "error"),
    [
        ("plug_disk", (Disk(name="root", size=MIB),), {}, InvalidSpec),
        ("plug_disk", (Disk(name="big", size=1 << 40),), {}, ResourceExhausted),
        ("plug_disk", ("x",), {}, InvalidSpec),
        ("unplug_disk", ("x",), {}, ResourceNotFound),
        ("resize_disk", ("x", 2 * MIB), {}, ResourceNotFound),
        ("resize_disk", ("root", 512), {}, InvalidSpec),
        ("resize_disk", ("root", MIB + 1), {}, InvalidSpec),
        ("resize_disk", ("root", -1), {}, InvalidSpec),
        ("resize_disk", ("root", None), {}, InvalidSpec),
        ("resize_disk", ("root", 1 << 40), {}, ResourceExhausted),
        ("plug_nic", (Nic(name="n"),), {}, InvalidSpec),
        ("plug_nic", (Nic(name="m"),), {}, ResourceExhausted),
        ("unplug_nic", ("x",), {}, ResourceNotFound),
        ("resize", (), {}, InvalidSpec),
        ("resize", (), {"vcpus": 0}, InvalidSpec),
        ("resize", (), {"vcpus": 9}, ResourceExhausted),
        ("resize", (), {"memory": 5}, InvalidSpec),
        ("pin", ({7: (0,)},), {}, InvalidSpec),
        ("inject", (NetPartition(nic="n"),), {}, UnsupportedOperation),
        ("fork", ("a",), {}, MachineExists),
    ],
)
@in_loop
async def test_devices_that_cannot_be_are_refused_before_anything_changes(
    operation: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[VmlabError]
) -> None:
    toy = ToyHypervisor(disk_size=1 << 30, nics_per_machine=1, vcpus_per_machine=8)
    machine = await toy.machine(RUNNING, nics=[{"name": "n"}])
    spec, before = machine.spec, toy.log.last
    with pytest.raises(error):
        await getattr(machine, operation)(*arguments, **options)
    assert machine.spec == spec
    assert toy.log.last == before
    assert toy.undone == []
    toy.check()


@pytest.mark.parametrize(
    ("operation", "arguments", "hook"),
    [
        ("plug_disk", (Disk(name="d", size=MIB),), "plug_disk"),
        ("unplug_disk", ("root",), "unplug_disk"),
        ("resize_disk", ("root", 2 * MIB), "resize_disk"),
        ("plug_nic", (Nic(name="n2"),), "plug_nic"),
        ("unplug_nic", ("n",), "unplug_nic"),
        ("pin", ({0: (0,)},), "pin"),
        ("resize", (), "resize"),
    ],
)
@in_loop
async def test_the_specification_stays_when_a_change_fails(
    operation: str, arguments: tuple[Any, ...], hook: str
) -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING, nics=[{"name": "n"}])
    spec = machine.spec
    toy.after[hook] = fail(FaultInjected("no"))
    options = {"vcpus": 2} if operation == "resize" else {}
    with pytest.raises(FaultInjected):
        await getattr(machine, operation)(*arguments, **options)
    assert machine.spec == spec
    assert machine.state is RUNNING
    toy.check()


@in_loop
async def test_faults_are_injected_and_cleared() -> None:
    toy = ToyHypervisor()
    machine = await toy.machine(RUNNING)
    fault = await machine.inject(DiskError(disk="root"))
    await machine.clear_fault(fault)
    injected, cleared = of_type(toy, EventType.FAULT_INJECTED, EventType.FAULT_CLEARED)
    assert injected.data == {"fault": fault, "kind": "disk-error"}
    assert cleared.data == {"fault": fault}
    with pytest.raises(ResourceNotFound):
        await machine.clear_fault("x")
    toy.check()


@pytest.mark.parametrize("name", ["", "a/b", "..", 5, None])
def test_names_of_parts_are_safe_as_names_of_files(name: Any) -> None:
    with pytest.raises(InvalidSpec) as caught:
        check_part_name("snapshot", name, operation="snapshot")
    assert caught.value.operation == "snapshot"
    check_part_name("snapshot", "a-1.b_c")

"""Schedules applied to machines, on the simulator's virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.hypervisors.simulated.conftest import (
    GuestRefused,
    Probe,
    make_profile,
    make_spec,
    open_simulated,
)

from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.lab.armed import Armed
from vmlab.lab.faulting import FaultEvent, FaultRun, ordinal, refusals, refuse
from vmlab.lab.laboratory import Lab
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import InvalidSpec, UnsupportedOperation, VmlabError
from vmlab.machine.faults import ClockJump, FaultKind, FaultSchedule
from vmlab.machine.states import MachineState

READ = {"do": "read_disk", "disk": "data", "offset": 0, "length": 1}
WRITE = {"do": "write_disk", "disk": "data", "offset": 0, "data": "ff"}

Told = list[FaultEvent]
Body = Callable[..., Awaitable[None]]


def schedule(text: str) -> FaultSchedule:
    return FaultSchedule.parse(text)


def run(body: Body, *names: str, seed: int = 1) -> None:
    """Run `body` with started machines of those names."""
    hypervisor = open_simulated(seed=seed)

    async def whole() -> None:
        async with hypervisor:
            machines = [await hypervisor.create(make_spec(name)) for name in names or ("vm",)]
            for machine in machines:
                await machine.start()
            await body(*machines)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert [task for task in others if "FaultRun" in repr(task)] == []

    with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
        runner.run(whole())


async def outcomes(ask: Probe, count: int, request: dict[str, Any] = READ) -> list[bool]:
    found = []
    for _ in range(count):
        try:
            await ask(**request)
            found.append(True)
        except GuestRefused:
            found.append(False)
    return found


def actions(told: Told) -> list[tuple[str, str, float]]:
    return [(event.id, event.action, round(event.at_s, 1)) for event in told]


def test_faults_happen_at_their_times_and_last_as_long_as_they_say() -> None:
    text = """
    [[faults]]
    kind = "disk-error"
    disk = "data"
    when = { on = "time", seconds = 10 }
    duration = 5
    [[faults]]
    kind = "net-partition"
    nic = "net"
    """

    async def body(machine: Machine) -> None:
        told: Told = []
        ask = await Probe.of(machine)
        async with FaultRun(machine, schedule(text), on_fault=told.append):
            assert await outcomes(ask, 1) == [True]
            assert not (await machine.info()).nics[0].link
            await asyncio.sleep(12)
            assert await outcomes(ask, 2) == [False, False]
            await asyncio.sleep(5)
            assert await outcomes(ask, 1) == [True]
        assert (await machine.info()).nics[0].link
        assert [event[:2] for event in actions(told)] == [
            ("net-partition-2", "injected"),
            ("disk-error-1", "injected"),
            ("disk-error-1", "cleared"),
            ("net-partition-2", "cleared"),
        ]
        assert actions(told)[1:3] == [
            ("disk-error-1", "injected", 10.0),
            ("disk-error-1", "cleared", 15.0),
        ]
        assert {event.machine for event in told} == {"vm"}
        assert {event.kind for event in told} == {"disk-error", "net-partition"}

    run(body)


def test_a_fault_that_is_disarmed_before_its_time_never_happens() -> None:
    async def body(machine: Machine) -> None:
        told: Told = []
        text = 'faults = [{ kind = "kill", when = { on = "time", seconds = 10 } }]'
        armed = FaultRun(machine, schedule(text), on_fault=told.append)
        await armed.arm()
        with pytest.raises(VmlabError, match="armed already"):
            await armed.arm()
        await asyncio.sleep(9)
        await armed.disarm()
        await armed.disarm()
        await asyncio.sleep(5)
        assert machine.state is MachineState.RUNNING
        assert told == []

    run(body)


def test_occasions_are_counted_by_the_hypervisor() -> None:
    text = """
    [[faults]]
    id = "third"
    kind = "disk-error"
    disk = "data"
    operation = "read"
    when = { on = "nth", n = 3 }
    """

    async def body(machine: Machine) -> None:
        told: Told = []
        ask = await Probe.of(machine)
        async with FaultRun(machine, schedule(text), on_fault=told.append):
            assert await outcomes(ask, 5) == [True, True, False, True, True]
        assert [event.action for event in told] == ["injected", "cleared"]
        assert told[0].reason == "strikes at the 3rd occasion"

    run(body)


CHANCES = """
seed = {seed}
[[faults]]
kind = "disk-error"
disk = "data"
when = {{ on = "chance", probability = 0.5 }}
"""


def luck(seed: int, *names: str, machines_seed: int = 1) -> list[list[bool]]:
    """Which of 40 reads succeed on each of the machines."""
    found: list[list[bool]] = []

    async def body(*machines: Machine) -> None:
        async with FaultRun(machines, schedule(CHANCES.format(seed=seed))):
            for machine in machines:
                found.append(await outcomes(await Probe.of(machine), 40))

    run(body, *names, seed=machines_seed)
    return found


def test_the_same_seed_gives_the_same_faults_whatever_the_machines_are_called() -> None:
    once = luck(7, "vm-1", "vm-2")
    assert luck(7, "other", "another", machines_seed=99) == once
    assert once[0] != once[1]
    assert 5 < sum(once[0]) < 35
    assert luck(8, "vm-1", "vm-2") != once


def test_the_same_schedule_tells_the_same_at_the_same_times() -> None:
    text = """
    seed = 3
    [[faults]]
    kind = "disk-error"
    disk = "data"
    when = { on = "time", seconds = 2.5 }
    duration = 1
    [[faults]]
    kind = "pause"
    when = { on = "time", seconds = 4 }
    duration = 2
    [[faults]]
    kind = "net-loss"
    nic = "net"
    ratio = 0.5
    [[faults]]
    kind = "power-cut"
    restart = true
    when = { on = "console", text = "give up" }
    """

    def told() -> Told:
        found: Told = []

        async def body(machine: Machine) -> None:
            ask = await Probe.of(machine)
            async with FaultRun(machine, schedule(text), on_fault=found.append):
                await asyncio.sleep(7)
                await ask.send("print", text="I give up\n")
                await asyncio.sleep(7)

        run(body)
        return found

    first = told()
    assert told() == first
    assert [(event.id, event.action) for event in first] == [
        ("net-loss-3", "injected"),
        ("disk-error-1", "injected"),
        ("disk-error-1", "cleared"),
        ("pause-2", "injected"),
        ("pause-2", "cleared"),
        ("power-cut-4", "injected"),
        ("net-loss-3", "cleared"),
    ]


def test_a_text_on_the_console_is_found_across_reads_and_once() -> None:
    when = '{ on = "console", text = "né!" }'
    text = f'faults = [{{ kind = "disk-error", disk = "data", when = {when} }}]'

    async def body(machine: Machine) -> None:
        told: Told = []
        ask = await Probe.of(machine)
        async with FaultRun(machine, schedule(text), on_fault=told.append):
            for piece in ("n", "é", "e!", " né"):
                await ask("print", text=piece)
                await asyncio.sleep(1)
            assert await outcomes(ask, 1) == [True]
            await ask("print", text="! and né! again")
            await asyncio.sleep(1)
            assert await outcomes(ask, 1) == [False]
        assert [event.action for event in told] == ["injected", "cleared"]

    run(body)


def test_faults_go_to_the_machine_that_they_name_and_else_to_all() -> None:
    text = """
    faults = [
        { kind = "net-partition", nic = "net", machine = "b" },
        { kind = "disk-error", disk = "data" },
    ]
    """

    async def body(a: Machine, b: Machine) -> None:
        told: Told = []
        async with FaultRun([a, b], schedule(text), on_fault=told.append):
            assert [(await each.info()).nics[0].link for each in (a, b)] == [True, False]
            for each in (a, b):
                assert await outcomes(await Probe.of(each), 1) == [False]
        assert [(event.id, event.machine) for event in told if event.action == "injected"] == [
            ("net-partition-1", "b"),
            ("disk-error-2", "a"),
            ("disk-error-2", "b"),
        ]

    run(body, "a", "b")


def test_what_a_machine_does_not_have_is_said_before_anything_is_broken() -> None:
    text = """
    faults = [
        { kind = "pause" },
        { kind = "disk-slow", disk = "dta", delay = 1 },
        { kind = "net-loss", nic = "lan" },
        { kind = "cpu-stall", vcpu = 2 },
        { kind = "kill", machine = "nobody" },
        { kind = "kill", when = { on = "console", text = "x" } },
    ]
    """

    async def body(machine: Machine) -> None:
        told: Told = []
        faults = FaultRun(machine, schedule(text), console_name="hvc9", on_fault=told.append)
        with pytest.raises(InvalidSpec) as caught:
            await faults.arm()
        assert [problem.field for problem in caught.value.problems] == [
            "faults.1.disk",
            "faults.2.nic",
            "faults.3.vcpu",
            "faults.4.machine",
            "faults.5.when.on",
        ]
        assert "one of the disks of 'vm': data" in str(caught.value)
        assert machine.state is MachineState.RUNNING
        assert told == []

    run(body)


def test_a_fault_that_fails_when_its_time_comes_is_told_as_refused() -> None:
    async def body(machine: Machine) -> None:
        told: Told = []
        text = 'faults = [{ kind = "pause", when = { on = "time", seconds = 5 } }]'
        async with FaultRun(machine, schedule(text), on_fault=told.append):
            await machine.kill()
            await asyncio.sleep(6)
        assert [(event.id, event.action) for event in told] == [("pause-1", "refused")]
        assert "stopped" in told[0].reason

    run(body)


def test_the_end_of_a_fault_whose_machine_is_gone_is_told_with_the_reason() -> None:
    async def body(machine: Machine) -> None:
        told: Told = []
        text = 'faults = [{ kind = "disk-slow", disk = "data", delay = 1, duration = 5 }]'
        async with FaultRun(machine, schedule(text), on_fault=told.append):
            await machine.delete(force=True)
            await asyncio.sleep(6)
        assert [event.action for event in told] == ["injected", "cleared"]
        assert told[1].reason

    run(body)


def test_a_mistake_of_who_is_told_comes_out_and_leaves_nothing_broken() -> None:
    at_once = 'faults = [{ kind = "net-partition", nic = "net" }]'
    later = (
        'faults = [{ kind = "net-partition", nic = "net", when = { on = "time", seconds = 1 } }]'
    )

    def mistaken(event: FaultEvent) -> None:
        if event.action == "injected":
            raise ZeroDivisionError

    async def body(machine: Machine) -> None:
        with pytest.raises(ZeroDivisionError):
            await FaultRun(machine, schedule(at_once), on_fault=mistaken).arm()
        assert (await machine.info()).nics[0].link
        faults = FaultRun(machine, schedule(later), on_fault=mistaken)
        await faults.arm()
        await asyncio.sleep(2)
        assert not (await machine.info()).nics[0].link
        with pytest.raises(ZeroDivisionError):
            await faults.disarm()
        assert (await machine.info()).nics[0].link

    run(body)


def test_a_fault_that_has_a_seed_keeps_it() -> None:
    text = """
    seed = {seed}
    [[faults]]
    kind = "disk-error"
    disk = "data"
    seed = 5
    when = {{ on = "chance", probability = 0.5 }}
    """

    def luck(seed: int) -> list[bool]:
        found: list[bool] = []

        async def body(machine: Machine) -> None:
            async with FaultRun(machine, schedule(text.format(seed=seed))):
                found.extend(await outcomes(await Probe.of(machine), 20))

        run(body)
        return found

    assert luck(1) == luck(2)


class Watching:
    """A watchdog that knows what is meant for now."""

    def __init__(self) -> None:
        self.expected: list[str] = []

    @contextmanager
    def expect(self, *kinds: str) -> Iterator[None]:
        self.expected += kinds
        yield
        del self.expected[:]


def test_the_end_of_a_machine_is_meant_while_a_schedule_may_end_it() -> None:
    later = '{ on = "time", seconds = 10000 }'
    kill = schedule(f'faults = [{{ kind = "kill", machine = "a", when = {later} }}]')
    with Lab(hypervisor="simulated", seed=7) as lab:
        a, b = lab.vm(name="a"), lab.vm(name="b")
        a.watchdog, b.watchdog = watching = Watching(), Watching()
        with Armed([a, b], kill):
            assert [each.expected for each in watching] == [
                ["unexpected-exit", "unexpected-reboot"],
                [],
            ]
        assert watching[0].expected == []
        with Armed([a], schedule(f'faults = [{{ kind = "pause", when = {later} }}]')):
            assert watching[0].expected == []
        with pytest.raises(InvalidSpec, match=r"faults\.0\.machine"):
            Armed([b], kill)
        wrong = 'faults = [{ kind = "kill" }, { kind = "net-loss", nic = "x" }]'
        with pytest.raises(InvalidSpec):
            Armed([a], schedule(wrong))
        assert watching[0].expected == []


ALL = """
faults = [
    { id = "cut", kind = "power-cut" },
    { id = "second write", kind = "disk-error", disk = "d", when = { on = "nth", n = 2 } },
    { id = "dice", kind = "net-loss", nic = "n", when = { on = "chance", probability = 0.5 } },
    { id = "at last", kind = "disk-error", disk = "d", when = { on = "time", seconds = 3 } },
]
"""


def capable(**changes: Any) -> Any:
    return open_simulated()._capabilities.model_copy(update={"hypervisor": "some", **changes})


def test_each_fault_that_cannot_be_injected_is_named() -> None:
    faults = schedule(ALL)
    assert refusals(capable(), faults) == []
    refuse(capable(), faults)
    some = capable(faults=frozenset({FaultKind.DISK_ERROR}), counted=frozenset())
    assert [refusal.id for refusal in refusals(some, faults)] == ["cut", "second write", "dice"]
    with pytest.raises(UnsupportedOperation) as caught:
        refuse(some, faults)
    assert caught.value.capability == "fault power-cut, disk-error, net-loss"
    assert caught.value.hint == (
        "cut: some cannot inject the fault power-cut; "
        "second write: some cannot trigger the fault disk-error by nth: "
        "it does not count its occasions; "
        "dice: some cannot inject the fault net-loss"
    )
    without = capable(supported=frozenset(Capability) - {Capability.FAULTS})
    assert len(refusals(without, faults)) == 4


def test_what_strikes_only_breakable_disks_is_refused_for_others() -> None:
    disks = [{"name": "d", "size": "1M"}, {"name": "iso", "size": "1M", "readonly": True}]
    breakable = [{**disk, "breakable": True} for disk in disks]
    some = capable(breakable=frozenset({FaultKind.POWER_CUT, FaultKind.DISK_SLOW}))
    nics = [{"name": "n", "network": "none"}]
    plain, broken = (make_spec(disks=each, nics=nics) for each in (disks, breakable))
    assert refusals(capable(), schedule(ALL), plain) == []
    assert refusals(some, schedule(ALL), broken) == []
    assert refusals(some, schedule(ALL)) == []
    found = refusals(some, schedule(ALL), plain)
    assert [refusal.id for refusal in found] == ["cut", "second write"]
    assert found[0].reason == (
        "some can inject the fault power-cut only where disks are `breakable`: d is not"
    )
    with pytest.raises(UnsupportedOperation, match="power-cut, disk-error"):
        refuse(some, schedule(ALL), plain)


def test_a_clock_is_set_from_inside_where_the_hypervisor_cannot() -> None:
    text = 'faults = [{ kind = "clock-jump", seconds = 60 }, { kind = "clock-jump", seconds = -5 }]'
    counted = 'faults = [{ kind = "clock-jump", seconds = 60, when = { on = "nth", n = 1 } }]'
    unable = capable(faults=frozenset(FaultKind) - {FaultKind.CLOCK_JUMP})
    assert len(refusals(unable, schedule(text))) == 2
    assert refusals(unable, schedule(text), inside=True) == []
    assert len(refusals(unable, schedule(counted), inside=True)) == 1
    jumps: list[float] = []

    async def set_clock(machine: Machine, fault: ClockJump) -> None:
        if fault.seconds < 0:
            raise VmlabError("it may not")
        jumps.append(fault.seconds)

    async def body(machine: Machine) -> None:
        told: Told = []
        async with FaultRun(machine, schedule(text), on_fault=told.append, set_clock=set_clock):
            pass
        # The simulator can do it by itself.
        assert jumps == []
        machine.hypervisor._capabilities = unable  # type: ignore[attr-defined]  # the simulator's
        await FaultRun(machine, schedule(text), on_fault=told.append, set_clock=set_clock).arm()
        assert jumps == [60]
        assert [event.action for event in told] == ["injected", "injected", "injected", "refused"]
        assert told[-1].reason == "it may not"

    run(body)


def test_a_schedule_that_cannot_be_done_changes_nothing_and_is_told() -> None:
    profile = make_profile(without=["faults"])
    hypervisor = open_simulated(profile)

    async def whole(host: SimulatedHypervisor) -> None:
        async with host:
            machine = await host.create(make_spec())
            await machine.start()
            told: Told = []
            text = 'faults = [{ kind = "pause" }, { kind = "kill" }]'
            with pytest.raises(UnsupportedOperation, match="fault pause, kill"):
                await FaultRun(machine, schedule(text), on_fault=told.append).arm()
            assert [(event.id, event.action) for event in told] == [
                ("pause-1", "refused"),
                ("kill-2", "refused"),
            ]
            assert machine.state is MachineState.RUNNING

    with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
        runner.run(whole(hypervisor))


@pytest.mark.parametrize(
    ("number", "words"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (22, "22nd")],
)
def test_places_in_an_order_are_written_as_people_do(number: int, words: str) -> None:
    assert ordinal(number) == words


_toml_values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
_lines = st.sampled_from(
    [
        "seed = ",
        "faults = ",
        "[[faults]]\nkind = ",
        "[[faults]]\nkind = 'disk-error'\ndisk = ",
        "[[faults]]\nkind = 'pause'\nduration = ",
        "[[faults]]\nkind = 'kill'\nwhen = ",
        "[[faults]]\nkind = 'kill'\nwhen.on = 'nth'\nwhen.n = ",
        "[[faults]]\nkind = 'net-loss'\nnic = 'n'\nratio = ",
    ]
)


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if not isinstance(value, list) else f"[{', '.join(map(_written, value))}]"


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(_lines, _toml_values), max_size=4), st.text(max_size=20))
def test_whatever_stands_in_a_schedules_file_ends_in_a_schedule_or_in_words(
    lines: list[tuple[str, object]], tail: str
) -> None:
    text = "\n".join(start + _written(value) for start, value in lines) + "\n" + tail
    try:
        read = FaultSchedule.parse(text)
    except VmlabError as error:
        assert str(error)
    else:
        assert refusals(capable(), read) == []

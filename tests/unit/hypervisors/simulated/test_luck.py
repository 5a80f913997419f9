"""What goes wrong by itself: each mode of failure, how it is told, and what it leaves."""

from __future__ import annotations

import asyncio

import pytest

from vmlab.hypervisors.simulated.chances import Chances
from vmlab.hypervisors.simulated.trace import Trace
from vmlab.machine.errors import (
    DeadlineExceeded,
    FaultInjected,
    HypervisorUnavailable,
    MachineCrashed,
    MachineNotFound,
    MigrationFailed,
    OperationFailed,
)
from vmlab.machine.faults import MemoryPressure
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState

CHANGES = {
    "start": lambda machine: machine.start(),
    "kill": lambda machine: machine.kill(),
    "pause": lambda machine: machine.pause(),
    "resume": lambda machine: machine.resume(),
    "snapshot": lambda machine: machine.snapshot("new"),
    "delete_snapshot": lambda machine: machine.delete_snapshot("old"),
    "restore": lambda machine: machine.restore("old"),
    "fork": lambda machine: machine.fork("copy"),
    "plug_disk": lambda machine: machine.plug_disk(Disk(name="new", size=MIB)),
    "unplug_disk": lambda machine: machine.unplug_disk("data"),
    "resize_disk": lambda machine: machine.resize_disk("data", 2 * MIB),
    "plug_nic": lambda machine: machine.plug_nic(Nic(name="new", forwards=[{"guest": 22}])),
    "unplug_nic": lambda machine: machine.unplug_nic("out"),
    "resize": lambda machine: machine.resize(vcpus=1, memory=32 * MIB),
    "pin": lambda machine: machine.pin({0: (5,)}),
    "inject": lambda machine: machine.inject(MemoryPressure(leave=MIB)),
}
"""Operations that change a machine which runs and has a snapshot "old"."""
NICS = [
    {"name": "net", "network": "segment:a"},
    {"name": "out", "forwards": [{"guest": 80, "host": 8080}]},
]


def what_it_is(hv, machine):
    """Everything of a machine that an operation which failed must not have changed."""
    hardware = hv.world.machines[machine.id]
    return {
        "state": machine.state,
        "power": hardware.power,
        "vcpus": hardware.vcpus,
        "memory": hardware.ram.size,
        "contents": hardware.ram.read(0, 8),
        "disks": {name: (disk.size, disk.read(0, 8)) for name, disk in hardware.disks.items()},
        "nics": {name: (nic.mac, tuple(nic.forwards)) for name, nic in hardware.nics.items()},
        "pinning": hardware.pinning,
        "visible": hardware.visible_memory,
        "snapshots": {name: saved.digest for name, saved in hardware.snapshots.items()},
        "ports": len(hv.world.ports),
        "machines": sorted(hv.world.machines),
        "spec": machine.spec,
    }


async def prepared(hv, spec, probe, operation):
    """A machine in the state that `operation` begins in."""
    machine = await hv.create(spec(nics=NICS))
    await machine.start()
    ask = await probe.of(machine)
    await ask("write_memory", offset=0, data="aa")
    await ask("write_disk", disk="data", offset=0, data="bb")
    await machine.snapshot("old")
    await ask("write_memory", offset=0, data="11")
    await ask("write_disk", disk="data", offset=0, data="22")
    if operation == "start":
        await machine.stop()
    if operation == "resume":
        await machine.pause()
    return machine


@pytest.mark.parametrize("mode", ["failures", "partial_failures", "hangs"])
@pytest.mark.parametrize("operation", sorted(CHANGES))
def test_an_operation_that_does_not_succeed_changes_nothing(
    live, spec, probe, profile, operation, mode
):
    async def body(hv):
        # The machine is made in peace; only the one operation is unlucky.
        machine = await prepared(hv, spec, probe, operation)
        unlucky = profile(luck={mode: {operation: 1.0}})
        before = what_it_is(hv, machine)
        hv._conductor._profile = unlucky
        error = DeadlineExceeded if mode == "hangs" else FaultInjected
        with pytest.raises(error) as caught:
            await CHANGES[operation](machine)
        hv._conductor._profile = hv.profile
        if mode != "hangs":
            assert "seed 1" in str(caught.value.hint)
        after = what_it_is(hv, machine)
        if operation == "kill" and mode == "partial_failures":
            # A machine that is dead cannot be undone; the state says so.
            assert after["state"] is MachineState.STOPPED
            return
        if operation == "start" and mode != "hangs":
            # A start that failed by itself is remembered.
            assert after.pop("state") is MachineState.FAILED
            assert before.pop("state") is MachineState.STOPPED
        assert after == before

    live(body)


@pytest.mark.parametrize("mode", ["failures", "partial_failures", "hangs"])
def test_a_machine_that_could_not_be_made_is_not_there(live, spec, profile, mode):
    async def body(hv):
        with pytest.raises((FaultInjected, DeadlineExceeded)):
            await hv.create(spec(nics=NICS))
        assert hv.world.machines == {}
        assert len(hv.world.ports) == 0
        with pytest.raises(MachineNotFound):
            await hv.get("vm")

    live(body, profile(luck={mode: {"create": 1.0}}))


@pytest.mark.parametrize("mode", ["failures", "partial_failures", "hangs"])
def test_a_migration_that_fails_leaves_nothing_there_and_all_of_it_here(
    live, opened, spec, probe, profile, mode
):
    async def body(here):
        there = opened(seed=2)
        machine = await prepared(here, spec, probe, "migrate")
        before = what_it_is(here, machine)
        here._conductor._profile = profile(luck={mode: {"migrate": 1.0}})
        with pytest.raises((MigrationFailed, DeadlineExceeded)):
            await machine.migrate(there, timeout=60)
        here._conductor._profile = here.profile
        assert what_it_is(here, machine) == before
        assert there.world.machines == {}
        assert await (await probe.of(machine))("vcpus") == 2
        await there.close()

    live(body)


def test_a_delete_that_fails_half_way_can_be_repeated(live, spec, profile):
    async def body(hv):
        machine = await hv.create(spec())
        hv._conductor._profile = profile(luck={"partial_failures": {"delete": 1.0}})
        with pytest.raises(FaultInjected):
            await machine.delete()
        assert (await machine.status()).state is MachineState.UNKNOWN
        hv._conductor._profile = hv.profile
        await machine.delete(force=True)
        assert await hv.list() == []

    live(body)


def test_a_delete_that_hangs_ends_with_its_deadline(live, spec, profile):
    async def body(hv):
        machine = await hv.create(spec())
        hv._conductor._profile = profile(luck={"hangs": {"delete": 1.0}})
        with pytest.raises(DeadlineExceeded):
            await machine.delete(timeout=7)
        hv._conductor._profile = hv.profile
        assert machine.state is MachineState.CREATED

    live(body)


def test_rates_are_met_and_any_is_for_the_others(live, spec, profile):
    async def body(hv):
        machine = await hv.create(spec())
        failed = 0
        for _ in range(400):
            try:
                await machine.info()
            except FaultInjected:
                failed += 1
        assert 70 < failed < 130
        await machine.start()

    live(body, profile(luck={"failures": {"any": 0.25, "start": 0.0, "create": 0.0}}))


def test_latencies_vary_evenly_and_as_much_as_the_profile_says(live, spec):
    async def body(hv):
        machine = await hv.create(spec())
        took = []
        for _ in range(300):
            before = asyncio.get_running_loop().time()
            await machine.info()
            took.append(asyncio.get_running_loop().time() - before)
        assert 0.008 <= min(took) < 0.0082
        assert 0.0118 < max(took) <= 0.012001
        assert sum(took) / len(took) == pytest.approx(0.01, rel=0.03)

    live(body)


@pytest.mark.parametrize("limit", [{"operations": 3}, {"seconds": 5}])
def test_from_some_moment_on_everything_fails(live, spec, profile, limit):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.info()
        await machine.info()
        await asyncio.sleep(5)
        for _ in range(3):
            with pytest.raises(FaultInjected, match="fail_after"):
                await machine.info()

    live(body, profile(luck={"fail_after": limit}))


def test_events_get_lost_by_chance(live, spec, profile):
    async def body(hv):
        machine = await hv.create(spec())
        for _ in range(30):
            await machine.start()
            await machine.kill()
        kept = len(await hv.events())
        assert 0.6 < kept / hv.log.last < 0.9
        assert '"lost": true' in hv.trace()

    live(body, profile(luck={"lost_events": 0.25}))


def test_a_status_is_stale_by_chance(live, spec, profile):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        stale = 0
        for _ in range(100):
            asked = hv.now()
            status = await machine.status()
            assert status.state in (MachineState.RUNNING, MachineState.STARTING)
            stale += status.time < asked - 0.4
        assert 15 < stale < 45
        assert "stale-status" in hv.trace()

    live(body, profile(luck={"stale_status": 0.3, "stale_seconds": 0.5}))


def test_a_hypervisor_crashes_by_chance_and_comes_back(live, spec, profile):
    async def body(hv):
        machine = await hv.create(spec())
        hv._conductor._profile = profile(luck={"crashes": 1.0, "back_after": 20})
        with pytest.raises(HypervisorUnavailable, match="crashed") as caught:
            await machine.start()
        assert "seed 1" in str(caught.value.hint)
        assert machine.state is MachineState.UNKNOWN
        hv._conductor._profile = hv.profile
        with pytest.raises(HypervisorUnavailable):
            await hv.create(spec("other"))
        await asyncio.sleep(21)
        assert machine.state is MachineState.CREATED
        await machine.start()

    live(body)


@pytest.mark.parametrize("operation", sorted(CHANGES))
def test_a_crash_under_an_operation_is_put_right_when_it_is_back(live, spec, probe, operation):
    async def body(hv):
        machine = await prepared(hv, spec, probe, operation)
        before = what_it_is(hv, machine)
        doing = asyncio.ensure_future(CHANGES[operation](machine))
        await asyncio.sleep(0.0005)
        hv.crash()
        hv.crash()
        with pytest.raises(HypervisorUnavailable):
            await doing
        assert machine.state is MachineState.UNKNOWN
        for call in (hv.list, hv.capabilities, hv.probe, machine.status, machine.info):
            with pytest.raises(HypervisorUnavailable):
                await call()
        hv.restart()
        hv.restart()
        assert what_it_is(hv, machine) == before

    live(body)


@pytest.mark.parametrize("seconds", [0.01, 0.2])
def test_a_crash_while_a_machine_is_made_or_removed(live, spec, seconds):
    async def body(hv):
        old = await hv.create(spec("old"))
        making = asyncio.ensure_future(hv.create(spec(nics=NICS)))
        removing = asyncio.ensure_future(old.delete())
        await asyncio.sleep(0.01)
        hv.crash(restart_after=seconds)
        ends = await asyncio.gather(making, removing, return_exceptions=True)
        assert [type(end) for end in ends] == [HypervisorUnavailable] * 2
        await asyncio.sleep(1)
        assert [machine.name for machine in await hv.list()] == ["old"]
        assert old.state is MachineState.CREATED
        assert len(hv.world.machines) == 1
        assert len(hv.world.ports) == 0

    live(body)


def test_a_machine_that_was_removed_under_the_crash_is_gone_when_it_is_back(live, spec):
    async def body(hv):
        machine = await hv.create(spec())
        hv.crash()
        hv.world.remove(machine.id)
        hv.restart()
        assert machine.state is MachineState.DELETED
        assert await hv.list() == []

    live(body)


def test_what_happens_while_it_is_down_is_seen_when_it_is_back(live, spec, probe):
    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        ask = await probe.of(machine)
        hv.crash()
        await ask.send("panic")
        await asyncio.sleep(1)
        hv.restart()
        assert machine.state is MachineState.FAILED

    live(body)


def test_closing_pulls_the_plug_whatever_the_luck(live, spec, profile):
    async def body(hv):
        for name in "abc":
            await (await hv.create(spec(name))).start()
        hv._conductor._profile = profile(luck={"failures": 1.0, "hangs": 1.0})
        hv.crash()

    live(body)


def test_the_machine_is_off_before_the_operation_could_begin_its_work(live, spec, probe):
    """Word of a shutdown was lost: what needs a live guest says that there is none."""

    async def body(hv):
        machine = await hv.create(spec())
        await machine.start()
        hv.world.on_notice = None
        await (await probe.of(machine))("poweroff")
        await asyncio.sleep(1)
        with pytest.raises(OperationFailed, match="off") as caught:
            await machine.pause()
        assert not isinstance(caught.value, MachineCrashed)
        assert machine.state is MachineState.STOPPED
        await machine.start()
        await (await probe.of(machine))("poweroff")
        await asyncio.sleep(1)
        with pytest.raises(OperationFailed, match="went off"):
            await machine.channel("vmlab.probe")
        await machine.stop()
        assert machine.state is MachineState.STOPPED

    live(body)


def test_the_same_seed_and_calls_give_the_same_trace(live, spec, probe):
    traces = []

    async def body(hv):
        async def life(name):
            try:
                machine = await hv.create(spec(name))
                await machine.start()
                await machine.restart()
                await machine.stop()
            except Exception as error:
                assert type(error).__module__ == "vmlab.machine.errors"

        await asyncio.gather(*(life(f"vm{number}") for number in range(20)))
        traces.append(hv.trace())

    for seed in (4, 4, 5):
        live(body, "unreliable", seed=seed)
    assert traces[0] == traces[1] != traces[2]
    assert traces[0].startswith('{"seed": 4, "dropped": 0}\n')


def test_one_machines_luck_does_not_depend_on_anothers(live, spec):
    took = []

    def with_others(count):
        async def body(hv):
            for number in range(count):
                await (await hv.create(spec(f"other{number}"))).start()
            before = asyncio.get_running_loop().time()
            await hv.create(spec())
            took.append(round(asyncio.get_running_loop().time() - before, 9))

        return body

    live(with_others(0))
    live(with_others(3))
    assert took[0] == took[1]


def test_draws_are_even_and_named():
    chances = Chances(1)
    draws = [chances.unit("x", number) for number in range(4000)]
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)
    assert chances.unit("x", 1) == Chances(1).unit("x", 1) != Chances(2).unit("x", 1)
    assert len(chances.raw(7, "x")) == 7


def test_a_trace_that_grew_too_long_says_what_it_dropped():
    trace = Trace(9, keep=2)
    for number in range(5):
        trace.add(number, "thing", {"number": number})
    lines = trace.render().splitlines()
    assert lines[0] == '{"seed": 9, "dropped": 3}'
    assert lines[1:] == [
        '{"time": 3, "what": "thing", "number": 3}',
        '{"time": 4, "what": "thing", "number": 4}',
    ]

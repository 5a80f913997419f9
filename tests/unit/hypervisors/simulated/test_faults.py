"""Every kind of fault does what it says, when it says, and ends when it says."""

from __future__ import annotations

import asyncio

import pytest

from vmlab.hypervisors.simulated.faults import ALL_KINDS
from vmlab.machine.errors import (
    DeadlineExceeded,
    FaultInjected,
    HypervisorUnavailable,
    InvalidSpec,
    MachineCrashed,
    ResourceNotFound,
)
from vmlab.machine.faults import (
    At,
    Chance,
    ClockJump,
    ConsoleText,
    CpuStall,
    DiskCorrupt,
    DiskError,
    DiskSlow,
    DiskTornWrite,
    FaultKind,
    FaultSchedule,
    HypervisorCrash,
    KillFault,
    LostEvent,
    MemoryPressure,
    NetDelay,
    NetLoss,
    NetPartition,
    Nth,
    OperationFailure,
    OperationHang,
    OperationPartial,
    PauseFault,
    PowerCut,
    StaleStatus,
)
from vmlab.machine.sizes import MIB
from vmlab.machine.states import MachineState

WRITE = {"do": "write_disk", "disk": "data", "offset": 0, "data": "ff"}


@pytest.fixture
def running(live, spec, probe):
    """Runs a body on a started machine with its probe."""

    def run(body, fields=None, **options):
        async def whole(hv):
            machine = await hv.create(spec(**fields or {}))
            await machine.start()
            await body(machine, await probe.of(machine))

        return live(whole, **options)

    return run


def test_every_kind_is_declared(opened):
    assert opened()._capabilities.faults == ALL_KINDS == frozenset(FaultKind)


def test_a_disk_error_hits_its_operation_alone_and_counts(running, refused):
    async def body(machine, ask):
        fault = await machine.inject(DiskError(disk="data", operation="write", errno="ENOSPC"))
        with pytest.raises(refused, match="ENOSPC"):
            await ask(**WRITE)
        assert await ask("read_disk", disk="data", offset=0, length=1) == "00"
        assert (await machine.metrics()).disks[0].errors == 1
        await machine.clear_fault(fault)
        await machine.clear_fault(fault)
        await ask(**WRITE)
        await machine.inject(DiskError(disk="data", duration=5))
        for do in ({"do": "flush", "disk": "data"}, WRITE):
            with pytest.raises(refused, match="EIO"):
                await ask(**do)
        await asyncio.sleep(6)
        await ask(**WRITE)

    running(body)


def test_a_fault_of_one_disk_leaves_the_others_alone(running, refused):
    disks = [{"name": "data", "size": "1M"}, {"name": "other", "size": "1M"}]

    async def body(machine, ask):
        await machine.inject(DiskError(disk="other"))
        await ask(**WRITE)
        with pytest.raises(refused):
            await ask(**WRITE | {"disk": "other"})

    running(body, fields={"disks": disks})


def test_the_nth_request_fails_once_or_every_time(running, refused):
    async def body(machine, ask):
        async def outcomes(count):
            found = []
            for _ in range(count):
                try:
                    await ask(**WRITE)
                    found.append(True)
                except refused:
                    found.append(False)
            return found

        once = await machine.inject(DiskError(disk="data", when=Nth(n=2)))
        assert await outcomes(4) == [True, False, True, True]
        await machine.clear_fault(once)
        every = await machine.inject(DiskError(disk="data", when=Nth(n=2, every=True)))
        assert await outcomes(4) == [True, False, True, False]
        await machine.clear_fault(every)
        await machine.inject(DiskError(disk="data", when=Nth(n=2), duration=10))
        assert await outcomes(4) == [True, False, False, False]
        await asyncio.sleep(11)
        assert await outcomes(4) == [True] * 4

    running(body)


def test_chance_comes_from_the_seed(running, refused):
    drawn = []

    async def body(machine, ask):
        await machine.inject(DiskError(disk="data", when=Chance(probability=0.5)))
        found = ""
        for _ in range(40):
            try:
                await ask(**WRITE)
                found += "."
            except refused:
                found += "X"
        drawn.append(found)

    for seed in (1, 1, 2):
        running(body, seed=seed)
    assert drawn[0] == drawn[1] != drawn[2]
    assert 8 < drawn[0].count("X") < 32


def test_a_slow_disk_takes_its_time_and_answers_in_order(running):
    async def body(machine, ask):
        loop = asyncio.get_running_loop()
        await machine.inject(DiskSlow(disk="data", delay=3))
        began = loop.time()
        await ask(**WRITE)
        assert loop.time() - began == pytest.approx(3)
        await ask.send(**WRITE)
        await machine.kill()
        assert await ask.channel.read() == b"", "an answer that was on its way does not come"

    running(body)


def test_a_torn_write_reports_success_and_is_half_there(running):
    async def body(machine, ask):
        await machine.inject(DiskTornWrite(disk="data", keep=2, when=Nth(n=1)))
        await ask("write_disk", disk="data", offset=0, data="aabbccdd")
        assert await ask("read_disk", disk="data", offset=0, length=4) == "aabb0000"
        await ask("write_disk", disk="data", offset=0, data="aabbccdd")
        assert await ask("read_disk", disk="data", offset=0, length=4) == "aabbccdd"

    running(body)


def test_corruption_changes_bytes_silently(running):
    async def body(machine, ask):
        await ask(**WRITE)
        await machine.inject(DiskCorrupt(disk="data", offset=0, length=2))
        assert await ask("read_disk", disk="data", offset=0, length=3) == "00ff00"
        # Beyond the end there is nothing to change.
        await machine.inject(DiskCorrupt(disk="data", offset=2 * MIB, length=2))

    running(body)


def test_a_power_cut_drops_what_was_not_flushed(running, probe):
    async def body(machine, ask):
        await ask(**WRITE)
        await ask("flush", disk="data")
        await ask("write_disk", disk="data", offset=1, data="ee")
        await machine.inject(PowerCut())
        assert machine.state is MachineState.FAILED
        await machine.start()
        ask = await probe.of(machine)
        assert await ask("read_disk", disk="data", offset=0, length=2) == "ff00"

    running(body)


def test_a_power_cut_with_restart_brings_it_up_again(running, probe):
    async def body(machine, ask):
        await ask(**WRITE)
        await machine.inject(PowerCut(restart=True))
        assert machine.state is MachineState.RUNNING
        assert await ask.channel.read() == b""
        ask = await probe.of(machine)
        assert await ask("read_disk", disk="data", offset=0, length=1) == "00"
        assert (await (await machine.console()).log()).count(b"Linux version") == 2

    running(body)


def test_a_fault_on_a_machine_that_is_off_by_then_does_nothing(running):
    async def body(machine, ask):
        await machine.inject(PowerCut(when=At(seconds=10)))
        await machine.inject(KillFault(when=At(seconds=10)))
        await machine.stop()
        await asyncio.sleep(20)
        assert machine.state is MachineState.STOPPED

    running(body)


def test_loss_delay_and_partition_of_a_nic(live, spec, probe):
    async def body(hv):
        asks, machines = [], []
        for name in "ab":
            machine = await hv.create(spec(name))
            await machine.start()
            machines.append(machine)
            asks.append(await probe.of(machine))

        async def sent(data="01"):
            await asks[0]("send", nic="net", data=data)
            return await asks[1]("received", nic="net")

        for side in machines:
            lost = await side.inject(NetLoss(nic="net"))
            assert await sent() == []
            await side.clear_fault(lost)
            assert await sent() == ["01"]
        some = await machines[0].inject(NetLoss(nic="net", ratio=0.5))
        arrived = sum([bool(await sent()) for _ in range(60)])
        assert 15 < arrived < 45
        await machines[0].clear_fault(some)
        late = await machines[0].inject(NetDelay(nic="net", delay=2, jitter=1))
        assert await sent() == []
        await asyncio.sleep(1.9)
        assert await asks[1]("received", nic="net") == []
        await asyncio.sleep(1.2)
        assert await asks[1]("received", nic="net") == ["01"]
        await machines[0].clear_fault(late)
        await machines[1].inject(NetPartition(nic="net", duration=60))
        assert (await asks[1]("nics"))[0]["link"] is False
        assert await sent() == []
        await asyncio.sleep(61)
        assert await sent("02") == ["02"]

    live(body)


def test_a_pause_fault_stops_the_guest_and_lets_it_go_on(running):
    async def body(machine, ask):
        await machine.inject(PauseFault(duration=30))
        assert machine.state is MachineState.PAUSED
        await ask.send("vcpus")
        await asyncio.sleep(31)
        assert machine.state is MachineState.RUNNING
        assert (await ask.answer())["result"] == 2
        fault = await machine.inject(PauseFault())
        await machine.clear_fault(fault)
        assert machine.state is MachineState.RUNNING
        # Somebody resumes it before the fault ends: then its end changes nothing.
        await machine.inject(PauseFault(duration=30))
        await machine.resume()
        await asyncio.sleep(31)
        assert machine.state is MachineState.RUNNING

    running(body)


def test_a_kill_now_and_a_kill_under_an_operation(running):
    async def body(machine, ask):
        await machine.inject(KillFault())
        assert machine.state is MachineState.FAILED
        assert await ask.channel.read() == b""
        await machine.start()
        await machine.inject(KillFault(when=At(seconds=0.1)))
        with pytest.raises(MachineCrashed):
            await machine.snapshot("s")
        assert machine.state is MachineState.FAILED
        assert await machine.snapshots() == []
        await machine.start()
        await machine.inject(KillFault(when=Nth(n=1)))
        with pytest.raises(MachineCrashed):
            await machine.pause()

    running(body)


def test_memory_pressure_and_its_end(running):
    async def body(machine, ask):
        fault = await machine.inject(MemoryPressure(leave=16 * MIB))
        assert await ask("memory") == 16 * MIB
        assert (await machine.metrics()).memory.balloon_bytes == 16 * MIB
        await machine.clear_fault(fault)
        assert await ask("memory") == 64 * MIB

    running(body)


def test_a_clock_jump_is_the_guests_alone(running):
    async def body(machine, ask):
        before, mine = await ask("clock"), (await machine.status()).time
        await machine.inject(ClockJump(seconds=-3600))
        assert await ask("clock") - before == pytest.approx(-3600, abs=1)
        assert (await machine.status()).time >= mine

    running(body)


def test_a_stalled_vcpu_uses_no_time_and_the_first_one_answers_nothing(running):
    async def body(machine, ask):
        fault = await machine.inject(CpuStall(vcpu=1))
        before = (await machine.metrics()).cpu.per_vcpu_seconds
        await asyncio.sleep(100)
        after = (await machine.metrics()).cpu.per_vcpu_seconds
        assert after[0] - before[0] > 9
        assert after[1] == pytest.approx(before[1])
        assert await ask("vcpus") == 2
        await machine.clear_fault(fault)
        await machine.inject(CpuStall(vcpu=0, duration=50))
        await ask.send("vcpus")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(49):
                await ask.answer()
        assert (await ask.answer())["result"] == 2
        later = (await machine.metrics()).cpu.per_vcpu_seconds
        assert later[1] > after[1]

    running(body)


def test_operations_fail_hang_and_fail_after_their_effect(running):
    async def body(machine, ask):
        fault = await machine.inject(OperationFailure(operation="pause", message="no pause today"))
        with pytest.raises(FaultInjected, match="no pause today") as caught:
            await machine.pause()
        assert "seed 1" in str(caught.value.hint)
        assert machine.state is MachineState.RUNNING
        await machine.restart()
        await machine.clear_fault(fault)
        await machine.inject(OperationHang(operation="pause", when=Nth(n=1)))
        with pytest.raises(DeadlineExceeded):
            await machine.pause(timeout=5)
        assert machine.state is MachineState.RUNNING
        await machine.inject(OperationPartial(operation="any", when=Nth(n=1)))
        with pytest.raises(FaultInjected):
            await machine.snapshot("s")
        assert await machine.snapshots() == []
        await machine.snapshot("s")

    running(body)


def test_a_lost_event_leaves_a_gap_that_a_reader_sees(running):
    async def body(machine, ask):
        log = machine.hypervisor.log
        await machine.inject(LostEvent(event="snapshot-taken"))
        before = log.last
        follower = log.follow(before)
        await machine.snapshot("s")
        events = await machine.hypervisor.events(before)
        assert "snapshot-taken" not in [event.type.value for event in events]
        numbers = [event.sequence for event in events]
        assert len(numbers) == log.last - before - 1
        assert [(await anext(follower)).sequence for _ in numbers] == numbers
        waiting = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(1)
        assert not waiting.done()
        await machine.pause()
        assert (await waiting).type.value == "operation-started"
        await follower.aclose()

    running(body)


def test_word_of_a_death_can_be_lost_and_the_next_look_tells(running, probe):
    async def body(machine, ask):
        await machine.inject(LostEvent(event="guest-panic", when=Nth(n=1)))
        await ask.send("panic")
        assert await ask.channel.read() == b""
        assert machine.state is MachineState.RUNNING
        # An operation does not believe in a machine that is dead.
        with pytest.raises(MachineCrashed):
            await machine.snapshot("s")
        assert machine.state is MachineState.FAILED
        await machine.start()
        await machine.inject(LostEvent(event="guest-shutdown", when=Nth(n=1)))
        await (await probe.of(machine))("poweroff")
        await asyncio.sleep(1)
        assert machine.state is MachineState.RUNNING
        assert (await machine.status()).state is MachineState.STOPPED
        assert machine.state is MachineState.STOPPED

    running(body)


def test_a_stale_status_is_old_and_changes_nothing(running):
    async def body(machine, ask):
        await machine.inject(StaleStatus(age=5, when=Nth(n=1)))
        await asyncio.sleep(10)
        await machine.pause()
        stale = await machine.status()
        assert stale.state is MachineState.RUNNING
        assert machine.hypervisor.now() - stale.time == pytest.approx(5, abs=0.1)
        assert machine.state is MachineState.PAUSED
        assert (await machine.status()).state is MachineState.PAUSED
        # Older than the machine is: what it was first.
        await machine.inject(StaleStatus(age=1e6, when=Nth(n=1)))
        assert (await machine.status()).state is MachineState.CREATED

    running(body)


def test_a_crash_of_the_hypervisor_orphans_the_machines(running):
    async def body(machine, ask):
        hypervisor = machine.hypervisor
        await machine.inject(HypervisorCrash(restart_after=60))
        assert await ask("vcpus") == 2, "the machine runs on"
        assert machine.state is MachineState.UNKNOWN
        with pytest.raises(HypervisorUnavailable, match="down"):
            await machine.status()
        await asyncio.sleep(61)
        assert machine.state is MachineState.RUNNING
        types = [event.type.value for event in await hypervisor.events()]
        assert types.index("hypervisor-lost") < types.index("hypervisor-back")
        assert types[-1] == "adopted"

    running(body)


def test_a_text_on_the_console_triggers_even_in_parts(running):
    async def body(machine, ask):
        await machine.inject(KillFault(when=ConsoleText(text="login: root")))
        await ask("print", text="vm login: ro")
        assert machine.state is MachineState.RUNNING
        await ask.send("print", text="ot\n")
        assert await ask.channel.read() == b""
        assert machine.state is MachineState.FAILED

    running(body)


@pytest.mark.parametrize(
    ("fault", "field"),
    [
        (DiskError(disk="none"), "disk"),
        (NetLoss(nic="none"), "nic"),
        (CpuStall(vcpu=2), "vcpu"),
        (KillFault(machine="other"), "machine"),
    ],
)
def test_a_fault_of_something_that_is_not_there_is_refused(running, fault, field):
    async def body(machine, ask):
        with pytest.raises(InvalidSpec) as caught:
            await machine.inject(fault)
        assert caught.value.problems[0].field == field
        with pytest.raises(ResourceNotFound):
            await machine.clear_fault("no such fault")

    running(body)


def test_ids_of_faults_are_used_once(running):
    async def body(machine, ask):
        assert await machine.inject(ClockJump(id="mine", seconds=1)) == "mine"
        with pytest.raises(InvalidSpec, match="mine"):
            await machine.inject(ClockJump(id="mine", seconds=1))

    running(body)


def test_a_schedule_of_the_profile_is_armed_with_the_hypervisor(live, spec, probe, profile):
    schedule = FaultSchedule(
        faults=(
            KillFault(machine="a", when=At(seconds=100)),
            OperationFailure(operation="create", machine="c"),
            PauseFault(when=Nth(n=1), machine="b", duration=10),
            LostEvent(event="created"),
        )
    )

    async def body(hv):
        with pytest.raises(FaultInjected):
            await hv.create(spec("c"))
        for name in "ab":
            await (await hv.create(spec(name))).start()
        a, b = await hv.get("a"), await hv.get("b")
        await b.info()
        await asyncio.sleep(1)
        assert b.state is MachineState.RUNNING
        await asyncio.sleep(100)
        assert a.state is MachineState.FAILED
        assert b.state is MachineState.RUNNING
        assert "created" not in [event.type.value for event in await hv.events()]

    live(body, profile(faults=schedule))

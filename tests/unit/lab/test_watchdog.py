"""What becomes of a machine is told once, at once and as what it is; what was asked for is not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated.channels import SimulatedConsole
from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.lab import heartbeat as heartbeat_module
from vmlab.lab import watchdog as watchdog_module
from vmlab.lab.console_rules import Rules
from vmlab.lab.heartbeat import ROUND
from vmlab.lab.incident import Incident, stall_that_explains
from vmlab.lab.incident import IncidentKind as K
from vmlab.lab.watchdog import MOST_INCIDENTS, Watchdog
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded
from vmlab.machine.events import EventType
from vmlab.machine.faults import HypervisorCrash, KillFault, LostEvent, PauseFault, PowerCut
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

OOPS = (
    "[    1.000000] BUG: kernel NULL pointer dereference, address: 0\n"
    "[    1.000001] Oops: 0002 [#1] SMP\n"
    "[    1.000002] ---[ end trace 0 ]---\n"
)
STUCK = "[   30.000000] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [a:1]\n"

Body = Callable[["Watched"], Awaitable[None]]


class Watched:
    """A simulated machine that runs, and what its watchdog told."""

    def __init__(self, hypervisor: SimulatedHypervisor, machine: Machine) -> None:
        self.hypervisor = hypervisor
        self.machine = machine
        self.told: list[Incident] = []

    @property
    def kinds(self) -> list[K]:
        return [incident.kind for incident in self.told]

    @asynccontextmanager
    async def watched(self, **options: Any) -> AsyncIterator[Watchdog]:
        async with Watchdog(self.machine, on_incident=self.told.append, **options) as dog:
            yield dog

    def prints(self, text: str) -> None:
        self.hypervisor.world.machines[self.machine.id].print(text)

    async def asked(self, do: str, **arguments: Any) -> None:
        channel = await self.machine.channel("vmlab.probe")
        await channel.write(json.dumps({"id": 1, "do": do, **arguments}).encode() + b"\n")
        await channel.read()
        await channel.close()


@pytest.fixture
def on_simulated() -> Callable[..., None]:
    """Runs a body with a started machine, on the virtual clock."""

    def run(body: Body, **profile: Any) -> None:
        data = SimulationProfile.load("standard").model_dump() | profile
        owner = Owner("run", "test", Path("/nonexistent"))
        hypervisor = SimulatedHypervisor(owner, SimulationProfile.model_validate(data), seed=1)

        async def whole() -> None:
            try:
                spec = MachineSpec.of(name="vm", memory="64M", channels=["vmlab.probe"])
                machine = await hypervisor.create(spec)
                await machine.start()
                await body(Watched(hypervisor, machine))
            finally:
                await hypervisor.close()
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert left == []

        with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
            runner.run(whole())

    return run


def test_what_the_kernel_reports_is_told_at_once_with_the_whole_report(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            it.prints(OOPS[:20])
            it.prints(OOPS[20:])
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.OOPS]
            (incident,) = it.told
            assert incident.excerpt == OOPS.strip()
            assert incident.machine == "vm" and not incident.fatal
            assert dog.incidents == it.told

    on_simulated(body)


class Polled:
    """A console whose reader looks every now and then whether there is more, as of a log."""

    def __init__(self, stall: Callable[[], None]) -> None:
        self.printed = [OOPS[:-40].encode()]
        self._stall = stall

    async def read(self) -> bytes:
        await asyncio.sleep(0.001)
        if not self.printed:
            # The rest is printed while the host lets this process stand still.
            asyncio.get_running_loop().call_soon(self._stall)
            await asyncio.sleep(0.001)
            while not self.printed:  # noqa: ASYNC110 (a log tells nobody)
                await asyncio.sleep(0.001)
        return self.printed.pop(0)

    async def catch_up(self) -> None:
        pass

    async def close(self) -> None:
        pass


def test_a_report_is_not_cut_where_this_process_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog_module, "_QUIET_INSIDE", 1.0)
    monkeypatch.setattr(watchdog_module, "_QUIET", 1.0)
    told: list[Incident] = []
    stalls = []

    async def body() -> None:
        complete = asyncio.Event()

        def stall() -> None:
            if not stalls:
                stalls.append(time.sleep(1.5))
                console.printed.append(OOPS[-40:].encode())

        def tell(incident: Incident) -> None:
            told.append(incident)
            complete.set()

        console = Polled(stall)
        machine: Any = SimpleNamespace(name="vm", spec=MachineSpec.of(name="vm", memory="64M"))
        dog = Watchdog(machine, on_incident=tell, stamped=True)
        reading = asyncio.create_task(dog._read(console))  # type: ignore[arg-type]
        await asyncio.wait_for(complete.wait(), 60)
        reading.cancel()
        await asyncio.wait({reading})

    asyncio.run(body())
    (incident,) = told
    assert incident.excerpt == OOPS.strip()


def test_what_was_printed_is_seen_before_it_is_settled(
    on_simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(it: Watched) -> None:
        arrived = asyncio.Event()
        read = SimulatedConsole.read

        async def reads_late(console: SimulatedConsole, size: int = 65536) -> bytes:
            data = await read(console, size)
            await arrived.wait()
            return data

        async def catch_up(console: SimulatedConsole) -> None:
            arrived.set()
            await asyncio.sleep(1)

        monkeypatch.setattr(SimulatedConsole, "read", reads_late)
        monkeypatch.setattr(SimulatedConsole, "catch_up", catch_up)
        async with it.watched() as dog:
            it.prints(OOPS)
            await dog.settle()
            assert it.kinds == [K.OOPS]

    on_simulated(body)


def test_a_report_that_nothing_marks_the_end_of_is_told_when_the_console_is_quiet(
    on_simulated,
) -> None:
    async def body(it: Watched) -> None:
        async with it.watched():
            it.prints(STUCK + "[   30.000001] RIP: 0010:spin+0x1/0x2\n")
            await asyncio.sleep(5)
            assert it.kinds == [K.SOFT_LOCKUP]
            assert "RIP" in it.told[0].excerpt

    on_simulated(body)


def test_a_panic_is_told_once_whoever_tells_it_first(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            it.prints(
                "[    2.000000] Kernel panic - not syncing: asked to\n[    2.000001] Call Trace:\n"
            )
            await it.asked("panic", message="asked to")
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.PANIC]
            assert "Call Trace" in it.told[0].excerpt and it.told[0].fatal

    on_simulated(body)


def test_a_panic_of_which_only_the_hypervisor_tells_is_one(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            it.prints("[    1.000000] up\n")
            await it.asked("panic", message="why")
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.PANIC] and "why" in it.told[0].message

    on_simulated(body)


def test_a_guest_that_powers_down_by_itself_has_exited(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            await it.asked("poweroff")
            await asyncio.sleep(10)
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.UNEXPECTED_EXIT] and it.told[0].fatal

    on_simulated(body)


def test_a_machine_that_dies_has_exited_and_one_whose_end_was_lost_too(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            it.hypervisor.world.machines[it.machine.id].die("crashed", "its process was killed")
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.UNEXPECTED_EXIT]
            assert "its process was killed" in it.told[0].message
            await it.machine.start()
            await it.machine.inject(LostEvent(event="crashed"))
            it.hypervisor.world.machines[it.machine.id].die("crashed", "again")
            await asyncio.sleep(1)
            await it.machine.status()
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.UNEXPECTED_EXIT] * 2

    on_simulated(body)


def test_what_was_asked_for_is_no_incident(on_simulated) -> None:
    async def body(it: Watched) -> None:
        machine = it.machine
        async with it.watched():
            await machine.pause()
            await machine.snapshot("s")
            await machine.resume()
            await machine.restart()
            await machine.restart(graceful=False)
            await machine.restore("s")
            await machine.resume()
            await machine.stop()
            await machine.start()
            await machine.kill()
            await machine.start()
            await machine.inject(PauseFault(duration=2))
            await asyncio.sleep(3)
            await machine.inject(PowerCut(restart=True))
            await asyncio.sleep(10)
            await machine.inject(KillFault())
            await asyncio.sleep(1)
            await machine.start()
            await machine.delete(force=True)
        assert it.told == []

    on_simulated(body)


def test_a_guest_that_resets_itself_has_rebooted_unless_it_was_said_so(on_simulated) -> None:
    async def body(it: Watched) -> None:
        # The simulator's guests do not reset themselves.
        reset = it.machine._emit
        async with it.watched() as dog:
            reset(EventType.GUEST_RESET, reason="guest-reset")
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.UNEXPECTED_REBOOT] and not it.told[0].fatal
            with dog.expect("unexpected-reboot") as expectation:
                reset(EventType.GUEST_RESET, reason="guest-reset")
            await asyncio.sleep(3)
            await dog.settle()
            assert [each.kind for each in expectation.met] == [K.UNEXPECTED_REBOOT]
            reset(EventType.GUEST_RESET, reason="guest-reset")
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.UNEXPECTED_REBOOT] * 2

    on_simulated(body)


def test_what_is_expected_is_expected_until_it_was_looked_at_and_no_longer(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            async with dog.expect(K.OOPS, "panic") as expectation:
                it.prints(OOPS)
            assert [each.kind for each in expectation.met] == [K.OOPS]
            assert it.told == [] and len(dog.expected) == 1
            with dog.expect(K.OOPS):
                it.prints(OOPS.replace("1.0", "2.0"))
            it.prints(STUCK)
            await asyncio.sleep(5)
            it.prints(OOPS.replace("1.0", "3.0"))
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.SOFT_LOCKUP, K.OOPS] and len(dog.expected) == 2
            with pytest.raises(ValueError, match="meteor"):
                dog.expect("meteor")

    on_simulated(body)


def test_what_the_rules_tolerate_or_ignore_fails_nothing(on_simulated) -> None:
    async def body(it: Watched) -> None:
        rules = Rules(tolerate=(K.OOPS,), ignore=("shut down",))
        async with it.watched(rules=rules) as dog:
            it.prints(OOPS)
            await it.asked("poweroff")
            await asyncio.sleep(10)
            await asyncio.sleep(3)
            await dog.settle()
            assert it.told == [] and [each.kind for each in dog.noted] == [K.OOPS]

    on_simulated(body)


def test_a_machine_that_its_hypervisor_stops_is_told(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            # No fault of the simulator's does that.
            it.machine._settle(MachineState.PAUSED, "its disk is full")
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.UNEXPECTED_PAUSE] and "disk is full" in it.told[0].message

    on_simulated(body)


def test_a_hypervisor_that_is_gone_is_told_once_unless_a_fault_took_it(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            it.hypervisor.crash("its host is gone")
            await asyncio.sleep(1)
            it.hypervisor.restart()
            await asyncio.sleep(1)
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.HYPERVISOR_LOST] and "host is gone" in it.told[0].message
            await it.machine.inject(HypervisorCrash(restart_after=2))
            await asyncio.sleep(5)
            assert len(it.told) == 1

    on_simulated(body)


def test_a_kernel_that_warns_for_ever_is_told_of_so_many_times(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            for number in range(MOST_INCIDENTS + 5):
                it.prints(OOPS.replace("1.0", f"{number + 5}.0"))
            await asyncio.sleep(3)
            await dog.settle()
            assert len(it.told) == MOST_INCIDENTS and dog.untold == 5

    on_simulated(body)


def test_a_report_that_the_end_of_the_machine_cuts_off_is_told_before_its_end(
    on_simulated,
) -> None:
    async def body(it: Watched) -> None:
        async with it.watched() as dog:
            it.prints("[    1.000000] kernel BUG at a.c:1!")
            it.hypervisor.world.machines[it.machine.id].die("crashed", "gone")
            await asyncio.sleep(3)
            await dog.settle()
            assert it.kinds == [K.BUG, K.UNEXPECTED_EXIT]

    on_simulated(body)


def test_leaving_it_looks_at_what_has_happened_before(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async with it.watched():
            it.prints(OOPS)
        assert it.kinds == [K.OOPS]

    on_simulated(body)


# Silence.


class Heart:
    """A guest's agent: answers, or not."""

    def __init__(self) -> None:
        self.beats = True
        self.asked = 0

    async def __call__(self) -> None:
        self.asked += 1
        if not self.beats:
            await asyncio.Event().wait()


def test_a_guest_that_answers_or_prints_is_not_silent(on_simulated) -> None:
    async def body(it: Watched) -> None:
        heart = Heart()
        async with it.watched(heartbeat=heart):
            await asyncio.sleep(600)
            assert heart.asked > 100
            heart.beats = False
            for second in range(60):
                it.prints(f"[{second + 100:5d}.000000] tick\n")
                await asyncio.sleep(ROUND)
            assert it.told == []

    on_simulated(body)


def test_a_guest_that_does_neither_is_told_once_and_again_after_a_sign_of_life(
    on_simulated,
) -> None:
    async def body(it: Watched) -> None:
        heart = Heart()
        heart.beats = False
        async with it.watched(heartbeat=heart, rules=Rules(silence=20)):
            await asyncio.sleep(19)
            assert it.told == []
            await asyncio.sleep(300)
            assert it.kinds == [K.SILENCE] and it.told[0].fatal
            assert "vCPUs used" in it.told[0].message
            heart.beats = True
            await asyncio.sleep(60)
            heart.beats = False
            await asyncio.sleep(300)
            assert it.kinds == [K.SILENCE] * 2

    on_simulated(body)


def test_a_question_that_fails_is_no_sign_of_life(on_simulated) -> None:
    async def body(it: Watched) -> None:
        async def gone() -> None:
            raise ChannelClosed("the agent is gone")

        async with it.watched(heartbeat=gone, rules=Rules(silence=20)):
            await asyncio.sleep(60)
        assert it.kinds == [K.SILENCE]

    on_simulated(body)


def test_a_guest_that_is_paused_or_off_is_not_silent(on_simulated) -> None:
    async def body(it: Watched) -> None:
        heart = Heart()
        heart.beats = False
        async with it.watched(heartbeat=heart, rules=Rules(silence=20)):
            await it.machine.pause()
            await asyncio.sleep(600)
            await it.machine.kill()
            await asyncio.sleep(600)
            assert it.told == []

    on_simulated(body)


def test_no_silence_is_no_question(on_simulated) -> None:
    async def body(it: Watched) -> None:
        heart = Heart()
        async with it.watched(heartbeat=heart, rules=Rules(silence=0)):
            await asyncio.sleep(600)
        assert heart.asked == 0

    on_simulated(body)


def test_a_deterministic_machine_is_asked_nothing(on_simulated) -> None:
    async def body(it: Watched) -> None:
        exact = MachineSpec.of(name="exact", memory="64M", deterministic=True)
        it.machine = await it.hypervisor.create(exact)
        await it.machine.start()
        heart = Heart()
        async with it.watched(heartbeat=heart, rules=Rules(silence=20)):
            await asyncio.sleep(600)
        assert heart.asked == 0

    on_simulated(body)


class SlowHypervisor:
    """A machine whose hypervisor answers late, or not at all, as it does on a host that stalls."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.delay = 0.0
        self.answers = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    async def metrics(self, *, timeout: float | None = None) -> Any:
        if not self.answers:
            raise DeadlineExceeded("metrics", seconds=timeout or 0)
        await asyncio.sleep(self.delay)
        return await self._machine.metrics()


@pytest.mark.parametrize("answers", [True, False])
def test_a_stall_of_the_hypervisor_s_makes_no_guest_silent(on_simulated, answers: bool) -> None:
    async def body(it: Watched) -> None:
        heart = Heart()
        heart.beats = False
        slow = SlowHypervisor(it.machine)
        slow.delay, slow.answers = 4.0, answers
        it.machine = slow
        async with it.watched(heartbeat=heart, rules=Rules(silence=20)):
            await asyncio.sleep(100)
            assert K.SILENCE not in it.kinds
            slow.delay, slow.answers = 0.0, True
            await asyncio.sleep(100)
            assert K.SILENCE in it.kinds

    on_simulated(body)


def test_a_hypervisor_that_never_answers_is_lost(on_simulated) -> None:
    async def body(it: Watched) -> None:
        slow = SlowHypervisor(it.machine)
        slow.answers = False
        heart = Heart()
        heart.beats = False
        it.machine = slow
        async with it.watched(heartbeat=heart):
            await asyncio.sleep(1000)
        assert it.kinds == [K.HYPERVISOR_LOST]

    on_simulated(body)


def test_a_watchdog_that_is_late_itself_counts_no_silence_and_excuses_lockups(
    on_simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(it: Watched) -> None:
        real = asyncio.sleep

        async def late(seconds: float) -> None:
            await real(seconds + (30 if seconds == ROUND else 0))

        heart = Heart()
        heart.beats = False
        async with it.watched(heartbeat=heart, rules=Rules(silence=20)) as dog:
            monkeypatch.setattr(heartbeat_module.asyncio, "sleep", late)
            await real(300)
            assert it.told == []
            it.prints(STUCK)
            await real(5)
            assert it.told == [] and [each.kind for each in dog.noted] == [K.SOFT_LOCKUP]
            assert dog.noted[0].host_stall_s >= 30
            monkeypatch.undo()
            await real(300)
            assert it.kinds == [K.SILENCE]

    on_simulated(body)


@pytest.mark.parametrize(
    ("message", "stall", "explained"),
    [
        ("BUG: soft lockup - CPU#0 stuck for 22s!", 10.0, False),
        ("BUG: soft lockup - CPU#0 stuck for 22s!", 11.0, True),
        ("INFO: task a:1 blocked for more than 120 seconds.", 50.0, False),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", 9.0, False),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", 10.0, True),
    ],
)
def test_a_stall_explains_what_is_not_much_longer(
    message: str, stall: float, explained: bool
) -> None:
    incident = Incident(K.SOFT_LOCKUP, "vm", message, host_stall_s=stall)
    assert stall_that_explains(incident) is explained


def test_a_mistake_in_who_is_told_is_not_lost(on_simulated) -> None:
    async def body(it: Watched) -> None:
        def wrong(incident: Incident) -> None:
            raise RuntimeError("a mistake")

        with pytest.raises(RuntimeError, match="a mistake"):
            async with Watchdog(it.machine, on_incident=wrong):
                it.prints(OOPS)

    on_simulated(body)

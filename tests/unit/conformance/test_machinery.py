"""The parts of the suite one by one: registry, profiles, probe, bench, leaks, audits, runner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from mutants.base import PROFILE, BrokenHypervisor, BrokenMachine, BrokenProvider

from vmlab.conformance import leaks, profiles
from vmlab.conformance.audits import audit_events
from vmlab.conformance.bench import Bench, CheckFailed, Skipped
from vmlab.conformance.checks.capabilities import IMPLIED
from vmlab.conformance.drills import DRILLS, REACHABLE
from vmlab.conformance.leaks import Holdings, marked_processes, marking
from vmlab.conformance.probe import GuestCannotTell
from vmlab.conformance.profiles import ConformanceProfile, crash_by_signal, find_profile
from vmlab.conformance.registry import Check, check, checks, select
from vmlab.conformance.results import CheckResult
from vmlab.conformance.runner import Subject, run_check
from vmlab.conformance.simulated import profile as simulated
from vmlab.conformance.together import run_together
from vmlab.hypervisors.simulated import provider
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    ChannelClosed,
    HypervisorUnavailable,
    InvalidState,
    OperationFailed,
)
from vmlab.machine.events import Event, EventType
from vmlab.machine.faults import FaultKind
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import OPERATIONS, STABLE, MachineState
from vmlab.report import Outcome

SUBJECT = Subject(provider, PROFILE)


def run(function: Any, subject: Subject = SUBJECT, **needs: Any) -> CheckResult:
    """The result of a check that is in no module."""
    return run_check(Check("own.check", "a clause", function, **needs), subject)


# Registry and drills.


def test_ids_are_unique_and_every_check_has_a_clause() -> None:
    assert "pause.stands-still" in checks()
    with pytest.raises(ValueError, match="two checks"):
        check("pause.stands-still", clause="again")(lambda lab: asyncio.sleep(0))
    for found in checks().values():
        assert "." in found.id and found.topic and found.clause
    assert [found.id for found in select(["pause.*", "fork.id*"])] == [
        "fork.identity",
        "pause.stands-still",
    ]


def test_drills_know_every_operation_and_every_state_that_can_be_reached() -> None:
    assert set(DRILLS) == set(OPERATIONS)
    assert set(REACHABLE) == set(STABLE) - {MachineState.UNKNOWN}


def test_every_capability_that_the_simulator_declares_is_proven_by_some_check() -> None:
    needed = {need for found in checks().values() for need in found.needs}
    asked = {Capability.RESUME, Capability.SHARE_COPY}
    assert simulated.must_declare <= needed | asked


# Profiles.


def test_profile_of_an_unknown_hypervisor_knows_nothing() -> None:
    blank = find_profile("nobodys")
    assert blank.probe is None and blank.must_declare == frozenset()
    result = run_check(checks()["pause.stands-still"], Subject(provider, blank))
    assert result.outcome is Outcome.SKIP and "probe" in result.reason
    skipped = [
        found.id
        for found in checks().values()
        if run_check(found, Subject(provider, blank)).outcome is Outcome.SKIP
    ]
    assert 30 < len(skipped) < len(checks())


@pytest.mark.parametrize("capability", sorted(simulated.must_declare))
def test_every_check_passes_or_skips_whatever_is_not_declared(capability: Capability) -> None:
    hypervisor = type("Less", (BrokenHypervisor,), {"capabilities": _without(capability)})
    due = PROFILE.with_changes(must_declare=frozenset(), many=5)
    subject = Subject(BrokenProvider(hypervisor), due)
    for found in checks().values():
        result = run_check(found, subject)
        assert result.outcome.ok, f"{found.id}: {result.reason}"


def _without(capability: Capability) -> Any:
    """A `capabilities` without one, and without those that are of no use without it."""
    gone = {capability, *(one for one, other in IMPLIED.items() if other is capability)}

    async def capabilities(self: Any) -> Any:
        declared = await super(BrokenHypervisor, self).capabilities()
        less = declared.without(*gone)
        faults = frozenset() if capability is Capability.FAULTS else declared.faults
        return less.model_copy(update={"faults": faults})

    return capabilities


@pytest.mark.parametrize(
    ("value", "message"),
    [("no_such_module:x", "cannot be loaded"), ("os:sep", "not a ConformanceProfile")],
)
def test_broken_profiles_are_named(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("odd", value, profiles.GROUP)
    monkeypatch.setattr(profiles, "entry_points", lambda **_: [point])
    with pytest.raises(HypervisorUnavailable, match=message):
        find_profile("odd")


def test_registered_profile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "vmlab.conformance.simulated:profile", profiles.GROUP)
    monkeypatch.setattr(profiles, "entry_points", lambda **_: [point])
    assert find_profile("mine") is simulated


def test_machines_crash_by_fault_by_signal_or_not_at_all() -> None:
    kill = frozenset({FaultKind.KILL})
    assert simulated.crasher(kill) is profiles.crash_by_fault
    assert simulated.crasher(frozenset()) is None
    processes = simulated.with_changes(processes=True)
    assert processes.crasher(frozenset()) is crash_by_signal
    own = simulated.with_changes(crash=crash_by_signal)
    assert own.crasher(kill) is crash_by_signal


def test_crash_by_signal_kills_the_machines_process() -> None:
    async def body(lab: Bench) -> None:
        machine = await lab.run()
        with pytest.raises(HypervisorUnavailable, match="no process"):
            await crash_by_signal(machine, 0)
        with subprocess.Popen(["sleep", "100"]) as process:  # noqa: ASYNC220  # quick
            info = await machine.info()

            class WithProcess:
                name = machine.name

                async def info(self) -> Any:
                    return info.model_copy(update={"pid": process.pid})

            for _again in range(2):
                await crash_by_signal(WithProcess(), 1.0)
                await asyncio.sleep(2)
                process.wait()
            assert process.returncode == -signal.SIGKILL

    result = run(body)
    assert result.outcome is Outcome.PASS, result.reason


def test_simulated_profile_refuses_other_hypervisors() -> None:
    assert simulated.corrupt is not None
    with pytest.raises(TypeError, match="not a simulated"):
        asyncio.run(simulated.corrupt(object(), object(), object()))


# Bench and runner.


def test_expectations_are_recorded_and_the_first_failure_ends_the_check() -> None:
    async def body(lab: Bench) -> None:
        lab.equal(1, 1, "one is one")
        lab.note("noted")
        await lab.run()
        lab.equal("a" * 1000, "b", "letters")
        lab.true(False, "never reached")

    result = run(body)
    assert result.outcome is Outcome.FAIL
    assert [each.passed for each in result.expectations] == [True, False]
    assert "(1000 characters)" in (result.expectations[1].actual or "")
    assert result.notes == ["noted"] and result.found == {"own.check"}
    assert len(result.timings["create"]) == len(result.timings["start"]) == 1


@pytest.mark.parametrize(
    ("raised", "outcome", "told"),
    [
        (Skipped("not here"), Outcome.SKIP, "not here"),
        (GuestCannotTell("ticks"), Outcome.SKIP, "cannot tell: ticks"),
        (OperationFailed("it broke"), Outcome.FAIL, "it broke"),
        (TimeoutError(), Outcome.FAIL, "TimeoutError"),
        (KeyError("mistake"), Outcome.ERROR, "KeyError"),
    ],
)
def test_what_a_check_raises_decides_its_outcome(
    raised: Exception, outcome: Outcome, told: str
) -> None:
    async def body(lab: Bench) -> None:
        raise raised

    result = run(body)
    assert result.outcome is outcome and told in result.reason


def test_refusals_are_told_apart() -> None:
    async def fails() -> None:
        raise OperationFailed("broken")

    async def body(lab: Bench) -> None:
        error = await lab.refuses(OperationFailed, fails(), "a refusal")
        assert str(error) == "broken"
        with pytest.raises(CheckFailed, match=r"expected InvalidState, got OperationFailed"):
            await lab.refuses(InvalidState, fails(), "another")
        with pytest.raises(CheckFailed, match=r"an answer: None"):
            await lab.refuses(InvalidState, asyncio.sleep(0), "none at all")

    result = run(body)
    assert result.outcome is Outcome.PASS, result.reason


def test_waiting_for_what_never_comes_fails() -> None:
    async def never() -> bool:
        return False

    async def body(lab: Bench) -> None:
        await lab.until(never, "it comes")

    result = run(body)
    assert result.outcome is Outcome.FAIL and "within 60 s" in result.reason


def test_what_does_not_come_within_the_slack_fails() -> None:
    async def late(lab: Bench) -> None:
        assert await lab.within(asyncio.sleep(0, "there"), "it comes") == "there"
        await lab.within(asyncio.sleep(1e6), "it comes")

    result = run(late)
    assert (result.outcome, set(result.found)) == (Outcome.FAIL, {"own.check"})
    assert "it comes: expected so within" in result.reason

    async def slow() -> None:
        raise TimeoutError("another one's")

    result = run(lambda lab: lab.within(slow(), "it comes"))
    assert result.outcome is Outcome.FAIL
    assert "another one's" in result.reason


def test_what_is_faster_than_its_interruption_is_no_failure() -> None:
    async def quick() -> int:
        return 7

    async def body(lab: Bench) -> None:
        assert await lab.interrupt(quick(), 1.0, "something quick") == [7]
        assert await lab.interrupt(asyncio.sleep(9), 1.0, "something slow") == []

    result = run(body)
    assert result.outcome is Outcome.PASS, result.reason
    assert result.notes == ["something quick: it was faster"]


def test_a_migration_that_was_slow_only_at_first_is_no_failure() -> None:
    class Busy(BrokenMachine):
        moved = 0

        async def _do_migrate(self, *arguments: Any) -> None:
            Busy.moved += 1
            if Busy.moved == 1:
                await asyncio.sleep(100)
            await super()._do_migrate(*arguments)

    class OnABusyHost(BrokenHypervisor):
        machine_class = Busy

    (found,) = select(["migration.interrupted"])
    result = run_check(found, Subject(BrokenProvider(OnABusyHost), PROFILE))
    assert result.outcome is Outcome.PASS, result.reason
    assert Busy.moved > 4


def test_a_check_that_hangs_is_ended() -> None:
    async def body(lab: Bench) -> None:
        lab.spawn(asyncio.sleep(10**9))
        await asyncio.get_running_loop().create_future()

    result = run(body)
    assert result.outcome is Outcome.FAIL and "TimeoutError" in result.reason


def test_bench_lacks_what_the_profile_does_not_give() -> None:
    async def body(lab: Bench) -> None:
        machine = await lab.create()
        for missing in (
            lambda: lab.guest(machine),
            lambda: lab.scratch,
            lambda: lab.nic,
        ):
            with pytest.raises(Skipped):
                missing()
        with pytest.raises(Skipped):
            await lab.crash(machine)
        await lab.answers(machine, "without a probe nothing is asked")

    spec = MachineSpec.of(name="bare", memory="64M")
    bare = ConformanceProfile("simulated", spec, processes=False, crash=None)

    class NoFaults(BrokenHypervisor):
        async def capabilities(self) -> Any:
            return (await super().capabilities()).model_copy(update={"faults": frozenset()})

    result = run(body, Subject(BrokenProvider(NoFaults), bare))
    assert result.outcome is Outcome.PASS, result.reason


def test_hypervisor_that_cannot_be_cleared_up_is_a_finding() -> None:
    class Unlistable(BrokenHypervisor):
        async def list(self) -> Any:
            raise KeyError("a mistake")

    async def body(lab: Bench) -> None:
        await lab.create()

    result = run(body, Subject(BrokenProvider(Unlistable), PROFILE))
    assert result.outcome is Outcome.ERROR and result.found == {"audit.close"}


def test_machine_that_cannot_tell_its_status_is_a_finding() -> None:
    class Mute(BrokenMachine):
        async def status(self, **options: Any) -> Any:
            raise OperationFailed("no answer")

    kind = type("MuteHypervisor", (BrokenHypervisor,), {"machine_class": Mute})

    async def body(lab: Bench) -> None:
        await lab.create()

    assert run(body, Subject(BrokenProvider(kind), PROFILE)).found == {"audit.state"}


def test_seed_decides_what_a_check_draws() -> None:
    drawn = []

    async def body(lab: Bench) -> None:
        drawn.append(lab.bytes())

    for seed in (1, 1, 2):
        run(body, SUBJECT.with_seed(seed))
    assert drawn[0] == drawn[1] != drawn[2]


def test_probe_says_when_the_guest_dies_or_refuses() -> None:
    async def body(lab: Bench) -> None:
        machine = await lab.run()
        guest = lab.guest(machine)
        with pytest.raises(OperationFailed, match="no disk"):
            await guest.read_disk("nosuch", 0, 1)
        assert (await guest.architecture()) == machine.spec.architecture.value
        asked = lab.spawn(guest.ticks())
        await lab.wait()
        await machine.pause()
        late = lab.spawn(guest.ticks())
        await lab.wait()
        await machine.kill()
        assert await asked >= 0
        with pytest.raises(ChannelClosed):
            await late

    result = run(body)
    assert result.outcome is Outcome.PASS, result.reason


def test_checks_of_faults_do_without_each_kind_that_is_not_declared() -> None:
    for kind in FaultKind:

        class OneLess(BrokenHypervisor):
            async def capabilities(self) -> Any:
                declared = await super().capabilities()
                less = declared.faults - {kind}  # noqa: B023  # used within the loop
                return declared.model_copy(update={"faults": less})

        for found in select(["fault.*", "crash.*"]):
            result = run_check(found, Subject(BrokenProvider(OneLess), PROFILE))
            assert result.outcome.ok, f"without {kind}: {found.id}: {result.reason}"


# Leaks.


def test_what_is_held_anew_is_named(tmp_path: Path) -> None:
    import socket
    import threading

    before = Holdings.now()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="lingers")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        (tmp_path / "open.txt").open("w"),
        subprocess.Popen(["sleep", "100"]) as process,
    ):
        thread.start()
        left = Holdings.now().more_than(before)
        end.set()
        thread.join()
        process.kill()
        port = f"{server.getsockname()[1]:04X}"
    assert left["audit.threads"] == ["lingers"]
    assert left["audit.descriptors"] == [str(tmp_path / "open.txt")]
    assert left["audit.processes"] == [f"process {process.pid} (sleep 100)"]
    assert len(left["audit.sockets"]) == 1 and f":{port}" in left["audit.sockets"][0]
    assert leaks._socket("socket:[1]") == "socket:[1]"
    assert "gone" in leaks.describe_process(process.pid)


def test_directories_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert leaks.files_under(tmp_path) == ["full/file", "link"]


def test_processes_that_escape_carry_the_mark() -> None:
    with marking("here"):
        with marking("inside"):
            process = subprocess.Popen(["sleep", "100"])
        assert os.environ[leaks.MARK] == "here"
    assert leaks.MARK not in os.environ
    try:
        while not marked_processes("inside"):
            """Its environment is there a moment after it was started."""
        assert marked_processes("inside") == [process.pid]
        assert marked_processes("here") == []
    finally:
        process.kill()
        process.wait()


def test_elsewhere_than_on_linux_psutil_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_LINUX", False)
    before = Holdings.now()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        left = Holdings.now().more_than(before)
    assert len(left["audit.processes"]) == 1 and str(process.pid) in left["audit.processes"][0]
    assert len(left["audit.descriptors"]) == 1
    assert marked_processes("anything") == []


# Audits of events.


def events(*rows: tuple[EventType, str, dict[str, Any]]) -> Sequence[Event]:
    return [
        Event(
            sequence=number,
            time=float(number),
            type=kind,
            hypervisor="h",
            machine="m",
            operation=operation or None,
            data=data,
        )
        for number, (kind, operation, data) in enumerate(rows, 1)
    ]


STARTED, FINISHED = EventType.OPERATION_STARTED, EventType.OPERATION_FINISHED


def test_interleaved_operations_are_found() -> None:
    told = events((STARTED, "a-1", {}), (STARTED, "b-2", {}), (FINISHED, "b-2", {}))
    findings = [str(finding) for finding in audit_events(told, [])]
    assert len(findings) == 1 and "interleaved" in findings[0]


def test_end_without_a_beginning_is_found() -> None:
    findings = list(audit_events(events((FINISHED, "a-1", {})), []))
    assert [finding.actual for finding in findings] == ["an end without a beginning"]


def test_impossible_transition_is_found() -> None:
    told = events((EventType.STATE, "", {"from": "created", "to": "paused", "reason": ""}))
    findings = list(audit_events(told, []))
    assert [finding.id for finding in findings] == ["audit.transitions"]


# Several at once.


def test_trouble_of_one_does_not_keep_the_others_waiting() -> None:
    class Fails(BrokenMachine):
        async def start(self, **options: Any) -> None:
            raise KeyError("a mistake")

    kind = type("FailsHypervisor", (BrokenHypervisor,), {"machine_class": Fails})
    result = run_together([SUBJECT, Subject(BrokenProvider(kind), PROFILE)])
    assert result.outcome is Outcome.FAIL
    assert any("KeyError" in (finding.actual or "") for finding in result.findings)


def test_what_one_cannot_do_is_not_compared() -> None:
    kind = type("Less", (BrokenHypervisor,), {"capabilities": _without(Capability.FORK)})
    result = run_together([SUBJECT, Subject(BrokenProvider(kind), PROFILE)])
    assert result.outcome is Outcome.PASS, result.reason

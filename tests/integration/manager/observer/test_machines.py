"""Findings about machines, made for real on the simulator: found, reported, repaired, undone."""

from __future__ import annotations

import asyncio

from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.faults import ClockJump, CpuStall
from vmlab.machine.states import MachineState
from vmlab.manager.requests import (
    DeleteMachine,
    MachinePolicy,
    PauseMachine,
    RepairFinding,
    StopMachine,
)
from vmlab.manager.store.changes import Conflict

S = MachineState
MISMATCH = "machine-state-mismatch"


async def refused(watched, finding, action, kind, **options):
    """Have a repair refused, and say why."""
    try:
        await watched.manager.operator.submit(
            RepairFinding(finding=finding.id, action=action, **options)
        )
    except kind as error:
        return str(error)
    raise AssertionError("it was not refused")


def test_a_manager_that_is_well_finds_nothing(run):
    async def test(watched):
        await watched.machine_of("web")
        await watched.disk_of("data", "web")
        await watched.nothing()
        await watched.did(PauseMachine(machine="web"))
        await watched.nothing()
        await watched.did(StopMachine(machine="web"))
        await watched.nothing()
        await watched.did(DeleteMachine(machine="web"))
        await watched.nothing()

    run(test)


def test_a_machine_that_died_is_found_and_under_report_nothing_else_happens(run):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        before = await watched.operations()
        finding = await watched.found(MISMATCH)
        assert finding.name == "web"
        assert finding.severity == "error"
        assert finding.evidence == {
            "stored": "running",
            "seen": "stopped",
            "wanted": "running",
            "reason": "kill",
            "host": "simulated",
        }
        again = await watched.found(MISMATCH)
        assert (again.id, again.first_seen) == (finding.id, finding.first_seen)
        assert again.last_seen > finding.last_seen
        assert await watched.operations() == before
        assert (await watched.machine("web")).state == "running"
        assert await watched.state_at_host("web") is S.STOPPED

    run(test)


def test_a_machine_that_died_is_restarted_by_reconcile_and_that_can_be_undone(run):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        finding = await watched.found(MISMATCH)
        repair = await watched.repaired(finding, "reconcile")
        assert {"boot", "note"} < {step.name for step in repair.steps}
        assert await watched.state_at_host("web") is S.RUNNING
        assert (await watched.machine("web")).state == "running"
        done = await watched.finding(finding.id)
        assert (done.operation, done.resolved is None) == (repair.id, False)
        await watched.nothing()
        undone = await watched.repaired(finding, "reconcile", undo=True)
        assert undone.undo_of == repair.id
        assert await watched.state_at_host("web") is S.STOPPED
        await refused(watched, finding, "reconcile", Conflict, undo=True)

    run(test)


def test_a_machine_that_somebody_started_is_stopped_by_reconcile(run):
    async def test(watched):
        await watched.machine_of("web")
        await watched.did(StopMachine(machine="web"))
        await (await watched.at_host("web")).start()
        finding = await watched.found(MISMATCH)
        assert (finding.evidence["stored"], finding.evidence["seen"]) == ("stopped", "running")
        await watched.repaired(finding, "reconcile")
        assert await watched.state_at_host("web") is S.STOPPED
        await watched.nothing()

    run(test)


def test_paused_and_resumed_behind_the_managers_back(run):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).pause()
        finding = await watched.found(MISMATCH)
        await watched.repaired(finding, "reconcile")
        assert await watched.state_at_host("web") is S.RUNNING
        await watched.did(PauseMachine(machine="web"))
        await (await watched.at_host("web")).resume()
        finding = await watched.found(MISMATCH)
        await watched.repaired(finding, "reconcile")
        assert await watched.state_at_host("web") is S.PAUSED
        await (await watched.at_host("web")).kill()
        finding = await watched.found(MISMATCH)
        repair = await watched.repaired(finding, "reconcile")
        assert [step.name for step in repair.steps][-3:] == ["boot", "pause", "note"]
        assert await watched.state_at_host("web") is S.PAUSED
        await watched.nothing()

    run(test)


def test_what_was_stopped_paused_or_resumed_is_as_it_was_found_after_the_undo(run):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        await machine.pause()
        finding = await watched.found(MISMATCH)
        await watched.repaired(finding, "reconcile")
        await watched.repaired(finding, "reconcile", undo=True)
        assert machine.state is S.PAUSED
        await machine.resume()
        finding = await watched.found(MISMATCH)
        assert finding.evidence["wanted"] == "paused"
        await watched.repaired(finding, "reconcile")
        await watched.repaired(finding, "reconcile", undo=True)
        assert machine.state is S.RUNNING
        await watched.did(StopMachine(machine="web"))
        await machine.start()
        finding = await watched.found(MISMATCH)
        await watched.repaired(finding, "reconcile")
        await watched.repaired(finding, "reconcile", undo=True)
        assert machine.state is S.RUNNING
        await watched.nothing()

    run(test)


def test_what_is_resolved_or_was_never_repaired_is_refused(run):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        await machine.kill()
        finding = await watched.found(MISMATCH)
        await refused(watched, finding, "reconcile", Conflict, undo=True)
        await refused(watched, finding, "quarantine", InvalidSpec)
        await machine.start()
        await watched.nothing()
        await refused(watched, finding, "reconcile", Conflict)

    run(test)


def test_a_repair_that_was_cancelled_before_it_ran_leaves_all_as_it_was(run):
    async def test(watched):
        machine = await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        finding = await watched.found(MISMATCH)
        async with watched.manager.operator.alone(f"machine:{machine.id}"):
            operation = await watched.manager.operator.submit(
                RepairFinding(finding=finding.id, action="reconcile")
            )
            await watched.manager.operator.cancel(operation.id)
        ended = await watched.manager.operator.wait(operation.id, 120)
        assert ended.state == "cancelled"
        assert await watched.state_at_host("web") is S.STOPPED
        assert (await watched.found(MISMATCH)).id == finding.id
        await watched.repaired(finding, "reconcile")
        await watched.nothing()

    run(test)


def test_a_repair_that_its_manager_did_not_live_to_end_is_ended_by_the_next_one(
    opened, monkeypatch
):
    async def test():
        async with opened() as watched:
            await watched.machine_of("web")
            await (await watched.at_host("web")).kill()
            finding = await watched.found(MISMATCH)
            begun = asyncio.Event()

            async def for_ever(self, **options):
                begun.set()
                await asyncio.Event().wait()

            with monkeypatch.context() as patch:
                patch.setattr(type(await watched.at_host("web")), "start", for_ever)
                repair = await watched.manager.operator.submit(
                    RepairFinding(finding=finding.id, action="reconcile")
                )
                await begun.wait()
                # A sweep meanwhile says nothing about it, neither that it is over.
                assert [each.id for each in await watched.sweep()] == [finding.id]
                await watched.manager.operator.close()
        async with opened() as watched:
            ended = await watched.manager.operator.wait(repair.id, 120)
            assert ended.state == "succeeded", ended.error
            assert await watched.state_at_host("web") is S.RUNNING
            assert (await watched.finding(finding.id)).resolved is not None
            await watched.nothing()

    asyncio.run(test())


def test_adopt_writes_into_the_store_what_the_machine_does_and_can_be_undone(run):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        finding = await watched.found(MISMATCH)
        await watched.repaired(finding, "adopt")
        machine = await watched.machine("web")
        assert (machine.state, machine.wanted) == ("stopped", "stopped")
        assert await watched.state_at_host("web") is S.STOPPED
        await watched.nothing()
        await watched.repaired(finding, "adopt", undo=True)
        machine = await watched.machine("web")
        assert (machine.state, machine.wanted) == ("running", "running")
        assert (await watched.found(MISMATCH)).id != finding.id

    run(test)


def test_a_machine_that_its_host_lost_is_found_and_marked_as_failed(run):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).delete(force=True)
        finding = await watched.found(MISMATCH)
        assert finding.severity == "critical"
        assert finding.actions == ("adopt",)
        await refused(watched, finding, "reconcile", InvalidSpec)
        await watched.repaired(finding, "adopt")
        machine = await watched.machine("web")
        assert machine.state == "failed"
        assert "does not have it" in machine.reason
        await watched.nothing()
        await watched.did(DeleteMachine(machine="web"))

    run(test)


def test_nothing_is_found_of_what_an_operation_is_under_way_on(run):
    async def test(watched):
        machine = await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        async with watched.under_way(f"machine:{machine.id}"):
            await watched.nothing()
        finding = await watched.found(MISMATCH)
        await (await watched.at_host("web")).start()
        async with watched.under_way(f"machine:{machine.id}"):
            # Nor is anything said to be over.
            assert [each.id for each in await watched.sweep()] == [finding.id]
        await watched.nothing()
        done = await watched.finding(finding.id)
        assert done.resolved is not None
        assert done.operation is None

    run(test)


def test_what_only_one_look_shows_is_no_finding(run, monkeypatch):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        await machine.kill()
        eyes, looks = watched.manager.observer._eyes, []
        see = eyes.see

        async def once(known, scope):
            seen = await see(known, scope)
            looks.append(scope)
            if len(looks) == 1:
                await machine.start()
            return seen

        monkeypatch.setattr(eyes, "see", once)
        await watched.nothing()
        assert len(looks) == 2

    run(test)


def test_what_changed_in_the_store_since_the_look_began_is_no_finding(run, monkeypatch):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        eyes = watched.manager.observer._eyes
        see = eyes.see

        async def meanwhile(known, scope):
            seen = await see(known, scope)
            # Its end is written down by somebody, between the look and the finding.
            await watched.manager.database.write(_ended, known.machines[0].id)
            return seen

        monkeypatch.setattr(eyes, "see", meanwhile)
        await watched.nothing()

    run(test)


def _ended(session, machine):
    from vmlab.manager.store.changes import set_machine_state
    from vmlab.manager.store.tables import MachineRow

    set_machine_state(session, session.get_one(MachineRow, machine), "stopped")


def test_while_a_host_is_down_nothing_is_found_there_and_nothing_is_over(run):
    async def test(watched):
        await watched.machine_of("web")
        await watched.machine_of("db")
        await (await watched.at_host("web")).kill()
        finding = await watched.found(MISMATCH)
        hypervisor = watched.manager.hosts.opened("simulated")
        hypervisor.crash()
        assert [each.id for each in await watched.sweep()] == [finding.id]
        hypervisor.restart()
        assert [each.id for each in await watched.sweep()] == [finding.id]

    run(test)


# ------------------------------------------------------------------------ policies


def test_under_reconcile_a_machine_that_died_is_restarted_by_itself(run):
    async def test(watched):
        await watched.machine_of("web")
        subscription = watched.manager.database.events.subscribe(None)
        # No sweep: what happens to a machine by itself is heard.
        await (await watched.at_host("web")).inject(_kill())
        async for event in subscription:
            if event.kind == "finding.repaired":
                break
        operation = await watched.manager.operator.document(event.operation)
        assert (operation.kind, operation.actor) == ("finding.repair", "observer")
        assert await watched.state_at_host("web") is S.RUNNING
        await watched.nothing()

    run(test, events=True, findings={MISMATCH: "reconcile"})


def _kill():
    from vmlab.machine.faults import KillFault

    return KillFault()


def test_a_machines_own_policy_goes_before_the_managers(run):
    async def test(watched):
        await watched.machine_of("web", policy=MachinePolicy(findings={MISMATCH: "report"}))
        await watched.machine_of("db")
        for name in ("web", "db"):
            await (await watched.at_host(name)).kill()
        policies = {finding.name: finding.policy for finding in await watched.sweep()}
        assert policies == {"web": "report", "db": "reconcile"}
        repairs = [each for each in await watched.operations() if each.kind == "finding.repair"]
        assert [each.actor for each in repairs] == ["observer"]
        ended = await watched.manager.operator.wait(repairs[0].id, 120)
        assert ended.state == "succeeded", ended.error
        assert await watched.state_at_host("db") is S.RUNNING
        assert await watched.state_at_host("web") is S.STOPPED
        assert [finding.name for finding in await watched.sweep()] == ["web"]

    run(test, findings={MISMATCH: "reconcile"})


def test_what_was_repaired_again_and_again_is_only_reported(run):
    async def test(watched):
        await watched.machine_of("web")
        for _ in range(5):
            await (await watched.at_host("web")).kill()
            finding = await watched.found(MISMATCH)
            repair = (await watched.operations())[0]
            assert repair.kind == "finding.repair"
            await watched.manager.operator.wait(repair.id, 120)
            assert await watched.state_at_host("web") is S.RUNNING
        await (await watched.at_host("web")).kill()
        finding = await watched.found(MISMATCH)
        assert finding.policy == "report"
        assert "5 times" in finding.hint
        again = await watched.found(MISMATCH)
        assert (again.policy, again.hint) == (finding.policy, finding.hint)
        assert await watched.state_at_host("web") is S.STOPPED

    run(test, findings={MISMATCH: "reconcile"})


def test_a_repair_that_fails_is_tried_again_later_and_not_for_ever(run, monkeypatch):
    from datetime import timedelta

    from vmlab.machine.errors import OperationFailed
    from vmlab.manager.observer import automatic

    def repairs(operations):
        return [each for each in operations if each.kind == "finding.repair"]

    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()

        async def refuse(self, **options):
            raise OperationFailed("no power")

        monkeypatch.setattr(type(await watched.at_host("web")), "start", refuse)
        # However long a sweep takes, the time for the next try does not come by itself.
        monkeypatch.setattr(automatic, "_FIRST_PAUSE", timedelta(days=1))

        async def swept():
            """The repairs that there were by the end of a sweep, once they have ended."""
            await watched.sweep()
            for each in repairs(await watched.operations()):
                ended = await watched.manager.operator.wait(each.id, 120)
                assert (ended.state, ended.error["message"]) == ("failed", "no power")
            return len(repairs(await watched.operations()))

        assert await swept() == 1
        # It is not tried at once again.
        await watched.manager.database.write(_says_running)
        assert await swept() == 1
        monkeypatch.setattr(automatic, "_FIRST_PAUSE", timedelta(0))
        for _ in range(7):
            await watched.manager.database.write(_says_running)
            attempts = await swept()
        assert attempts == 5

    run(test, findings={MISMATCH: "reconcile"})


def _says_running(session):
    """A failed start leaves a failed machine: the store says again what it said."""
    from sqlalchemy import select

    from vmlab.manager.store.tables import MachineRow

    row = session.scalars(select(MachineRow)).one()
    row.state, row.wanted = "running", "running"


def test_a_dry_run_says_what_a_repair_would_do_and_does_nothing(run):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        finding = await watched.found(MISMATCH)
        plan = await watched.repaired_dry(finding, "reconcile")
        assert [step.name for step in plan.steps] == ["claim", "network", "boot"]
        assert await watched.state_at_host("web") is S.STOPPED
        assert (await watched.finding(finding.id)).operation is None

    async def with_dry(watched):
        async def repaired_dry(finding, action):
            return await watched.did(RepairFinding(finding=finding.id, action=action), dry_run=True)

        watched.repaired_dry = repaired_dry
        await test(watched)

    run(with_dry)


# ------------------------------------------------------------------------ orphans


async def an_orphan(watched):
    """A machine that runs at its hypervisor, and that the store has lost."""
    await watched.machine_of("web")
    name = await watched.forget("web")
    hypervisor = await watched.manager.hosts.get("simulated")
    return name, await hypervisor.get(name)


def test_an_orphan_machine_is_found_and_adopted_and_that_can_be_undone(run):
    async def test(watched):
        name, machine = await an_orphan(watched)
        finding = await watched.found("orphan-machine")
        assert finding.name == name
        repair = await watched.repaired(finding, "adopt")
        adopted = await watched.machine(repair.result["undo"]["machine"])
        assert (adopted.state, adopted.memory) == ("running", 64 << 20)
        await watched.nothing()
        await watched.did(StopMachine(machine=adopted.name))
        assert machine.state is S.STOPPED
        await watched.repaired(finding, "adopt", undo=True)
        assert (await watched.found("orphan-machine")).name == name

    run(test)


def test_an_orphan_machine_is_paused_by_quarantine_and_resumed_by_its_undo(run):
    async def test(watched):
        _, machine = await an_orphan(watched)
        finding = await watched.found("orphan-machine")
        await watched.repaired(finding, "quarantine")
        assert machine.state is S.PAUSED
        await watched.repaired(finding, "quarantine", undo=True)
        assert machine.state is S.RUNNING

    run(test)


def test_an_orphan_machine_is_deleted_only_if_its_name_is_typed(run):
    async def test(watched):
        name, machine = await an_orphan(watched)
        finding = await watched.found("orphan-machine")
        for typed in ({}, {"name": "another"}):
            said = await refused(watched, finding, "reconcile", InvalidSpec, **typed)
            assert name in said
        assert machine.state is S.RUNNING
        repair = await watched.repaired(finding, "reconcile", name=name)
        assert repair.result["undo"] is None
        assert await watched.manager.hosts.opened("simulated").list() == []
        await watched.nothing()

    run(test)


def test_no_policy_deletes_an_orphan_machine(run):
    async def test(watched):
        _, machine = await an_orphan(watched)
        finding = await watched.found("orphan-machine")
        assert finding.policy == "reconcile"
        assert [each.kind for each in await watched.operations()] == ["machine.create"]
        assert machine.state is S.RUNNING

    run(test, findings={"orphan-machine": "reconcile"})


# ------------------------------------------------------------------------ guests


def test_a_guest_that_does_not_answer_is_found_and_its_machine_restarted(run):
    async def test(watched):
        await watched.machine_of("web")
        await watched.nothing()
        machine: Machine = await watched.at_host("web")
        await machine.inject(CpuStall(vcpu=0))
        watched.manager.observer._eyes._guest_seconds = 0.5
        finding = await watched.found("guest-agent-unreachable")
        assert "no answer" in finding.message
        await watched.repaired(finding, "reconcile")
        watched.manager.observer._eyes._guest_seconds = 120
        await watched.nothing()

    run(test)


def test_a_guest_whose_machine_stops_is_not_missed(run):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        await machine.inject(CpuStall(vcpu=0))
        watched.manager.observer._eyes._guest_seconds = 0.5
        await watched.found("guest-agent-unreachable")
        await watched.did(StopMachine(machine="web", graceful=False))
        await watched.nothing()

    run(test)


def test_a_guest_whose_clock_is_wrong_is_found_and_its_clock_set(run):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        await machine.inject(ClockJump(seconds=3600))
        finding = await watched.found("clock-drift")
        assert 3500 < finding.evidence["drift"] < 3700
        assert "ahead" in finding.message
        await watched.repaired(finding, "reconcile")
        await watched.nothing()

    run(test)

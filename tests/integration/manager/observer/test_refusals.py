"""Repairs that find that it is not so any more: they refuse, or have nothing to do."""

from __future__ import annotations

import os

import pytest

from vmlab.hypervisors.ownership import Store
from vmlab.machine.errors import VmlabError
from vmlab.machine.states import MachineState
from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.findings import Raised, note
from vmlab.manager.requests import (
    AttachDisk,
    CreateNetwork,
    NewNic,
    RepairFinding,
    StopMachine,
)
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.queries import find_machine
from vmlab.manager.store.tables import DiskRow


async def refused(watched, finding, action, **options):
    with pytest.raises(VmlabError) as error:
        await watched.manager.operator.submit(
            RepairFinding(finding=finding.id, action=action, **options)
        )
    return str(error.value)


async def said(watched, code, subject, actions, **evidence):
    """A finding that somebody has written down: of what was so a moment ago."""
    difference = Difference(
        code=code,
        severity="warning",
        subject=subject,
        name=subject,
        message="it was so a moment ago",
        source="nothing",
        evidence=evidence,
        actions=actions,
    )

    def write(session):
        return note(session, [Raised(difference, "report")], (), event=1 << 60)

    (id_,) = await watched.manager.database.write(write)
    return await watched.finding(id_)


def test_a_process_that_ended_by_itself_needs_no_repair(run):
    async def test(watched):
        for action in ("reconcile", "quarantine"):
            finding = await said(
                watched, "orphan-process", f"process {action}", (action,), pid=1 << 22, start=7
            )
            repair = await watched.repaired(finding, action)
            assert [step.state for step in repair.steps] == ["skipped", "done"]

    run(test)


def test_a_process_whose_machine_or_network_came_back_is_left_alone(run):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        evidence = {"pid": os.getpid(), "start": 7}
        finding = await said(
            watched, "orphan-process", "one", ("reconcile",), machine=machine.id, **evidence
        )
        assert "belongs to" in await refused(watched, finding, "reconcile")
        await watched.did(CreateNetwork(name="lan", mode="user"))
        network = await watched.manager.database.read(
            lambda s: s.execute(_ids_of_networks()).scalar_one()
        )
        finding = await said(
            watched, "orphan-process", "two", ("reconcile",), network=network, **evidence
        )
        assert "belongs to" in await refused(watched, finding, "reconcile")

    run(test)


def _ids_of_networks():
    from sqlalchemy import select

    from vmlab.manager.store.tables import NetworkRow

    return select(NetworkRow.id)


def test_a_machine_that_is_in_the_store_by_now_is_no_orphan(run):
    async def test(watched):
        machine = await watched.machine_of("web")
        at = f"m-{machine.id[:12]}"
        evidence = {"host": "simulated", "machine": "x", "at": at}
        for action in ("adopt", "quarantine"):
            finding = await said(watched, "orphan-machine", action, (action,), **evidence)
            assert "in the store" in await refused(watched, finding, action)

    run(test)


def test_an_orphan_machine_keeps_its_nics_and_gets_a_free_name(run):
    async def test(watched):
        await watched.did(CreateNetwork(name="lan", mode="isolated", subnet="10.9.0.0/24"))
        first = await watched.machine_of(
            "web", nics=(NewNic(network="lan"), NewNic(network="user"), NewNic(network="none"))
        )
        taken = f"found-{first.id[:8]}"
        await watched.machine_of(taken)
        await watched.forget("web")
        finding = await watched.found("orphan-machine")
        repair = await watched.repaired(finding, "adopt")
        adopted = await watched.machine(repair.result["undo"]["machine"])
        assert adopted.name == f"{taken}-2"
        assert [nic.mac for nic in adopted.nics] == [nic.mac for nic in first.nics]
        assert [nic.network for nic in adopted.nics] == ["lan", "user", "none"]
        await watched.did(StopMachine(machine=adopted.name))

    run(test)


def test_an_orphan_machine_at_rest_is_not_paused_and_one_that_is_gone_not_deleted(run):
    async def test(watched):
        await watched.machine_of("web")
        machine = await watched.at_host("web")
        name = await watched.forget("web")
        finding = await watched.found("orphan-machine")
        await machine.kill()
        await watched.repaired(finding, "quarantine")
        assert machine.state is MachineState.STOPPED
        finding = await watched.found("orphan-machine")
        await machine.delete()
        repair = await watched.repaired(finding, "reconcile", name=name)
        assert [step.state for step in repair.steps] == ["skipped", "done"]

    run(test)


def test_a_file_that_is_a_disks_by_now_is_not_removed(run):
    async def test(watched):
        path = watched.manager.storage.path("a" * 32, "raw")
        path.write_bytes(b"\0" * 512)
        finding = await watched.found("orphan-disk")

        def take_in(session):
            session.add(DiskRow(id="a" * 32, name="mine", size=512, state="available"))

        await watched.manager.database.write(take_in)
        for action in ("adopt", "quarantine", "reconcile"):
            text = await refused(watched, finding, action, name=finding.name)
            assert "mine" in text
        assert path.exists()

    run(test)


def test_a_disk_that_was_taken_in_and_is_used_stays(run):
    async def test(watched):
        await watched.machine_of("web")
        path = watched.manager.storage.path("a" * 32, "raw")
        path.write_bytes(b"\0" * 512)
        finding = await watched.found("orphan-disk")
        await watched.repaired(finding, "adopt")
        await watched.did(AttachDisk(disk="a" * 32, machine="web"))
        assert "detach" in await hint_of(watched, finding, "adopt")

    async def hint_of(watched, finding, action):
        with pytest.raises(Conflict) as error:
            await watched.manager.operator.submit(
                RepairFinding(finding=finding.id, action=action, undo=True)
            )
        return error.value.hint

    run(test)


def test_a_file_that_has_gone_cannot_be_moved_aside(run):
    async def test(watched):
        path = watched.manager.storage.directory / "notes.txt"
        path.write_text("precious")
        finding = await watched.found("orphan-disk")
        path.unlink()
        ended = await watched.do(RepairFinding(finding=finding.id, action="quarantine"))
        assert ended.state == "failed"
        assert "notes.txt" in ended.error["message"]
        assert (await watched.finding(finding.id)).operation == ended.id
        await watched.nothing()

    run(test)


def test_a_lock_that_is_held_by_now_is_not_removed(run):
    async def test(watched):
        owner = Store.open(watched.manager.settings.home, "manager").owner
        path = owner.directory / "held"
        path.write_text("1")
        from vmlab.hypervisors.locks import FileLock

        finding = await said(watched, "stale-lock", str(path), ("reconcile",), path=str(path))
        lock = FileLock.take(path)
        assert lock is not None
        try:
            ended = await watched.do(RepairFinding(finding=finding.id, action="reconcile"))
            assert ended.state == "failed"
        finally:
            lock.release()
        assert path.exists()
        await watched.repaired(finding, "reconcile")
        assert not path.exists()
        finding = await said(watched, "stale-lock", "gone", ("reconcile",), path=str(path))
        await watched.repaired(finding, "reconcile")

    run(test)


def test_a_reservation_of_an_operation_that_runs_is_kept(run):
    async def test(watched):
        operation = await watched.did(CreateNetwork(name="lan", mode="user"))
        async with watched.under_way("network:x"):
            running = next(e for e in await watched.operations() if e.state == "running")
            finding = await said(
                watched,
                "stale-lock",
                "reservation",
                ("reconcile",),
                reservation="r",
                operation=running.id,
            )
            assert "running" in await refused(watched, finding, "reconcile")
        assert operation.state == "succeeded"

    run(test)


def test_what_cannot_be_undone_says_so(run):
    async def test(watched):
        path = watched.manager.storage.directory / "notes.txt"
        path.write_text("precious")
        finding = await watched.found("orphan-disk")
        await watched.repaired(finding, "reconcile", name="notes.txt")
        assert "cannot be undone" in await refused(watched, finding, "reconcile", undo=True)

    run(test)


def test_only_what_was_done_can_be_undone(run):
    async def test(watched):
        path = watched.manager.storage.directory / "notes.txt"
        path.write_text("precious")
        finding = await watched.found("orphan-disk")
        await watched.repaired(finding, "quarantine")
        for action in ("report", "adopt", "reconcile"):
            text = await refused(watched, finding, action, undo=True, name="notes.txt")
            assert "'quarantine'" in text
        await watched.repaired(finding, "quarantine", undo=True)
        assert path.read_text() == "precious"
        # `report` is nothing that can be done.
        finding = await watched.found("orphan-disk")
        assert "quarantine, reconcile" in await refused(watched, finding, "report")

    run(test)


def test_the_plan_of_an_undo_and_of_each_repair_is_told_and_touches_nothing(run):
    async def test(watched):
        await watched.machine_of("web")
        disk = await watched.disk_of("data", "web")
        machine = await watched.at_host("web")
        await machine.unplug_disk(disk.device)
        finding = await watched.found("disk-attachment-mismatch")
        for action in finding.actions:
            plan = await watched.did(RepairFinding(finding=finding.id, action=action), dry_run=True)
            assert plan.steps
        assert machine.spec.disks == ()
        assert (await watched.disk("data")).machine == "web"
        await watched.repaired(finding, "reconcile")
        plan = await watched.did(
            RepairFinding(finding=finding.id, action="reconcile", undo=True), dry_run=True
        )
        assert [step.name for step in plan.steps] == ["undo"]
        assert len(machine.spec.disks) == 1
        row = await watched.manager.database.read(lambda s: find_machine(s, "web").operation_id)
        assert row is None

    run(test)


def test_a_process_of_somebody_elses_is_told_as_that(run, monkeypatch):
    async def test(watched):
        from vmlab.manager.observer.repairs import leftovers

        def denied(process, number):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(leftovers, "send_signal", denied)
        finding = await said(watched, "orphan-process", "p", ("reconcile",), pid=1, start=1)
        ended = await watched.do(RepairFinding(finding=finding.id, action="reconcile"))
        assert "cannot be sent a signal" in ended.error["message"]

    run(test)


def test_a_nic_whose_tap_is_gone_is_plugged_anew(run):
    async def test(watched):
        await watched.did(CreateNetwork(name="lan", mode="isolated", subnet="10.9.0.0/24"))
        document = await watched.machine_of("web", nics=(NewNic(network="lan"),))
        machine = await watched.at_host("web")
        (nic,) = machine.spec.nics
        done = []
        for call in ("unplug_nic", "plug_nic"):
            note_calls(machine, call, done)
        finding = await said(
            watched,
            "lost-interface",
            "vml0123",
            ("reconcile",),
            interface="vml0123",
            kind="tap",
            network=await watched.manager.database.read(
                lambda s: s.execute(_ids_of_networks()).scalar_one()
            ),
            machine=document.id,
            nic=nic.name,
            bridge="vmlb0123",
            lacking=True,
        )
        await watched.repaired(finding, "reconcile")
        assert done == ["unplug_nic", "plug_nic"]
        assert machine.spec.nics == (nic,)

    run(test)


def note_calls(machine, call, done):
    """Have calls of a machine's method noted, which work as before."""
    before = getattr(machine, call)

    async def noted(*arguments, **options):
        done.append(call)
        return await before(*arguments, **options)

    setattr(machine, call, noted)

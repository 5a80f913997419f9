"""QEMU killed by hand is found; only under the policy `reconcile` more happens."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from tests.needs import needs

from vmlab.hypervisors import processes
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState
from vmlab.manager.requests import DeleteMachine, RepairFinding
from vmlab.manager.settings import HostSetting

HOSTS = (HostSetting(name="qemu", hypervisor="qemu"),)
MISMATCH = "machine-state-mismatch"

pytestmark = needs("qemu-system-x86_64")


async def started(watched):
    """A machine that boots nothing: its firmware finds no disk, and waits. Its process."""
    spec = {"architecture": "x86_64", "memory": "32M", "channels": []}
    await watched.machine_of("web", host="qemu", spec=spec)
    return await process_of(watched)


async def process_of(watched):
    """The process that is the machine."""
    machine = await watched.at_host("web")
    found = processes.adopt(machine.hypervisor.owner, machine.id)
    assert len(found) == 1, found
    return found[0]


def test_qemu_that_is_killed_is_found_and_under_report_nothing_else_happens(run):
    async def test(watched):
        process = await started(watched)
        subscription = watched.manager.database.events.subscribe(None)
        os.kill(process.pid, signal.SIGKILL)
        # No sweep: its end is heard.
        async for event in subscription:
            if event.kind == "finding.raised":
                break
        assert event.data["code"] == MISMATCH
        finding = await watched.found(MISMATCH)
        assert finding.id == event.data["finding"]
        assert (finding.evidence["stored"], finding.evidence["seen"]) == ("running", "failed")
        assert finding.policy == "report"
        assert (await watched.machine("web")).state == "running"
        assert await watched.state_at_host("web") is MachineState.FAILED
        assert [each.kind for each in await watched.operations()] == ["machine.create"]
        machine = await watched.at_host("web")
        assert processes.adopt(machine.hypervisor.owner, machine.id) == []
        await watched.did(DeleteMachine(machine="web", force=True))
        await watched.nothing()

    run(test, events=True, hosts=HOSTS)


def test_qemu_that_is_killed_is_restarted_under_reconcile(run):
    async def test(watched):
        before = await started(watched)
        subscription = watched.manager.database.events.subscribe(None)
        os.kill(before.pid, signal.SIGKILL)
        async for event in subscription:
            if event.kind == "finding.repaired":
                break
        after = await process_of(watched)
        assert after.identity != before.identity
        assert await watched.state_at_host("web") is MachineState.RUNNING
        assert (await watched.machine("web")).state == "running"
        kinds = [each.kind for each in await watched.operations()]
        assert kinds == ["finding.repair", "machine.create"]
        await watched.nothing()
        await watched.did(DeleteMachine(machine="web", force=True))
        await watched.nothing()

    run(test, events=True, hosts=HOSTS, findings={MISMATCH: "reconcile"})


def test_qemu_whose_machine_was_removed_by_hand_is_an_orphan_and_is_ended(run):
    async def test(watched):
        process = await started(watched)
        machine = await watched.at_host("web")
        directory = machine.hypervisor.records.directory(machine.id)
        await watched.forget("web")
        # Another manager of the home does not find it any more.
        machine.hypervisor.forget(machine)
        await machine.release()
        shutil.rmtree(directory)
        finding = await watched.found("orphan-process")
        assert finding.evidence["pid"] == process.pid
        assert "qemu-system-x86_64" in finding.message
        await watched.repaired(finding, "reconcile")
        assert not process.running
        await watched.nothing()

    run(test, hosts=HOSTS)


async def bypassing(watched, name):
    """A machine that somebody makes in the manager's store without the manager; it runs."""
    hypervisor = await watched.manager.hosts.get("qemu")
    spec = MachineSpec.of(name=name, architecture="x86_64", memory="32M", channels=())
    machine = await hypervisor.create(spec)
    await machine.start()
    return machine


def test_a_machine_that_was_made_past_the_manager_is_found_and_paused_or_taken_in(run):
    async def test(watched):
        machine = await bypassing(watched, "m-0123456789ab")
        finding = await watched.found("orphan-machine")
        assert (finding.name, finding.evidence["seen"]) == ("m-0123456789ab", "running")
        await watched.repaired(finding, "quarantine")
        assert (await machine.status()).state is MachineState.PAUSED
        await watched.repaired(finding, "quarantine", undo=True)
        assert (await machine.status()).state is MachineState.RUNNING
        again = await watched.found("orphan-machine")
        repair = await watched.repaired(again, "adopt")
        id_ = repair.result["undo"]["machine"]
        await watched.nothing()
        assert (await watched.machine(id_)).state == "running"
        await watched.did(DeleteMachine(machine=id_, force=True))
        await watched.nothing()

    run(test, hosts=HOSTS)


def test_a_machine_that_was_made_past_the_manager_is_deleted_only_by_its_name(run):
    async def test(watched):
        machine = await bypassing(watched, "m-0123456789ab")
        other = await bypassing(watched, "m-ba9876543210")
        findings = {each.name: each for each in await watched.sweep()}
        assert set(findings) == {machine.name, other.name}
        finding = findings[machine.name]
        for typed in (None, other.name):
            with pytest.raises(InvalidSpec, match=machine.name):
                await watched.manager.operator.submit(
                    RepairFinding(finding=finding.id, action="reconcile", name=typed)
                )
        (process,) = processes.adopt(machine.hypervisor.owner, machine.id)
        await watched.repaired(finding, "reconcile", name=machine.name)
        assert not process.running
        assert (await other.status()).state is MachineState.RUNNING
        assert [each.name for each in await watched.sweep()] == [other.name]
        await other.delete(force=True)
        await watched.nothing()

    run(test, hosts=HOSTS)

"""QEMU killed by hand is found; only under the policy `reconcile` more happens."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from tests.store import IMAGE_STORE

from vmlab.hypervisors import processes
from vmlab.machine.states import MachineState
from vmlab.manager.observer.observer import Pace
from vmlab.manager.requests import DeleteMachine
from vmlab.manager.settings import HostSetting

IMAGE = "debian-12-amd64-tiny"
HOSTS = (HostSetting(name="qemu", hypervisor="qemu"),)
MISMATCH = "machine-state-mismatch"

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86"
)


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


@pytest.mark.slow
@pytest.mark.boots
def test_a_real_guest_whose_clock_is_wrong_is_found_and_its_clock_set(run, monkeypatch):
    async def test(watched):
        await watched.machine_of("web", host="qemu", image=IMAGE, spec=None, memory="192M")
        id_ = (await watched.machine("web")).id
        guest = await watched.manager.guests.get(id_)
        await watched.nothing()
        await guest.succeed("date -s @1000000000")
        finding = await watched.found("clock-drift")
        assert finding.evidence["drift"] < -1e8
        await watched.repaired(finding, "reconcile")
        assert int((await guest.succeed("date +%s")).stdout) > 1.7e9
        await watched.nothing()
        await watched.did(DeleteMachine(machine="web", force=True))

    monkeypatch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
    pace = Pace(settle=0.01, guest_every=86400, guest_answers=200.0, boots=0.0)
    run(test, hosts=HOSTS, pace=pace)

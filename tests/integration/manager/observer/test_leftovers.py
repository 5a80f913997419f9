"""Processes, locks, reservations, addresses and leases of nobody, made for real."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import psutil
import pytest
from sqlalchemy import select

from vmlab.hypervisors import processes
from vmlab.hypervisors.ownership import Store
from vmlab.manager.networks.addresses import take
from vmlab.manager.requests import (
    CreateNetwork,
    MachinePolicy,
    NewNic,
    StopMachine,
    UpdateMachine,
)
from vmlab.manager.store.queries import find_machine, find_network
from vmlab.manager.store.tables import (
    AddressRow,
    MachineRow,
    OperationRow,
    ReservationRow,
)

ONE = "f" * 32


async def a_process(watched, **options):
    """A process of the manager's store, for a machine that nobody has."""
    owner = Store.open(watched.manager.settings.home, "manager").owner
    return await processes.spawn(
        [sys.executable, "-c", "input()", str(owner.directory)],
        owner=owner,
        machine=ONE,
        stdin=options.get("stdin"),
    )


@pytest.fixture
def pipe():
    """The end to read from of a pipe that nobody writes into."""
    import os

    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def test_a_process_of_no_machine_is_found_and_ended(run, pipe):
    async def test(watched):
        process = await a_process(watched, stdin=pipe)
        finding = await watched.found("orphan-process")
        assert finding.evidence["pid"] == process.pid
        assert finding.evidence["machine"] == ONE
        assert process.running
        await watched.repaired(finding, "reconcile")
        assert await process.wait() == -9
        await watched.nothing()

    run(test, hosts=None)


def test_a_process_that_an_operation_has_just_begun_is_no_orphan(run, pipe, monkeypatch):
    # The moment of the boot is told in whole seconds: all may seem to have begun that much earlier.
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(psutil, "boot_time", lambda: booted - 0.99)

    async def test(watched):
        async with watched.under_way("machine:elsewhere"):
            process = await a_process(watched, stdin=pipe)
            try:
                await watched.nothing()
            finally:
                process.kill()
                await process.wait()

    run(test)


def test_a_process_without_a_record_is_found_by_its_environment_and_command_line(run, pipe):
    async def test(watched):
        process = await a_process(watched, stdin=pipe)
        process._record.path.unlink()
        finding = await watched.found("orphan-process")
        await watched.repaired(finding, "reconcile")
        assert await process.wait() == -9

    run(test)


def test_a_process_of_another_home_is_nobodys_business(run, pipe, tmp_path):
    async def test(watched):
        from vmlab.hypervisors.ownership import Home

        owner = Store.open(Home.open(tmp_path / "other"), "manager").owner
        process = await processes.spawn(
            [sys.executable, "-c", "input()"], owner=owner, machine=ONE, stdin=pipe
        )
        try:
            await watched.nothing()
        finally:
            process.kill()
            await process.wait()

    run(test)


def test_a_process_of_no_machine_is_stopped_by_quarantine_and_goes_on_by_its_undo(run, pipe):
    async def test(watched):
        process = await a_process(watched, stdin=pipe)
        try:
            finding = await watched.found("orphan-process")
            await watched.repaired(finding, "quarantine")
            await until_status(process.pid, psutil.STATUS_STOPPED)
            await watched.repaired(finding, "quarantine", undo=True)
            await until_status(process.pid, psutil.STATUS_SLEEPING)
        finally:
            process.kill()
            await process.wait()

    run(test)


async def until_status(pid, status):
    """A signal works when its process is scheduled."""
    await asyncio.to_thread(wait_for_status, pid, status)


def wait_for_status(pid, status):
    while psutil.Process(pid).status() != status:
        time.sleep(0.01)


# ------------------------------------------------------------------------ locks


HOLD = """
import os, pathlib, sys
from vmlab.hypervisors.locks import FileLock
lock = FileLock.take(pathlib.Path(sys.argv[1]))
if sys.argv[2] == "named":
    lock.write(str(os.getpid()))
print("held", flush=True)
sys.stdin.read()
"""


def holder_of(path, *, named=False):
    """A process that is about to hold that lock, as those of vmlab do, and says so."""
    words = [sys.executable, "-c", HOLD, str(path), "named" if named else "unnamed"]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def lock_of(watched):
    """The lock file of a machine of the manager's store."""
    owner = Store.open(watched.manager.settings.home, "manager").owner
    path = owner.directory / "machines" / "qemu" / ONE / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_that_a_stranger_holds_is_found(run):
    async def test(watched):
        await watched.machine_of("web")  # so that its host, and with it the store, is open
        path = lock_of(watched)
        await watched.nothing()
        with holder_of(path) as holder:
            await asyncio.to_thread(holder.stdout.readline)
            finding = await watched.found("stale-lock")
            assert finding.evidence["holder"] == holder.pid
            assert (finding.severity, finding.actions) == ("error", ())
            holder.stdin.close()
        await watched.nothing()

    run(test)


def test_a_lock_file_that_names_a_dead_process_is_found_and_removed(run):
    async def test(watched):
        await watched.machine_of("web")
        path = lock_of(watched)
        with holder_of(path, named=True) as holder:
            await asyncio.to_thread(holder.stdout.readline)
            holder.kill()
        finding = await watched.found("stale-lock")
        assert (finding.evidence["named"], finding.severity) == (holder.pid, "info")
        await watched.repaired(finding, "reconcile")
        assert not path.exists()
        await watched.nothing()

    run(test)


def test_what_is_set_aside_for_an_operation_that_has_ended_is_found_and_let_go(run):
    async def test(watched):
        def leave(session):
            row = OperationRow(kind="machine.start", state="failed", request={})
            session.add(row)
            session.flush()
            session.add(ReservationRow(operation_id=row.id, vcpus=2))

        await watched.manager.database.write(leave)
        finding = await watched.found("stale-lock")
        assert "2 vCPUs" in finding.message
        await watched.repaired(finding, "reconcile")
        await watched.nothing()
        assert (
            await watched.manager.database.read(
                lambda s: list(s.scalars(select(ReservationRow.id)))
            )
            == []
        )

    run(test)


# ------------------------------------------------------------------------ addresses


async def on_a_network(watched, *names):
    """A network with those machines on it, each with an address that it has taken."""
    await watched.did(CreateNetwork(name="lan", mode="isolated", subnet="10.9.0.0/24"))
    for name in names:
        await watched.machine_of(name, nics=(NewNic(network="lan"),))

    def all_take(session):
        for name in names:
            take(session, find_machine(session, name))

    await watched.manager.database.write(all_take)
    return await watched.manager.database.read(lambda s: find_network(s, "lan").id)


async def addresses(watched):
    return await watched.manager.database.read(
        lambda s: sorted(s.scalars(select(AddressRow.address)))
    )


def test_an_address_of_nobody_is_found_and_released_and_can_be_taken_again(run):
    async def test(watched):
        network = await on_a_network(watched, "web")
        await watched.nothing()
        kept = await addresses(watched)
        await watched.manager.database.write(
            lambda s: s.add(AddressRow(network_id=network, address="10.9.0.77"))
        )
        finding = await watched.found("leaked-address")
        assert finding.name == "10.9.0.77"
        await watched.repaired(finding, "reconcile")
        assert await addresses(watched) == kept
        await watched.nothing()
        await watched.repaired(finding, "reconcile", undo=True)
        assert "10.9.0.77" in await addresses(watched)

    run(test)


def test_an_address_that_a_machine_at_rest_should_have_let_go_is_found(run):
    async def test(watched):
        await on_a_network(watched, "web")
        await watched.did(StopMachine(machine="web"))
        await watched.nothing()
        held = await addresses(watched)
        assert held

        # What is at rest already is not told of its new policy.
        policy = MachinePolicy(release_addresses="stop")
        await watched.did(UpdateMachine(machine="web", policy=policy))
        finding = await watched.found("leaked-address")
        assert "which is stopped" in finding.message
        await watched.repaired(finding, "reconcile")
        assert await addresses(watched) == []
        await watched.nothing()

    run(test)


def test_two_with_one_address_are_found_and_the_wrong_one_is_taken_off(run):
    async def test(watched):
        network = await on_a_network(watched, "web", "db")
        web, db = await watched.machine("web"), await watched.machine("db")
        directory = watched.manager.settings.directory / "networks" / network
        directory.mkdir(parents=True, exist_ok=True)
        address = web.nics[0].addresses[0]
        lines = [f"1900000000 {db.nics[0].mac} {address} db *"]
        (directory / "leases").write_text("\n".join(lines))
        finding = await watched.found("address-conflict")
        assert finding.evidence["belongs_to"] == web.nics[0].mac
        assert finding.evidence["used_by"] == [db.nics[0].mac]
        machine = await watched.at_host("db")
        before = machine.spec.nics
        assert len(before) == 1
        await watched.repaired(finding, "quarantine")
        assert machine.spec.nics == ()
        assert len((await (await watched.at_host("web")).info()).nics) == 1
        await watched.repaired(finding, "quarantine", undo=True)
        assert [(each.name, each.mac) for each in machine.spec.nics] == [
            (each.name, each.mac) for each in before
        ]
        (directory / "leases").unlink()
        await watched.nothing()

    run(test)


def test_what_findings_say_is_json(run):
    async def test(watched):
        await watched.machine_of("web")
        await (await watched.at_host("web")).kill()
        for finding in await watched.sweep():
            assert json.loads(finding.model_dump_json())["code"] == finding.code
        rows = await watched.manager.database.read(
            lambda s: len(s.scalars(select(MachineRow)).all())
        )
        assert rows == 1

    run(test)

"""Migration: a machine is in one place, before, after, and whatever happens between."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from vmlab.conformance.bench import Bench, names, of_type, shape
from vmlab.conformance.checks.snapshots import has_disks, write_disks
from vmlab.conformance.registry import Means, check
from vmlab.hypervisors.base import Hypervisor, Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidSpec,
    InvalidState,
    MachineExists,
    MachineNotFound,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.states import MachineState

_SHORTER: Final = 4
"""How often a migration that is quicker than its limit is given a shorter one."""


@check(
    "migration.live",
    clause="a running machine arrives running with its memory, its disks and its name, and is "
    "gone where it was",
    needs=[Capability.LIVE_MIGRATION],
    means=[Means.GUEST],
)
async def live(lab: Bench) -> None:
    target = lab.another()
    there = await lab.run(target)
    machine = await lab.run()
    guest = lab.guest(machine)
    memory, disks = lab.bytes(), await write_disks(lab, guest)
    await guest.write_memory(0, memory)
    unflushed = lab.bytes()
    await guest.write_disk(lab.scratch[0], 0, unflushed)
    made_of = shape(await machine.info())
    await lab.wait()
    before = await guest.ticks()
    arrived = lab.keep(await machine.migrate(target, live=True))
    lab.equal(arrived.name, machine.name, "the name after migration")
    lab.true(arrived.hypervisor is target, "the machine says that it is at the target")
    await lab.is_in(arrived, MachineState.RUNNING, "the machine that arrived")
    lab.equal(shape(await arrived.info()), made_of, "what the machine is made of")
    guest = lab.guest(arrived)
    lab.equal(await guest.read_memory(0, len(memory)), memory, "memory after migration")
    await has_disks(lab, arrived, disks, "after migration")
    found = await guest.read_disk(lab.scratch[0], 0, len(unflushed))
    lab.equal(found, unflushed, "what was not flushed, after migration")
    lab.true(await guest.ticks() >= before, "the guest's time goes on")
    await lab.is_in(machine, MachineState.DELETED, "the machine where it was")
    lab.equal(await names(lab.hypervisor), [], "machines where it was")
    gone = lab.hypervisor.get(machine.name)
    await lab.refuses(MachineNotFound, gone, "the machine where it was")
    lab.equal(await names(target), sorted([there.name, machine.name]), "machines where it is")
    await lab.is_in(there, MachineState.RUNNING, "a machine that was at the target before")
    moved = await of_type(lab.hypervisor, EventType.MIGRATED, machine)
    lab.equal(len(moved), 1, "events that tell of the migration")


@check(
    "migration.cold",
    clause="a machine at rest arrives at rest with its disks, and starts there",
    needs=[Capability.COLD_MIGRATION],
    means=[Means.GUEST],
)
async def cold(lab: Bench) -> None:
    target = lab.another()
    machine = await lab.run()
    disks = await write_disks(lab, lab.guest(machine))
    await machine.stop()
    arrived = lab.keep(await machine.migrate(target))
    await lab.is_in(arrived, MachineState.STOPPED, "the machine that arrived")
    lab.equal(await names(lab.hypervisor), [], "machines where it was")
    lab.equal(await names(target), [machine.name], "machines where it is")
    await arrived.start()
    await has_disks(lab, arrived, disks, "after a migration at rest")


@check(
    "migration.progress",
    clause="progress of a migration never falls, never passes the whole, and reaches it",
    needs=[Capability.LIVE_MIGRATION],
)
async def progress(lab: Bench) -> None:
    target = lab.another()
    machine = await lab.run()
    told: list[tuple[int, int]] = []
    lab.keep(await machine.migrate(target, progress=lambda done, total: told.append((done, total))))
    lab.true(len(told) > 0, "progress is told")
    done = [transferred for transferred, _ in told]
    lab.equal(done, sorted(done), "bytes transferred, as told")
    lab.true(all(0 <= part <= total for part, total in told), "no more than the whole")
    lab.equal(told[-1][0], told[-1][1], "the last that is told is the whole")
    events = await of_type(lab.hypervisor, EventType.MIGRATION_PROGRESS, machine)
    noted = [(event.data["transferred_bytes"], event.data["total_bytes"]) for event in events]
    lab.equal(noted, told, "progress by events")


async def _out_of_time(lab: Bench, machine: Machine, target: Hypervisor, limit: float) -> Machine:
    """Have a migration be late, and return the machine where it was.

    One that is quicker than `limit` comes back and is given less: what was measured on a busy host
    says little of how long the next one takes.
    """
    for _ in range(_SHORTER):
        try:
            arrived = lab.keep(await machine.migrate(target, timeout=limit))
        except DeadlineExceeded:
            return machine
        machine = lab.keep(await arrived.migrate(lab.hypervisor))
        limit /= 4
    limited = machine.migrate(target, timeout=limit)
    await lab.refuses(DeadlineExceeded, limited, "a migration out of time")
    return machine


@check(
    "migration.interrupted",
    clause="a migration that is cancelled or late leaves the machine running where it was and "
    "nothing at the target, which can take it later",
    needs=[Capability.LIVE_MIGRATION],
    means=[Means.GUEST],
)
async def interrupted(lab: Bench) -> None:
    target = lab.another()
    measured = await lab.run()
    begun = lab.now()
    await (lab.keep(await measured.migrate(target))).delete(force=True)
    usual = lab.now() - begun
    machine = await lab.run()
    guest = lab.guest(machine)
    memory, disks = lab.bytes(), await write_disks(lab, guest)
    await guest.write_memory(0, memory)
    for way in ("cancelled", "late"):
        for share in lab.profile.cancel_points:
            what = f"after a migration that was {way} at {share:.0%}"
            if way == "late":
                if share == 0:
                    continue
                machine = await _out_of_time(lab, machine, target, usual * share * 0.5)
                guest = lab.guest(machine)
            else:
                for arrived in await lab.interrupt(
                    machine.migrate(target), usual * share * 0.5, "a cancelled migration"
                ):
                    # Too quick to be interrupted: the way back, and on.
                    machine = lab.keep(await lab.keep(arrived).migrate(lab.hypervisor))
                    guest = lab.guest(machine)
            await lab.is_in(machine, MachineState.RUNNING, what)
            lab.equal(await names(target), [], f"{what}: machines at the target")
            lab.equal(await guest.read_memory(0, len(memory)), memory, f"{what}: memory")
            await has_disks(lab, machine, disks, what)
    arrived = lab.keep(await machine.migrate(target))
    await has_disks(lab, arrived, disks, "when it was left to arrive")


@check(
    "migration.refused",
    clause="a migration to the same hypervisor, to one where the name is taken, or of the wrong "
    "kind is refused, and the machine is as before",
    needs=[Capability.LIVE_MIGRATION],
)
async def refused(lab: Bench) -> None:
    target = lab.another()
    machine = await lab.run()
    taken = await lab.create(target, name=machine.name)
    await lab.refuses(InvalidSpec, machine.migrate(lab.hypervisor), "a migration to itself")
    there = machine.migrate(target)
    await lab.refuses(MachineExists, there, "a migration to where the name is taken")
    cold_one = machine.migrate(target, live=False)
    await lab.refuses(InvalidState, cold_one, "a migration at rest of a running machine")
    await lab.is_in(machine, MachineState.RUNNING, "after refused migrations")
    lab.equal(await names(target), [taken.name], "machines at the target")
    await lab.is_in(taken, MachineState.CREATED, "the machine that has the name")


@check(
    "migration.crash",
    clause="a machine that dies while it is moved has failed where it was, and nothing is at the "
    "target",
    needs=[Capability.LIVE_MIGRATION],
    means=[Means.CRASH],
)
async def crash(lab: Bench) -> None:
    target = lab.another()
    measured = await lab.run()
    begun = lab.now()
    await (lab.keep(await measured.migrate(target))).delete(force=True)
    usual = lab.now() - begun
    machine = await lab.run()
    await lab.crash(machine, usual * 0.4)
    with suppress(VmlabError):
        lab.keep(await machine.migrate(target))
        lab.note("the machine was faster than the crash")
        return
    await lab.is_in(machine, MachineState.FAILED, "a machine that died while it was moved")
    lab.equal(await names(target), [], "machines at the target")
    await machine.start()
    await lab.is_in(machine, MachineState.RUNNING, "the machine after it was started again")

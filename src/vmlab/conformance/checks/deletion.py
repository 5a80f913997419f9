"""Delete: all of it, once, as often as asked."""

from __future__ import annotations

import asyncio

from vmlab.conformance.bench import Bench, names, of_type
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.events import EventType
from vmlab.machine.states import MachineState


@check(
    "delete.idempotent",
    clause="deleting a deleted machine does nothing, deletes at once all succeed, and one event "
    "tells of it; status still says deleted",
)
async def idempotent(lab: Bench) -> None:
    machine = await lab.create()
    await asyncio.gather(*(machine.delete() for _ in range(3)))
    await machine.delete()
    await machine.delete(force=True)
    await lab.is_in(machine, MachineState.DELETED, "after five deletes")
    told = await of_type(lab.hypervisor, EventType.DELETED, machine)
    lab.equal(len(told), 1, "events that tell of the deletion")


@check(
    "delete.force",
    clause="delete with force ends a live machine first, in whatever state it is, and takes "
    "nothing of another machine's",
)
async def force(lab: Bench) -> None:
    other = await lab.run()
    states = [MachineState.RUNNING]
    if lab.has(Capability.PAUSE):
        states.append(MachineState.PAUSED)
    for state in states:
        machine = await lab.run()
        if state is MachineState.PAUSED:
            await machine.pause()
        await machine.delete(force=True)
        await lab.is_in(machine, MachineState.DELETED, f"a {state.value} machine after delete")
        lab.equal(await names(lab.hypervisor), [other.name], "machines after delete")
    await lab.is_in(other, MachineState.RUNNING, "the other machine")
    await lab.answers(other, "the other machine")


@check(
    "delete.contents",
    clause="a new machine of an old name has nothing of the old one: no contents, no snapshots, "
    "no console log",
    means=[Means.GUEST],
)
async def contents(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    disk = lab.scratch[0]
    data = lab.bytes()
    await guest.write_disk(disk, 0, data)
    await guest.flush(disk)
    await guest.print("conformance of old")
    if lab.has(Capability.SNAPSHOT):
        await machine.snapshot("old")
    await machine.delete(force=True)
    again = await lab.run(name=machine.name)
    lab.true(again.id != machine.id, "the new machine has an id of its own")
    found = await lab.guest(again).read_disk(disk, 0, len(data))
    lab.true(found != data, "the new machine's disk does not have the old contents")
    if lab.has(Capability.SNAPSHOT):
        lab.equal(await again.snapshots(), [], "snapshots of the new machine")
    if lab.has(Capability.CONSOLE):
        async with await again.console() as console:
            log = await console.log()
        lab.true(b"conformance of old" not in log, "the new machine's console log is its own")


@check(
    "delete.cancelled",
    clause="a delete that is cancelled either deletes the machine or leaves it to be deleted again",
)
async def cancelled(lab: Bench) -> None:
    for share in lab.profile.cancel_points:
        measured = await lab.create()
        begun = lab.now()
        await measured.delete()
        usual = lab.now() - begun
        machine = await lab.create()
        await lab.interrupt(machine.delete(), usual * share * 0.8, f"delete cancelled at {share}")
        lab.true(machine.state.is_stable, f"{machine.state.value} lasts")
        await machine.delete()
        await lab.is_in(machine, MachineState.DELETED, "a machine that was deleted again")
        lab.equal(await names(lab.hypervisor), [], "machines after delete")

"""Snapshots: what was saved comes back, in the same and in a fresh machine, or not at all."""

from __future__ import annotations

from vmlab.conformance.bench import Bench, names, shape
from vmlab.conformance.probe import GuestProbe
from vmlab.conformance.registry import Means, check
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    CorruptSnapshot,
    InvalidState,
    MachineExists,
    OperationFailed,
    SnapshotNotFound,
)
from vmlab.machine.states import MachineState

Contents = dict[str, bytes]


async def write_disks(lab: Bench, guest: GuestProbe) -> Contents:
    """Write something new to every scratch disk and flush it; returns what."""
    written = {}
    for disk in lab.scratch:
        written[disk] = lab.bytes()
        await guest.write_disk(disk, 8192, written[disk])
        await guest.flush(disk)
    return written


async def has_disks(lab: Bench, machine: Machine, contents: Contents, what: str) -> None:
    """State that the guest finds `contents` on its disks."""
    guest = lab.guest(machine)
    for disk, data in contents.items():
        lab.equal(await guest.read_disk(disk, 8192, len(data)), data, f"{what}: disk {disk}")


@check(
    "snapshot.disks-return",
    clause="a snapshot without memory, restored to the machine at rest, brings all its disks back "
    "and leaves it stopped",
    needs=[Capability.SNAPSHOT, Capability.RESTORE],
    means=[Means.GUEST],
)
async def disks_return(lab: Bench) -> None:
    machine = await lab.run()
    saved = await write_disks(lab, lab.guest(machine))
    await machine.stop()
    taken = await machine.snapshot("disks")
    lab.equal(taken.memory, False, "a snapshot of a machine at rest has no memory in it")
    await machine.start()
    await write_disks(lab, lab.guest(machine))
    await machine.stop()
    await machine.restore("disks")
    await lab.is_in(machine, MachineState.STOPPED, "after the restore of disks")
    await machine.start()
    await has_disks(lab, machine, saved, "after the restore")


@check(
    "snapshot.memory-returns",
    clause="a snapshot with memory brings back memory, disks and the state it was taken in, as "
    "often as asked, from whatever state",
    needs=[Capability.SNAPSHOT, Capability.MEMORY_SNAPSHOT, Capability.RESTORE],
    means=[Means.GUEST],
)
async def memory_returns(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    memory, disks = lab.bytes(), await write_disks(lab, guest)
    await guest.write_memory(0, memory)
    taken = await machine.snapshot("all", memory=True)
    lab.equal(taken.memory, True, "the snapshot has memory in it")
    for later in ("running", "stopped"):
        await guest.write_memory(0, lab.bytes())
        await write_disks(lab, guest)
        if later == "stopped":
            await machine.stop()
        await machine.restore("all")
        what = f"restored to the {later} machine"
        await lab.is_in(machine, MachineState.RUNNING, what)
        guest = lab.guest(machine)
        lab.equal(await guest.read_memory(0, len(memory)), memory, f"{what}: memory")
        await has_disks(lab, machine, disks, what)


@check(
    "snapshot.paused",
    clause="a snapshot of a paused machine brings it back paused",
    needs=[
        Capability.SNAPSHOT,
        Capability.MEMORY_SNAPSHOT,
        Capability.RESTORE,
        Capability.PAUSE,
        Capability.RESUME,
    ],
    means=[Means.GUEST],
)
async def paused(lab: Bench) -> None:
    machine = await lab.run()
    marker = lab.bytes()
    await lab.guest(machine).write_memory(0, marker)
    await machine.pause()
    taken = await machine.snapshot("held")
    lab.equal(taken.state.value, MachineState.PAUSED.value, "the state in the snapshot")
    await machine.resume()
    await lab.guest(machine).write_memory(0, lab.bytes())
    await machine.restore("held")
    await lab.is_in(machine, MachineState.PAUSED, "after the restore of a paused machine")
    await machine.resume()
    found = await lab.guest(machine).read_memory(0, len(marker))
    lab.equal(found, marker, "memory after restore and resume")


@check(
    "snapshot.leaves-guest",
    clause="taking a snapshot leaves the guest as it is: it runs on with its memory and with what "
    "it had written and not flushed",
    needs=[Capability.SNAPSHOT],
    means=[Means.GUEST],
)
async def leaves_guest(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    disk = lab.scratch[0]
    memory, unflushed = lab.bytes(), lab.bytes()
    await guest.write_memory(0, memory)
    await guest.write_disk(disk, 0, unflushed)
    before = await guest.ticks()
    await machine.snapshot("passing")
    await lab.is_in(machine, MachineState.RUNNING, "after a snapshot")
    await lab.wait()
    lab.true(await guest.ticks() > before, "the guest runs on after a snapshot")
    lab.equal(await guest.read_memory(0, len(memory)), memory, "memory after a snapshot")
    found = await guest.read_disk(disk, 0, len(unflushed))
    lab.equal(found, unflushed, "what was not flushed, after a snapshot")


@check(
    "snapshot.fresh-machine",
    clause="a snapshot makes a fresh machine with a name, id and MAC addresses of its own and the "
    "contents that were saved; the first one does not notice",
    needs=[Capability.SNAPSHOT, Capability.RESTORE],
    means=[Means.GUEST],
)
async def fresh_machine(lab: Bench) -> None:
    with_memory = lab.has(Capability.MEMORY_SNAPSHOT)
    machine = await lab.run()
    guest = lab.guest(machine)
    memory, disks = lab.bytes(), await write_disks(lab, guest)
    await guest.write_memory(0, memory)
    taken = await machine.snapshot("seed")
    later, later_disks = lab.bytes(), await write_disks(lab, guest)
    await guest.write_memory(0, later)
    fresh = lab.keep(await lab.hypervisor.create_from(taken, lab.name()))
    expected = MachineState.RUNNING if with_memory else MachineState.STOPPED
    await lab.is_in(fresh, expected, "a machine made of a snapshot")
    lab.true(fresh.id != machine.id, "the fresh machine has an id of its own")
    macs = [{nic.mac for nic in (await each.info()).nics} for each in (machine, fresh)]
    lab.true(not macs[0] & macs[1], "the fresh machine has MAC addresses of its own")
    if not with_memory:
        await fresh.start()
    else:
        found = await lab.guest(fresh).read_memory(0, len(memory))
        lab.equal(found, memory, "memory of the fresh machine")
    await has_disks(lab, fresh, disks, "the fresh machine")
    lab.equal(await guest.read_memory(0, len(later)), later, "memory of the first machine")
    await has_disks(lab, machine, later_disks, "the first machine")


@check(
    "snapshot.list",
    clause="snapshots are listed the oldest first with what they are of; restoring an old one "
    "keeps the newer ones, deleting one keeps the others",
    needs=[Capability.SNAPSHOT, Capability.RESTORE],
)
async def listed(lab: Bench) -> None:
    machine = await lab.create()
    lab.equal(await machine.snapshots(), [], "snapshots of a new machine")
    taken = []
    for name in ("zero", "alpha", "mid"):
        taken.append(await machine.snapshot(name))
        await lab.wait()
    for snapshot in taken:
        lab.equal(snapshot.machine, machine.id, "the snapshot names its machine")
        lab.equal(snapshot.state.value, MachineState.CREATED.value, "the state it was taken in")
        lab.true(bool(snapshot.digest), "the snapshot has a digest of its contents")
    lab.equal(await machine.snapshots(), taken, "the snapshots, the oldest first")
    await machine.restore("zero")
    lab.equal(await machine.snapshots(), taken, "the snapshots after the restore of the oldest")
    await machine.delete_snapshot("alpha")
    left = [snapshot.name for snapshot in await machine.snapshots()]
    lab.equal(left, ["zero", "mid"], "the snapshots after one was deleted")
    await machine.snapshot("alpha")


@check(
    "snapshot.refusals",
    clause="a missing snapshot, a name that is taken, memory of a machine at rest, disks alone "
    "under a running guest are refused, and nothing changes",
    needs=[Capability.SNAPSHOT, Capability.RESTORE],
)
async def refusals(lab: Bench) -> None:
    machine = await lab.create()
    kept = await machine.snapshot("kept")
    await lab.refuses(OperationFailed, machine.snapshot("kept"), "a snapshot whose name is taken")
    if lab.has(Capability.MEMORY_SNAPSHOT):
        at_rest = machine.snapshot("ram", memory=True)
        await lab.refuses(InvalidState, at_rest, "memory of a machine at rest")
    await machine.start()
    under = machine.restore("kept")
    await lab.refuses(InvalidState, under, "disks alone under a running guest")
    await lab.is_in(machine, MachineState.RUNNING, "after refused restores")
    lab.equal(await machine.snapshots(), [kept], "snapshots after refusals")
    taken = lab.hypervisor.create_from(kept, machine.name)
    await lab.refuses(MachineExists, taken, "a fresh machine whose name is taken")
    await machine.delete(force=True)
    gone = lab.hypervisor.create_from(kept, lab.name())
    await lab.refuses(SnapshotNotFound, gone, "a machine out of a snapshot that is gone")
    lab.equal(await names(lab.hypervisor), [], "machines after refusals")


@check(
    "snapshot.corrupt",
    clause="a snapshot whose contents are damaged is refused with CorruptSnapshot; the machine is "
    "as before and nothing is created",
    needs=[Capability.SNAPSHOT, Capability.MEMORY_SNAPSHOT, Capability.RESTORE],
    means=[Means.GUEST, Means.CORRUPT],
)
async def corrupt(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    taken = await machine.snapshot("damaged")
    memory, disks = lab.bytes(), await write_disks(lab, guest)
    await guest.write_memory(0, memory)
    before = shape(await machine.info())
    damage = lab.profile.corrupt
    lab.true(damage is not None, "the profile damages snapshots")
    if damage is not None:
        await damage(lab.hypervisor, machine, taken)
    await lab.refuses(CorruptSnapshot, machine.restore("damaged"), "restore of a damaged snapshot")
    await lab.is_in(machine, MachineState.RUNNING, "after the refused restore")
    fresh = lab.hypervisor.create_from(taken, lab.name())
    await lab.refuses(CorruptSnapshot, fresh, "a machine out of a damaged snapshot")
    lab.equal(await names(lab.hypervisor), [machine.name], "machines afterwards")
    lab.equal(shape(await machine.info()), before, "what the machine is made of afterwards")
    lab.equal(await guest.read_memory(0, len(memory)), memory, "memory afterwards")
    await has_disks(lab, machine, disks, "afterwards")

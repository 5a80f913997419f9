"""Owners: each sees its own machines, and a run's machines end with it."""

from __future__ import annotations

import shutil

from vmlab.conformance.bench import Bench, names
from vmlab.conformance.registry import check
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import MachineNotFound
from vmlab.machine.states import MachineState


@check(
    "owner.isolation",
    clause="two owners may have machines of one name; neither lists, finds or disturbs the other's",
)
async def isolation(lab: Bench) -> None:
    other = lab.another()
    mine = await lab.run()
    lab.equal(await names(other), [], "machines of the other owner")
    for key in (mine.name, mine.id):
        await lab.refuses(MachineNotFound, other.get(key), "another owner's machine")
    theirs = await lab.run(other, name=mine.name)
    owners = [(await each.info()).owner for each in (mine, theirs)]
    lab.equal(owners, [str(lab.hypervisor.owner), str(other.owner)], "owners by info")
    if lab.profile.probe is not None:
        data = [lab.bytes(), lab.bytes()]
        for machine, marker in zip((mine, theirs), data, strict=True):
            await lab.guest(machine).write_memory(0, marker)
        found = [await lab.guest(each).read_memory(0, 512) for each in (mine, theirs)]
        lab.equal(found, data, "memory of machines of one name")
    await theirs.delete(force=True)
    await lab.is_in(mine, MachineState.RUNNING, "after the other owner deleted its machine")
    lab.equal(await names(lab.hypervisor), [mine.name], "machines of this owner")


@check(
    "owner.close",
    clause="closing a run's hypervisor deletes its machines, live or at rest, and no one else's",
)
async def close(lab: Bench) -> None:
    other = lab.another()
    theirs = [await lab.create(other), await lab.run(other)]
    if lab.has(Capability.PAUSE):
        theirs.append(await lab.run(other))
        await theirs[-1].pause()
    mine = await lab.run()
    await lab.close(other)
    for machine in theirs:
        lab.equal(machine.state.value, MachineState.DELETED.value, "a machine of a run that ended")
    await lab.is_in(mine, MachineState.RUNNING, "a machine of another run")
    await lab.answers(mine, "a machine of another run")


@check(
    "owner.store",
    clause="a store's machines outlive the hypervisor that made them: the next one finds them as "
    "they are, and can do with them what the first could",
)
async def store(lab: Bench) -> None:
    first = lab.store()
    resting, live = await lab.create(first), await lab.run(first)
    lab.equal((await live.info()).owner, str(first.owner), "owner by info")
    data = lab.bytes()
    if lab.profile.probe is not None:
        await lab.guest(live).write_disk(lab.scratch[0], 0, data)
        await lab.guest(live).flush(lab.scratch[0])
    second = await lab.reopened(first)
    lab.equal(sorted(await names(second)), sorted([resting.name, live.name]), "machines found")
    rested, lived = [lab.keep(await second.get(each.id)) for each in (resting, live)]
    for old, new in ((resting, rested), (live, lived)):
        lab.equal((new.id, new.spec), (old.id, old.spec), "what was found is the same machine")
    await lab.is_in(rested, MachineState.CREATED, "a machine at rest, found again")
    await lab.until(
        lambda: _agrees(lived), "the state of a machine that was left running is what it is in"
    )
    if lived.state is not MachineState.RUNNING:
        lab.note(f"a machine that was left running is found {lived.state.value}")
        await lived.start()
    if lab.profile.probe is not None:
        found = await lab.guest(lived).read_disk(lab.scratch[0], 0, len(data))
        lab.equal(found, data, "the disk of a machine that was found")
    await rested.start()
    await lab.answers(rested, "a machine that was found at rest and started")
    for machine in (rested, lived):
        await machine.delete(force=True)
    third = await lab.reopened(second)
    lab.equal(await names(third), [], "machines after all were deleted")
    await lab.close(third)
    kept = [path for path in third.owner.directory.rglob("*") if not path.is_dir()]
    ids = (resting.id, live.id)
    left = [str(path) for path in kept if any(id_ in str(path) for id_ in ids)]
    lab.equal(left, [], "files of deleted machines in the store")
    # What is left is the store's own, and the store is of no further use.
    shutil.rmtree(third.owner.directory)


async def _agrees(machine: Machine) -> bool:
    """Whether the machine is in a state that lasts, by its own word and its hypervisor's."""
    said = (await machine.status()).state
    return said is machine.state and said.is_stable and said is not MachineState.UNKNOWN

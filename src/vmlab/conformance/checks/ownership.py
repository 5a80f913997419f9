"""Owners: each sees its own machines, and a run's machines end with it."""

from __future__ import annotations

from vmlab.conformance.bench import Bench, names
from vmlab.conformance.registry import check
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

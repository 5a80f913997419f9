"""Forks: a copy that is the same inside and somebody else outside."""

from __future__ import annotations

from vmlab.conformance.bench import Bench
from vmlab.conformance.checks.snapshots import has_disks, write_disks
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import MachineExists
from vmlab.machine.states import MachineState


@check(
    "fork.copies",
    clause="a fork has memory, disks and state of the machine it was made of, running or paused, "
    "and that machine goes on as before",
    needs=[Capability.FORK],
    means=[Means.GUEST],
)
async def copies(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    memory, disks = lab.bytes(), await write_disks(lab, guest)
    unflushed = lab.bytes()
    await guest.write_disk(lab.scratch[0], 0, unflushed)
    await guest.write_memory(0, memory)
    states = [MachineState.RUNNING]
    if lab.has(Capability.PAUSE, Capability.RESUME):
        states.append(MachineState.PAUSED)
    for state in states:
        if state is MachineState.PAUSED:
            await machine.pause()
        child = lab.keep(await machine.fork(lab.name()))
        what = f"the fork of a {state.value} machine"
        await lab.is_in(child, state, what)
        await lab.is_in(machine, state, f"the machine after {what}")
        if state is MachineState.PAUSED:
            await child.resume()
        seen = lab.guest(child)
        lab.equal(await seen.read_memory(0, len(memory)), memory, f"{what}: memory")
        await has_disks(lab, child, disks, what)
        found = await seen.read_disk(lab.scratch[0], 0, len(unflushed))
        lab.equal(found, unflushed, f"{what}: what was not flushed")
        wanted, made = machine.spec, child.spec
        lab.equal(
            (made.cpus, made.memory, made.disks),
            (wanted.cpus, wanted.memory, wanted.disks),
            f"{what}: specification",
        )
    await lab.refuses(MachineExists, machine.fork(machine.name), "a fork whose name is taken")


@check(
    "fork.independent",
    clause="neither of a machine and its fork sees what the other writes, to memory or disk, and "
    "either can end without the other",
    needs=[Capability.FORK],
    means=[Means.GUEST],
)
async def independent(lab: Bench) -> None:
    machine = await lab.run()
    await write_disks(lab, lab.guest(machine))
    children = [lab.keep(await machine.fork(lab.name())) for _ in range(2)]
    written = {}
    for each in (machine, *children):
        guest = lab.guest(each)
        written[each.id] = (lab.bytes(), await write_disks(lab, guest))
        await guest.write_memory(0, written[each.id][0])
    for each in (machine, *children):
        memory, disks = written[each.id]
        found = await lab.guest(each).read_memory(0, len(memory))
        lab.equal(found, memory, f"memory of {each.name}")
        await has_disks(lab, each, disks, each.name)
    await machine.delete(force=True)
    for child in children:
        await lab.is_in(child, MachineState.RUNNING, "a fork whose origin is gone")
        await has_disks(lab, child, written[child.id][1], "a fork whose origin is gone")


@check(
    "fork.identity",
    clause="a fork has an id, a name and MAC addresses of its own, knows it or can be told, and "
    "draws other random numbers then; its clock is that of the others",
    needs=[Capability.FORK],
    means=[Means.GUEST],
)
async def identity(lab: Bench) -> None:
    machine = await lab.run()
    family = [machine, *[lab.keep(await machine.fork(lab.name())) for _ in range(2)]]
    lab.equal(len({each.id for each in family}), 3, "ids of a machine and its forks")
    macs = [nic.mac for each in family for nic in (await each.info()).nics]
    lab.equal(len(set(macs)), len(macs), "different MAC addresses by info")
    # The one that they are copies of as well: its clock may have been wrong before.
    for each in family:
        await lab.guest(each).become(machine)
    seen = [nic.mac for each in family for nic in await lab.guest(each).nics()]
    lab.equal(sorted(seen), sorted(macs), "MAC addresses by the guests' word")
    for each in family:
        lab.equal(await lab.guest(each).hostname(), each.name, "the name by the guest's word")
    drawn = [await lab.guest(each).entropy() for each in family]
    lab.equal(len(set(drawn)), 3, "different random numbers in a machine and its forks")
    # How far each is ahead of the host, between the question and the answer.
    least, most = [], []
    for each in family:
        begun = lab.now()
        clock = await lab.guest(each).clock()
        least.append(clock - lab.now())
        most.append(clock - begun)
    apart = max(least) - min(most)
    lab.true(apart < 5, f"the clocks of all agree (apart by {apart:g} s at least)")

"""Many things at once: on one machine in order, on several without mixing them up."""

from __future__ import annotations

import asyncio

from vmlab.conformance.bench import Bench, Skipped
from vmlab.conformance.registry import Means, check
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import InvalidState
from vmlab.machine.events import EventType
from vmlab.machine.states import MachineState


@check(
    "concurrency.one-machine",
    clause="requests made of one machine at once are served in the order of the calls; what is no "
    "longer allowed when its turn comes is refused with InvalidState",
)
async def one_machine(lab: Bench) -> None:
    machine = await lab.create()
    first = [lab.spawn(call()) for call in (machine.start, machine.restart, machine.start)]
    await asyncio.gather(*first[:2])
    await lab.refuses(InvalidState, first[2], "a second start in its turn")
    later = [
        lab.spawn(call()) for call in (machine.stop, machine.start, machine.stop, machine.restart)
    ]
    await asyncio.gather(*later[:3])
    await lab.refuses(InvalidState, later[3], "a restart in its turn, after a stop")
    await lab.is_in(machine, MachineState.STOPPED, "when all had their turn")
    served = [
        (event.operation or "").rpartition("-")[0]
        for event in await lab.hypervisor.events()
        if event.type is EventType.OPERATION_STARTED and event.machine == machine.id
    ]
    order = ["create", "start", "restart", "stop", "start", "stop"]
    lab.equal(served, order, "operations in the order of the calls")


@check(
    "concurrency.three",
    clause="three machines that do different things at once do not notice each other",
    means=[Means.GUEST],
)
async def three(lab: Bench) -> None:
    machines = [await lab.run() for _ in range(3)]
    written = {}
    for machine in machines:
        written[machine.id] = lab.bytes()
        await lab.guest(machine).write_memory(0, written[machine.id])
        await lab.guest(machine).write_disk(lab.scratch[0], 0, written[machine.id])
    crowd = [_pauses(lab, machines[0]), _snapshots(lab, machines[1]), _writes(lab, machines[2])]
    for name in await asyncio.gather(*crowd):
        lab.true(bool(name), f"{name} had its way")
    for machine in machines:
        await lab.is_in(machine, MachineState.RUNNING, f"{machine.name} in the end")
        guest, data = lab.guest(machine), written[machine.id]
        found = await guest.read_memory(0, len(data))
        lab.equal(found, data, f"memory of {machine.name} in the end")
        found = await guest.read_disk(lab.scratch[0], 0, len(data))
        lab.equal(found, data, f"disk of {machine.name} in the end")


async def _pauses(lab: Bench, machine: Machine) -> str:
    for _round in range(3 if lab.has(Capability.PAUSE, Capability.RESUME) else 0):
        await machine.pause()
        await lab.is_in(machine, MachineState.PAUSED, f"{machine.name} among others")
        await machine.resume()
    return machine.name


async def _snapshots(lab: Bench, machine: Machine) -> str:
    for number in range(3 if lab.has(Capability.MEMORY_SNAPSHOT, Capability.RESTORE) else 0):
        await machine.snapshot(f"s{number}")
        await machine.restore(f"s{number}")
    return machine.name


async def _writes(lab: Bench, machine: Machine) -> str:
    for _round in range(3):
        data = lab.bytes()
        await lab.guest(machine).write_memory(65536, data)
        await asyncio.sleep(lab.profile.settle / 10)
        found = await lab.guest(machine).read_memory(65536, len(data))
        lab.equal(found, data, f"memory of {machine.name} among others")
    return machine.name


@check(
    "concurrency.many",
    clause="as many machines as the profile names (100, where limits allow) are made, run, keep "
    "their contents apart and are deleted at once",
    means=[Means.GUEST],
)
async def many(lab: Bench) -> None:
    count = _room(lab)
    if count < 4:
        raise Skipped(f"limits allow {count} machines at once, which is not many")
    machines = await asyncio.gather(*(lab.create(cpus=1) for _ in range(count)))
    lab.equal(len({machine.id for machine in machines}), count, "ids of the machines")
    await asyncio.gather(*(machine.start() for machine in machines))
    written = {machine.id: lab.bytes(64) for machine in machines}
    await asyncio.gather(*(lab.guest(each).write_memory(0, written[each.id]) for each in machines))
    found = await asyncio.gather(*(lab.guest(each).read_memory(0, 64) for each in machines))
    mixed = [
        each.name for each, data in zip(machines, found, strict=True) if data != written[each.id]
    ]
    lab.equal(mixed, [], f"machines of {count} whose memory is not their own")
    lab.equal(len(await lab.hypervisor.list()), count, "machines that are listed")
    await asyncio.gather(*(machine.delete(force=True) for machine in machines))
    lab.equal(len(await lab.hypervisor.list()), 0, "machines after all were deleted")


def _room(lab: Bench) -> int:
    """How many machines fit, of as many as the profile names."""
    limits, spec = lab.capabilities.limits, lab.profile.spec
    disks = sum(disk.size or 0 for disk in spec.disks)
    room = [
        lab.profile.many,
        *([limits.machines] if limits.machines is not None else []),
        *([limits.vcpus] if limits.vcpus is not None else []),
        *([limits.memory // spec.memory.size] if limits.memory is not None else []),
        *([limits.disk_space // disks] if limits.disk_space is not None and disks else []),
    ]
    return min(room)

"""Whether a machine is what its specification asks for, as the hypervisor and as the guest say."""

from __future__ import annotations

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import Disk, Nic


@check(
    "configuration.info",
    clause="info tells what a machine is made of, and that is what its specification asked for",
)
async def info(lab: Bench) -> None:
    for vcpus, memory in lab.profile.sizes:
        machine = await lab.create(cpus=vcpus, memory=memory)
        for running in (False, True):
            if running:
                await machine.start()
            told = await machine.info()
            asked = machine.spec
            what = f"info of {vcpus} vCPUs and {memory >> 20} MiB{', running' if running else ''}"
            lab.equal((told.id, told.name), (machine.id, machine.name), f"{what}: whose")
            lab.equal(told.architecture, asked.architecture, f"{what}: architecture")
            lab.equal(told.vcpus, vcpus, f"{what}: vCPUs")
            lab.equal(told.memory, memory, f"{what}: memory")
            lab.equal(
                [(disk.name, disk.size, disk.bus, disk.readonly) for disk in told.disks],
                [(disk.name, disk.size, disk.bus, disk.readonly) for disk in asked.disks],
                f"{what}: disks",
            )
            lab.equal(
                [(nic.name, nic.network) for nic in told.nics],
                [(nic.name, nic.network) for nic in asked.nics],
                f"{what}: NICs",
            )
            lab.equal(told.channels, asked.channels, f"{what}: channels")
            consoles = tuple(console.name for console in asked.consoles)
            lab.equal(told.consoles, consoles, f"{what}: consoles")
            lab.equal(told.owner, str(lab.hypervisor.owner), f"{what}: owner")
        await machine.delete(force=True)


@check(
    "configuration.guest",
    clause="the guest has what the specification asked for, by its own word",
    means=[Means.GUEST],
)
async def guest(lab: Bench) -> None:
    for vcpus, memory in lab.profile.sizes:
        machine = await lab.run(cpus=vcpus, memory=memory)
        seen = lab.guest(machine)
        what = f"the guest's view of {vcpus} vCPUs and {memory >> 20} MiB"
        lab.equal(await seen.vcpus(), vcpus, f"{what}: vCPUs")
        lab.equal(await seen.architecture(), machine.spec.architecture.value, f"{what}: uname -m")
        if (size := await lab.told(seen.memory(), "its memory")) is not None:
            lab.equal(size, memory, f"{what}: memory")
        if (name := await lab.told(seen.hostname(), "its name")) is not None:
            lab.equal(name, machine.name, f"{what}: name")
        lab.equal(
            [(disk.name, disk.size, disk.readonly) for disk in await seen.disks()],
            [(disk.name, disk.size, disk.readonly) for disk in machine.spec.disks],
            f"{what}: disks",
        )
        lab.equal(
            [(nic.name, nic.mac) for nic in await seen.nics()],
            [(nic.name, nic.mac) for nic in (await machine.info()).nics],
            f"{what}: NICs and their addresses",
        )
        await machine.delete(force=True)


@check(
    "configuration.given-mac",
    clause="a NIC has the MAC address that was asked for; one that was not has one of its own",
)
async def given_mac(lab: Bench) -> None:
    asked = "52:54:00:c0:ff:ee"
    machines = [
        await lab.create(
            nics=[
                Nic(name="first", network="none", mac=asked),
                Nic(name="second", network="none"),
            ]
        )
    ]
    machines.append(
        await lab.create(nics=[Nic(name="second", network="none")], seed=machines[0].spec.seed)
    )
    told = [{nic.name: nic.mac for nic in (await each.info()).nics} for each in machines]
    lab.equal(told[0]["first"], asked, "the MAC address that was asked for")
    macs = [mac for nics in told for mac in nics.values()]
    lab.equal(len(set(macs)), len(macs), "no two NICs have the same MAC address")


@check(
    "configuration.read-only",
    clause="a disk that was asked for read-only cannot be written by the guest",
    means=[Means.GUEST],
)
async def read_only(lab: Bench) -> None:
    machine = await lab.run(
        disks=[*lab.profile.spec.disks, Disk(name="fixed", size=16 * MIB, readonly=True)]
    )
    probe = lab.guest(machine)
    before = await probe.read_disk("fixed", 0, 512)
    try:
        await probe.write_disk("fixed", 0, lab.bytes())
        await probe.flush("fixed")
    except Exception as error:
        # However the guest says it: what counts is that the disk is as it was.
        lab.note(f"the guest was told: {error}")
    lab.equal(await probe.read_disk("fixed", 0, 512), before, "contents of the read-only disk")


@check(
    "configuration.numa",
    clause="the guest sees the NUMA nodes that were asked for",
    needs=[Capability.NUMA],
    means=[Means.GUEST],
)
async def numa(lab: Bench) -> None:
    nodes = [
        {"memory": 256 * MIB, "cpus": (0,)},
        {"memory": GIB - 256 * MIB, "cpus": (1, 2, 3)},
    ]
    machine = await lab.run(cpus=4, memory={"size": GIB, "nodes": nodes})
    asked = [(node["memory"], node["cpus"]) for node in nodes]
    told = [(node.memory, node.cpus) for node in (await machine.info()).nodes]
    lab.equal(told, asked, "NUMA nodes by info")
    seen = [(node.memory, node.cpus) for node in await lab.guest(machine).nodes()]
    lab.equal(seen, asked, "NUMA nodes by the guest's word")


@check(
    "configuration.pinning",
    clause="vCPUs are bound to the CPUs of the host that were asked for, at start and later",
    needs=[Capability.PINNING],
    means=[Means.GUEST],
)
async def pinning(lab: Bench) -> None:
    machine = await lab.run(cpus={"count": 2, "pinning": {1: (0,)}})
    for asked in ({1: (0,)}, {0: (0,)}, {0: (0,), 1: (0,)}, {}):
        if asked != {1: (0,)}:
            await machine.pin(asked)
        lab.equal((await machine.info()).pinning, asked, "pinning by info")
        bound = await lab.guest(machine).pinning()
        lab.equal({vcpu: bound.get(vcpu) for vcpu in asked}, asked, "pinning as it is")
        lab.equal(machine.spec.cpus.pinning, asked, "pinning in the specification")

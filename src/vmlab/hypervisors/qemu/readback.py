"""What only QEMU has to tell: accelerators, NICs, NUMA nodes, the places of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vmlab.hypervisors.base import NicInfo, NodeInfo
from vmlab.hypervisors.monitored.names import nic_backend, nic_device
from vmlab.hypervisors.monitored.readback import Vcpu
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.layout import memory_object
from vmlab.hypervisors.qemu.networks import parse_usernet
from vmlab.machine.spec import Nic


async def accelerator(emulator: Emulator) -> str:
    """The accelerator: kvm tells of itself, the others are told apart by the command line."""
    if (await emulator.execute("query-kvm"))["enabled"]:
        return "kvm"
    argv = emulator.process.argv
    return argv[argv.index("-accel") + 1]


async def nics(
    emulator: Emulator, specified: Sequence[Nic], linked: Callable[[str], bool]
) -> list[NicInfo]:
    """The NICs that are there, with the MAC addresses that they use and their forwards' ports."""
    filters = await emulator.execute("query-rx-filter")
    macs = {found["name"]: found["main-mac"] for found in filters}
    forwards: dict[str, list[tuple[str, int, int]]] = {}
    if any(nic.forwards for nic in specified):
        answer = await emulator.execute("human-monitor-command", {"command-line": "info usernet"})
        forwards = parse_usernet(answer)
    return [
        NicInfo(
            name=nic.name,
            network=nic.network,
            mac=macs[nic_device(nic.name)],
            link=linked(nic.name),
            forwards=tuple(forwards.get(nic_backend(nic.name), ())),
        )
        for nic in specified
        if nic_device(nic.name) in macs
    ]


async def nodes(emulator: Emulator, cpus: Sequence[Vcpu], modules: int = 0) -> list[NodeInfo]:
    """The NUMA nodes: memory objects in their order, and the vCPUs that say they belong there.

    The last `modules` objects came while the machine ran; they are of the first node.
    """
    backends = await emulator.execute("query-memdev")
    found = {str(backend["id"]): int(backend["size"]) for backend in backends}
    sizes = [found[memory_object(number)] for number in range(len(found))]
    if modules:
        sizes[0] += sum(sizes[-modules:])
        del sizes[-modules:]
    return [
        NodeInfo(
            memory=sizes[number],
            cpus=tuple(cpu.number for cpu in cpus if (cpu.node or 0) == number),
        )
        for number in range(len(sizes))
    ]


def pinning(pid: int, cpus: Sequence[Vcpu]) -> dict[int, tuple[int, ...]]:
    """vCPU -> CPUs of the host, of those that may not run wherever their process may."""
    everywhere = os.sched_getaffinity(pid)
    found = {}
    for cpu in cpus:
        allowed = os.sched_getaffinity(cpu.thread)
        if allowed != everywhere:
            found[cpu.number] = tuple(sorted(allowed))
    return found

"""Metrics: there, with their units, rising and standing still as they should."""

from __future__ import annotations

from collections.abc import Iterator

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.metrics import UNITS, MachineMetrics


def counters(usage: MachineMetrics) -> Iterator[tuple[str, float]]:
    """Every counter of `usage` by a name that tells which part it is of."""
    for name, (kind, _unit) in UNITS.items():
        if kind != "counter":
            continue
        part, _, field = name.rpartition(".")
        owners = getattr(usage, part) if part else usage
        for owner in owners if isinstance(owners, tuple) else (owners,):
            value = getattr(owner, field)
            whose = f"{name}[{owner.name}]" if isinstance(owners, tuple) else name
            if isinstance(value, tuple):
                yield from ((f"{whose}[{index}]", each) for index, each in enumerate(value))
            elif value is not None:
                yield whose, value


@check(
    "metrics.present",
    clause="metrics of a running machine have its memory in bytes, every disk and every NIC by "
    "name, one time for each vCPU that sum up, and a moment",
)
async def present(lab: Bench) -> None:
    machine = await lab.run(cpus=2)
    begun = lab.now()
    await lab.wait()
    usage = await machine.metrics()
    spec = machine.spec
    lab.equal(usage.memory.total_bytes, spec.memory.size, "memory.total_bytes")
    lab.equal([disk.name for disk in usage.disks], [disk.name for disk in spec.disks], "disks")
    lab.equal([nic.name for nic in usage.nics], [nic.name for nic in spec.nics], "NICs")
    if usage.cpu.per_vcpu_seconds:
        lab.equal(len(usage.cpu.per_vcpu_seconds), 2, "cpu.per_vcpu_seconds of two vCPUs")
        total = sum(usage.cpu.per_vcpu_seconds)
        lab.true(abs(usage.cpu.seconds - total) <= 0.01 + total / 100, "cpu.seconds is their sum")
    passed = lab.now() - begun
    lab.true(
        passed * 0.5 <= usage.uptime_seconds <= passed + lab.profile.slack,
        f"uptime_seconds is in seconds ({usage.uptime_seconds:g} after {passed:g})",
    )
    status = await machine.status()
    apart = abs(status.time - usage.time)
    lab.true(apart < lab.profile.slack, "metrics and status tell the time of one clock")


@check(
    "metrics.rise",
    clause="counters never fall while a machine runs, and rise with the work that is done",
    means=[Means.GUEST],
)
async def rise(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    disk = lab.scratch[0]
    first = await machine.metrics()
    last = dict(counters(first))
    for _round in range(3):
        await guest.write_disk(disk, 0, lab.bytes(65536))
        await guest.flush(disk)
        await guest.read_disk(disk, 0, 65536)
        await lab.wait()
        now = dict(counters(await machine.metrics()))
        fell = {name: (value, now[name]) for name, value in last.items() if now[name] < value}
        lab.equal(fell, {}, "counters that fell")
        last = now
    usage = await machine.metrics()
    before, after = (
        next(each for each in seen.disks if each.name == disk) for seen in (first, usage)
    )
    lab.true(
        after.written_bytes - before.written_bytes >= 3 * 65536,
        f"written_bytes rise by what was written ({after.written_bytes - before.written_bytes})",
    )
    lab.true(after.writes > before.writes, "writes rise")
    lab.true(usage.uptime_seconds > first.uptime_seconds, "uptime_seconds rise")
    lab.true(usage.cpu.seconds > first.cpu.seconds, "cpu.seconds rise")


@check(
    "metrics.paused",
    clause="the CPU time of a paused machine stands still",
    needs=[Capability.PAUSE, Capability.RESUME],
)
async def paused(lab: Bench) -> None:
    machine = await lab.run()
    await lab.wait()
    await machine.pause()
    before = (await machine.metrics()).cpu.seconds
    await lab.wait(10 * lab.profile.settle)
    used = (await machine.metrics()).cpu.seconds - before
    lab.true(used <= lab.profile.settle / 10, f"no CPU time is used while paused ({used:g} s)")

"""Deterministic execution: the same seed, the same run."""

from __future__ import annotations

from vmlab.conformance.bench import Bench
from vmlab.conformance.registry import Means, check
from vmlab.hypervisors.base import Hypervisor
from vmlab.machine.capabilities import Capability


@check(
    "deterministic.same-seed",
    clause="the same calls with the same seed give the same events, at the same times where the "
    "hypervisor has a clock of its own, and what the guest draws at random is the same; with "
    "another seed it is not",
    needs=[Capability.DETERMINISTIC],
    means=[Means.GUEST],
)
async def same_seed(lab: Bench) -> None:
    option = lab.profile.seed_option
    runs = []
    for seed in ("7", "7", "8"):
        hypervisor = lab.another(**({option: seed} if option else {}))
        runs.append(await _run(lab, hypervisor, int(seed)))
    events, drawn, _times = runs[0]
    lab.equal(runs[1][0], events, "events of two runs with one seed")
    if lab.profile.own_clock:
        apart = max(abs(one - two) for one, two in zip(runs[0][2], runs[1][2], strict=True))
        lab.true(apart < 1e-3, f"the times of two runs with one seed agree (apart by {apart:g} s)")
    lab.equal(runs[1][1], drawn, "what the guest drew in two runs with one seed")
    lab.true(runs[2][1] != drawn, "with another seed the guest draws something else")


_OTHERWISE = {"owner", "seconds"}
"""Data of events that differ between runs: whose they are, and times in floating point."""


async def _run(
    lab: Bench, hypervisor: Hypervisor, seed: int
) -> tuple[list[object], list[bytes], list[float]]:
    """The same little life of a machine: what was told of it, what its guest drew, and when."""
    spec = lab.profile.spec.with_changes(name="same", deterministic=True, seed=seed)
    machine = lab.keep(await hypervisor.create(spec))
    await machine.start()
    drawn = [await lab.profile.drawn(lab.guest(machine))]
    if lab.has(Capability.MEMORY_SNAPSHOT, Capability.RESTORE):
        await machine.snapshot("one")
        await machine.restore("one")
    await machine.restart()
    drawn.append(await lab.profile.drawn(lab.guest(machine)))
    await machine.stop()
    await machine.delete()
    told = await hypervisor.events()
    begun = told[0].time
    trace: list[object] = []
    for event in told:
        data = {key: value for key, value in event.data.items() if key not in _OTHERWISE}
        trace.append((event.type.value, event.operation, data))
    return trace, drawn, [event.time - begun for event in told]

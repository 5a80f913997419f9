"""Cancelling operations, and giving them too little time: a defined state, and nothing behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from vmlab.conformance.bench import Bench, names
from vmlab.conformance.drills import DRILLS, Drill, Stage, bring, stage
from vmlab.conformance.registry import check
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded
from vmlab.machine.sizes import MIB
from vmlab.machine.states import MachineState

S = MachineState
_FROM = {
    "start": S.STOPPED,
    "stop": S.RUNNING,
    "kill": S.RUNNING,
    "pause": S.RUNNING,
    "resume": S.PAUSED,
    "restart": S.RUNNING,
    "snapshot": S.RUNNING,
    "restore": S.RUNNING,
    "fork": S.RUNNING,
    "plug_disk": S.RUNNING,
    "plug_nic": S.RUNNING,
    "resize": S.RUNNING,
    "resize_disk": S.RUNNING,
    "pin": S.RUNNING,
    "inject": S.RUNNING,
    "info": S.RUNNING,
    "metrics": S.RUNNING,
    "channel": S.RUNNING,
    "console": S.RUNNING,
}
"""The state that each operation is interrupted from; deletion has a check of its own."""


_ASKS_GUEST = frozenset({"stop", "restart"})
"""Operations that ask the guest to power down, which cannot be taken back."""
EARLY = 0.8
"""How much earlier than asked an operation is cancelled, so that a quicker one is caught too."""

_LIMITED: Mapping[str, Callable[[Stage, float], Awaitable[object]]] = {
    "start": lambda ready, limit: ready.machine.start(timeout=limit),
    "stop": lambda ready, limit: ready.machine.stop(kill=False, timeout=limit),
    "kill": lambda ready, limit: ready.machine.kill(timeout=limit),
    "pause": lambda ready, limit: ready.machine.pause(timeout=limit),
    "resume": lambda ready, limit: ready.machine.resume(timeout=limit),
    "restart": lambda ready, limit: ready.machine.restart(timeout=limit),
    "restore": lambda ready, limit: ready.machine.restore(ready.snapshot, timeout=limit),
    "resize_disk": lambda ready, limit: ready.machine.resize_disk(
        ready.disk, 16 * MIB, timeout=limit
    ),
    "pin": lambda ready, limit: ready.machine.pin({0: (0,)}, timeout=limit),
    "info": lambda ready, limit: ready.machine.info(timeout=limit),
    "metrics": lambda ready, limit: ready.machine.metrics(timeout=limit),
}
"""Operations with a deadline; those that make something have theirs in `cancel.making`."""


async def _whole(lab: Bench, drill: Drill, ready: Stage, what: str) -> float:
    """Let the operation run to its end; the seconds that it took."""
    state = _FROM[drill.operation]
    await bring(lab, ready, state)
    lands = drill.lands(ready, state)
    begun = lab.now()
    await drill.call(lab, ready)
    took = lab.now() - begun
    await lab.is_in(ready.machine, lands, what)
    return took


def _drills(lab: Bench) -> list[Drill]:
    return [
        drill
        for name, drill in DRILLS.items()
        if name in _FROM and lab.has(*drill.needs(_FROM[name]))
    ]


async def _parts(lab: Bench, ready: Stage) -> tuple[object, ...]:
    """What an operation that is undone must not have changed."""
    told = await ready.machine.info()
    return (
        [disk.name for disk in told.disks],
        [nic.name for nic in told.nics],
        (told.vcpus, told.memory),
        sorted(await names(lab.hypervisor)),
        [snapshot.name for snapshot in await ready.machine.snapshots()],
    )


@check(
    "cancel.operation",
    clause="an operation that is cancelled raises CancelledError and leaves the machine in a "
    "lasting state, with what it had before, usable, wherever it was cancelled",
)
async def operation(lab: Bench) -> None:
    ready = await stage(lab, S.RUNNING)
    for drill in _drills(lab):
        name = drill.operation
        usual = await _whole(lab, drill, ready, f"{name} that is left alone")
        for share in lab.profile.cancel_points:
            what = f"{name} cancelled at {share:.0%}"
            await bring(lab, ready, _FROM[name])
            before = await _parts(lab, ready)
            call = _coroutine(lab, drill, ready)
            if await lab.interrupt(call, usual * share * EARLY, what):
                continue
            lab.true(ready.machine.state.is_stable, f"{what}: {ready.machine.state.value} lasts")
            await lab.is_in(ready.machine, ready.machine.state, what)
            lab.equal(await _parts(lab, ready), before, f"{what}: what the machine has")
            if name in _ASKS_GUEST:
                ready = await _left_to_guest(lab, ready, what)
            elif ready.machine.state is S.RUNNING:
                await lab.answers(ready.machine, what)
        await _whole(lab, drill, ready, f"{name} after it was cancelled")


async def _left_to_guest(lab: Bench, ready: Stage, what: str) -> Stage:
    """A guest that was asked to power down may do so although nobody waits for it any more.

    Returns:
        A machine whose guest was asked nothing.
    """
    machine = ready.machine
    try:
        if machine.state is S.RUNNING:
            await lab.answers(machine, what)
    except (ChannelClosed, DeadlineExceeded):
        await lab.until(lambda: lab.status_is(machine, S.STOPPED), f"{what}: the guest is off")
        lab.note(f"{what}: the guest powered down by itself")
    await machine.delete(force=True)
    return await stage(lab, S.RUNNING)


async def _coroutine(lab: Bench, drill: Drill, ready: Stage) -> object:
    return await drill.call(lab, ready)


@check(
    "cancel.making",
    clause="a machine whose making (create, create_from, fork) is cancelled or late never was: it "
    "is not listed and its name is free",
)
async def making(lab: Bench) -> None:
    hypervisor = lab.hypervisor
    origin = await lab.run()
    ways: dict[str, Callable[[str, float | None], Coroutine[Any, Any, Machine]]] = {
        "create": lambda name, limit: hypervisor.create(lab.spec(name=name), timeout=limit)
    }
    if lab.has(Capability.SNAPSHOT, Capability.RESTORE):
        taken = await origin.snapshot("origin")
        ways["create_from"] = lambda name, limit: hypervisor.create_from(taken, name, timeout=limit)
    if lab.has(Capability.FORK):
        ways["fork"] = lambda name, limit: origin.fork(name, timeout=limit)
    for way, make in ways.items():
        begun = lab.now()
        made = lab.keep(await make(lab.name(), None))
        usual = lab.now() - begun
        await made.delete(force=True)
        name = lab.name()
        for share in lab.profile.cancel_points:
            what = f"{way} cancelled at {share:.0%}"
            for made in await lab.interrupt(make(name, None), usual * share * EARLY, what):
                await lab.keep(made).delete(force=True)
            lab.equal(await names(hypervisor), [origin.name], f"machines after {way} cancelled")
        limit, begun = usual / 4, lab.now()
        try:
            made = lab.keep(await make(name, limit))
        except DeadlineExceeded as error:
            lab.equal(error.seconds, limit, f"{way} out of time: seconds in the error")
        else:
            late = lab.now() - begun > limit + lab.profile.lag
            lab.true(not late, f"{way} out of time: late, and nothing was said")
            lab.note(f"{way} was done in a quarter of the time that it took before")
            await made.delete(force=True)
        lab.equal(await names(hypervisor), [origin.name], f"machines after {way} out of time")
        made = lab.keep(await make(name, None))
        await made.delete(force=True)


@check(
    "cancel.deadline",
    clause="an operation that does not end in its time raises DeadlineExceeded with the time that "
    "it was given, not much later, and leaves the machine in a lasting state, usable",
)
async def deadline(lab: Bench) -> None:
    ready = await stage(lab, S.RUNNING)
    for drill in _drills(lab):
        name = drill.operation
        if name not in _LIMITED:
            continue
        usual = await _whole(lab, drill, ready, f"{name} that has the time it wants")
        limit = usual / 4
        await bring(lab, ready, _FROM[name])
        what = f"{name} with {limit:g} s"
        begun = lab.now()
        try:
            await _LIMITED[name](ready, limit)
        except DeadlineExceeded as error:
            lab.equal(error.seconds, limit, f"{what}: seconds in the error")
        else:
            late = lab.now() - begun > limit + lab.profile.lag
            lab.true(not late, f"{what}: late, and nothing was said")
            lab.note(f"{name} was done in a quarter of the time that it took before")
        lab.true(lab.now() - begun <= limit + lab.profile.slack, f"{what}: undone soon")
        await lab.is_in(ready.machine, ready.machine.state, what)
        lab.true(ready.machine.state.is_stable, f"{what}: {ready.machine.state.value} lasts")
        if name in _ASKS_GUEST:
            ready = await _left_to_guest(lab, ready, what)
        await _whole(lab, drill, ready, f"{name} after it was late")

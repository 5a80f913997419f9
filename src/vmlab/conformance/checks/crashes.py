"""Machines that die by themselves: at rest or under an operation, the state tells the truth."""

from __future__ import annotations

import asyncio

from vmlab.conformance.bench import Bench, of_type
from vmlab.conformance.drills import DRILLS, Drill, Stage, bring, stage
from vmlab.conformance.registry import Means, check
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import OperationFailed
from vmlab.machine.events import EventType
from vmlab.machine.states import OFF, MachineState


@check(
    "crash.idle",
    clause="a machine that dies is failed without being asked, an event tells it with the reason, "
    "what it had flushed is on its disks, and it starts again",
    means=[Means.CRASH, Means.GUEST],
)
async def idle(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    data = lab.bytes()
    await guest.write_disk(lab.scratch[0], 0, data)
    await guest.flush(lab.scratch[0])
    # When nothing is under way any more: an operation would look after the machine.
    await lab.crash(machine, lab.profile.settle)

    async def noticed() -> bool:
        return machine.state is MachineState.FAILED

    await lab.until(noticed, "a machine that died is failed without being asked")
    told = await of_type(lab.hypervisor, EventType.CRASHED, machine)
    lab.equal(len(told), 1, "events that tell of the crash")
    lab.true(bool(told[0].data.get("reason")), "the event has the reason")
    lab.true(bool((await machine.status()).reason), "status has the reason")
    await machine.start()
    found = await lab.guest(machine).read_disk(lab.scratch[0], 0, len(data))
    lab.equal(found, data, "what was flushed before the crash")


@check(
    "crash.under-operation",
    clause="a machine that dies under an operation is failed afterwards, the operation fails with "
    "OperationFailed, and the machine can be started again",
    means=[Means.CRASH],
)
async def under_operation(lab: Bench) -> None:
    ready = await stage(lab, MachineState.RUNNING)
    for drill in DRILLS.values():
        state = _from(drill)
        if state is None or not lab.has(*drill.needs(state)):
            continue
        await bring(lab, ready, state)
        usual = await _usual(lab, drill, ready)
        await bring(lab, ready, state)
        await lab.crash(ready.machine, usual * 0.2)
        await _die_under(lab, drill, ready)
    await ready.machine.delete(force=True)


_INTERRUPTED = ("pause", "resume", "snapshot", "restore", "fork", "plug_disk", "plug_nic", "resize")
"""Operations that need the machine to live on; restart and those that end it do not."""


def _from(drill: Drill) -> MachineState | None:
    """The live state that an operation is interrupted from; None for one that is left out."""
    if drill.operation not in _INTERRUPTED:
        return None
    return MachineState.PAUSED if drill.operation == "resume" else MachineState.RUNNING


async def _usual(lab: Bench, drill: Drill, ready: Stage) -> float:
    """Seconds that the operation takes when nothing happens."""
    begun = lab.now()
    await drill.call(lab, ready)
    return lab.now() - begun


async def _die_under(lab: Bench, drill: Drill, ready: Stage) -> None:
    machine, what = ready.machine, f"a machine that died under {drill.operation}"
    try:
        await drill.call(lab, ready)
    except OperationFailed:
        await lab.is_in(machine, MachineState.FAILED, what)
    else:
        # It was faster than the crash, or the crash came when it was done.
        lab.note(f"{drill.operation} ended before the machine died")
        await lab.until(
            lambda: lab.status_is(machine, MachineState.FAILED), f"{what} is failed in the end"
        )
    lab.true(machine.state in OFF, f"{what} can be started")
    await asyncio.sleep(0)
    if lab.has(Capability.GUEST_CHANNELS):
        await machine.start()
        await lab.answers(machine, what)

"""Which operations may begin in which state, and where each one lands.

Generated from the one table, `vmlab.machine.states`, times the states that can be reached.
"""

from __future__ import annotations

from vmlab.conformance.bench import Bench, Skipped
from vmlab.conformance.drills import (
    DRILLS,
    GUEST_AGREES,
    REACHABLE,
    Drill,
    Stage,
    allowed,
    stage,
)
from vmlab.conformance.registry import check
from vmlab.machine.errors import InvalidState, ResourceNotFound
from vmlab.machine.states import OPERATIONS, MachineState


async def _reach(lab: Bench, state: MachineState) -> Stage | None:
    """A machine in `state`, or None where there is no way to bring one there."""
    try:
        return await stage(lab, state)
    except Skipped as reason:
        lab.note(f"no machine can be brought into the state {state.value}: {reason}")
        return None


def _reachable(lab: Bench) -> list[MachineState]:
    """The lasting states that this hypervisor's capabilities let a machine have."""
    pause = DRILLS["pause"].needs(MachineState.RUNNING)
    return [state for state in REACHABLE if state is not MachineState.PAUSED or lab.has(*pause)]


@check(
    "states.legal",
    clause="every operation that the table allows in a state begins there and lands where it "
    "says; an unplug or a resize that the guest has to take part in may be refused while it is "
    "paused, with InvalidState",
)
async def legal(lab: Bench) -> None:
    for state in _reachable(lab):
        legal_here = [
            drill
            for drill in DRILLS.values()
            if allowed(drill.operation, state) and lab.has(*drill.needs(state))
        ]
        ready = await _reach(lab, state)
        if ready is None:
            continue
        for drill in legal_here:
            lands = drill.lands(ready, state)
            if ready.machine.state is not state:
                await ready.machine.delete(force=True)
                ready = await stage(lab, state)
            await _perform(lab, drill, ready, state)
            await lab.is_in(ready.machine, lands, f"{drill.operation} of a {state.value} machine")
        await ready.machine.delete(force=True)


async def _perform(lab: Bench, drill: Drill, ready: Stage, state: MachineState) -> None:
    try:
        await drill.call(lab, ready)
    except InvalidState as error:
        what = f"{drill.operation} of a {state.value} machine"
        agreed = (drill.operation in GUEST_AGREES, state)
        lab.equal(agreed, (True, MachineState.PAUSED), f"{what} may be refused")
        lab.equal(error.actual, state.value, f"{what}: the error's actual state")
        rest = {fitting.value for fitting in OPERATIONS[drill.operation] - {state}}
        lab.equal(set(error.expected), rest, f"{what}: the error's expected states")
        lab.note(f"{what} is refused: the guest has to take part in it")
    except ResourceNotFound:
        # It began; a machine that never ran has no fault that could be cleared.
        lab.equal(
            (drill.operation, ready.fault),
            ("clear_fault", "none"),
            f"{drill.operation} of a {state.value} machine finds what it works on",
        )


@check(
    "states.illegal",
    clause="an operation in a state that the table does not allow raises InvalidState with the "
    "expected and the actual state, and changes nothing",
)
async def illegal(lab: Bench) -> None:
    for state in _reachable(lab):
        ready = await _reach(lab, state)
        if ready is None:
            continue
        for drill in DRILLS.values():
            ends = drill.operation == "delete" and state is MachineState.DELETED
            if allowed(drill.operation, state) or ends or not lab.has(*drill.needs(state)):
                continue
            what = f"{drill.operation} of a {state.value} machine"
            error = await lab.refuses(InvalidState, drill.call(lab, ready), what)
            lab.equal(error.actual, state.value, f"{what}: the error's actual state")
            lab.equal(
                set(error.expected),
                {fitting.value for fitting in OPERATIONS[drill.operation]},
                f"{what}: the error's expected states",
            )
            await lab.is_in(ready.machine, state, f"after the refused {what}")

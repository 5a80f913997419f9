"""What has to hold after every check, whatever it did: order of states and events, nothing left.

An audit is not a check of its own but is made after each; what it finds is reported under its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from vmlab.conformance.bench import Bench
from vmlab.conformance.results import Finding
from vmlab.hypervisors.base import Hypervisor, Machine
from vmlab.machine.errors import VmlabError
from vmlab.machine.events import Event, EventType
from vmlab.machine.states import TRANSITIONS, MachineState

AUDITS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "audit.state": "when no operation is under way a machine's state lasts, and the machine "
        "and its hypervisor agree on it",
        "audit.numbers": "events are numbered from 1 without gaps, and their times never run back",
        "audit.transitions": "each state event begins where the last one ended and follows the "
        "table, and the last one is the machine's state",
        "audit.operations": "each operation that was announced has one end, and none begins on a "
        "machine while another is under way",
        "audit.deletion": "every machine can be deleted by force, whatever was done to it",
        "audit.close": "a hypervisor whose machines are deleted closes without complaint and "
        "ends those who follow its events",
        "audit.tasks": "no task is left on the event loop after close",
        "audit.processes": "no process is left after close",
        "audit.sockets": "no socket is left open after close, listening or not",
        "audit.descriptors": "no file, pipe or device is left open after close",
        "audit.threads": "no thread is left running after close",
        "audit.files": "no file is left under the directory of a run that was closed, nor under "
        "the directory for temporary files",
    }
)
"""Every audit with the clause of the contract that it proves."""

_ENDS: Final = {EventType.OPERATION_FINISHED, EventType.OPERATION_FAILED}


async def audit_states(machines: Sequence[Machine]) -> Iterator[Finding]:
    """Machines that are in no lasting state, or whose hypervisor says something else."""
    found = []
    for machine in machines:
        state = machine.state
        if not state.is_stable:
            found.append(_finding("audit.state", machine, "a state that lasts", state.value))
            continue
        try:
            said = (await machine.status()).state
        except VmlabError as error:
            found.append(_finding("audit.state", machine, "an answer to status", str(error)))
            continue
        if said is not machine.state:
            found.append(_finding("audit.state", machine, machine.state.value, said.value))
    return iter(found)


def _finding(audit: str, machine: Machine, expected: str, actual: str) -> Finding:
    return Finding(audit, f"{AUDITS[audit]} (machine {machine.name!r})", expected, actual)


def audit_events(events: Sequence[Event], machines: Sequence[Machine]) -> Iterator[Finding]:
    """What is wrong with the events of one hypervisor that has been used from its beginning."""
    yield from _numbers(events)
    yield from _transitions(events, {machine.id: machine for machine in machines})
    yield from _operations(events)


def _numbers(events: Sequence[Event]) -> Iterator[Finding]:
    time = float("-inf")
    for position, event in enumerate(events, 1):
        if event.sequence != position:
            yield Finding(
                "audit.numbers", "a gap in the events", str(position), str(event.sequence)
            )
            return
        if event.time < time:
            yield Finding(
                "audit.numbers",
                f"event {position} is older than the one before",
                f"at least {time}",
                str(event.time),
            )
            return
        time = event.time


def _transitions(events: Sequence[Event], machines: Mapping[str, Machine]) -> Iterator[Finding]:
    states: dict[str, str] = {}
    for event in events:
        machine = event.machine or ""
        if event.type in {EventType.CREATED, EventType.ADOPTED}:
            states[machine] = str(event.data.get("state", MachineState.CREATED.value))
        if event.type is not EventType.STATE:
            continue
        old, new = str(event.data["from"]), str(event.data["to"])
        # A machine has states while it is being made: its first event tells the first one.
        before = states.setdefault(machine, old)
        if old != before:
            yield Finding(
                "audit.transitions", f"event {event.sequence} does not follow", before, old
            )
        if MachineState(new) not in TRANSITIONS[MachineState(old)]:
            allowed = ", ".join(sorted(state.value for state in TRANSITIONS[MachineState(old)]))
            yield Finding("audit.transitions", f"from {old} there is no way", allowed, new)
        states[machine] = new
    for id_, known in machines.items():
        if known.state.value != states.get(id_):
            yield Finding(
                "audit.transitions",
                f"the last state event of machine {known.name!r} is not its state",
                known.state.value,
                str(states.get(id_, "no event at all")),
            )


def _operations(events: Sequence[Event]) -> Iterator[Finding]:
    under_way: dict[str | None, str | None] = {}
    for event in events:
        if event.type is EventType.OPERATION_STARTED:
            if event.machine in under_way:
                yield Finding(
                    "audit.operations",
                    "operations on one machine are interleaved",
                    f"the end of {under_way[event.machine]}",
                    f"the beginning of {event.operation}",
                )
            under_way[event.machine] = event.operation
        elif event.type in _ENDS:
            if under_way.get(event.machine) == event.operation:
                del under_way[event.machine]
            else:
                yield Finding(
                    "audit.operations",
                    f"{event.operation} ended",
                    "one beginning and one end",
                    "an end without a beginning",
                )
    for machine, operation in under_way.items():
        yield Finding("audit.operations", f"{operation} of {machine} never ended", "an end", "none")


async def delete_all(machines: Sequence[Machine], patience: float) -> list[Finding]:
    """Delete the machines by force; those that cannot be are findings."""
    found = []
    for machine in machines:
        try:
            async with asyncio.timeout(patience):
                await machine.delete(force=True)
        except (VmlabError, TimeoutError) as error:
            found.append(_finding("audit.deletion", machine, "deleted", f"{error}"))
    return found


async def still_listed(hypervisor: Hypervisor) -> list[Finding]:
    """Machines that the hypervisor lists although all were deleted."""
    return [
        _finding("audit.deletion", machine, "no longer listed", machine.state.value)
        for machine in await hypervisor.list()
    ]


async def close(bench: Bench, hypervisor: Hypervisor) -> list[Finding]:
    """Close a hypervisor; complaints are findings."""
    follower = asyncio.ensure_future(_follow(hypervisor))
    await asyncio.sleep(0)
    found = []
    try:
        async with asyncio.timeout(bench.profile.patience):
            await hypervisor.close()
    except (VmlabError, TimeoutError) as error:
        found.append(Finding("audit.close", AUDITS["audit.close"], "closed", f"{error}"))
    done, _ = await asyncio.wait({follower}, timeout=bench.profile.patience)
    if not done:
        follower.cancel()
        await asyncio.wait({follower})
        message = "those who follow the events are left waiting"
        found.append(Finding("audit.close", message, "the end of the events", "nothing"))
    return found


async def _follow(hypervisor: Hypervisor) -> None:
    async for _event in hypervisor.subscribe():
        """Each event is taken; only the end of them matters."""


async def audit_tasks() -> list[Finding]:
    """Tasks on this loop other than the caller's."""
    for _round in range(5):
        # What was cancelled gets the chance to end.
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    return [
        Finding("audit.tasks", AUDITS["audit.tasks"], "none", task.get_name() + f" {task!r}")
        for task in left
    ]

"""Machines that are not what the store says, machines and processes that it does not know."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vmlab.machine.states import OFF, MachineState
from vmlab.manager.documents import Severity
from vmlab.manager.networks.names import SWITCH
from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.known import Known, KnownMachine
from vmlab.manager.observer.seen import Seen, SeenMachine, SeenProcess
from vmlab.manager.requests import Policy

__all__ = ["orphan_machine", "orphan_process", "process_subject", "state_mismatch"]

_NAME = re.compile(r"m-[0-9a-f]{12}")
_NEVER_THERE = frozenset({MachineState.DELETING, MachineState.DELETED})


def doing(state: MachineState) -> str:
    """What a machine does, where two states that mean the same to a person are one."""
    return "off" if state in OFF else state.value


def state_mismatch(known: Known, seen: Seen) -> Iterator[Difference]:
    """Machines that do something else than the store says, both ways, and those that are gone."""
    for machine in known.machines:
        found = seen.placed.get((machine.host, machine.at))
        if found is not None and found.state is machine.state:
            continue  # as of nearly all of them, and there may be thousands
        if f"host:{machine.host}" not in seen.looked or machine.state in _NEVER_THERE:
            continue
        if found is None:
            # One that failed may be gone: it can be deleted, which is what is left to do.
            if machine.state is not MachineState.FAILED:
                yield _gone(machine)
        elif found.state.is_stable and doing(found.state) != doing(machine.state):
            yield _differs(machine, found)


def _gone(machine: KnownMachine) -> Difference:
    return Difference(
        code="machine-state-mismatch",
        severity="critical",
        subject=machine.id,
        name=machine.name,
        message=f"machine {machine.name!r} is {machine.state} in the store, "
        f"and host {machine.host!r} does not have it",
        hint="adopt marks it as failed; then it can be deleted",
        source=f"host:{machine.host}",
        evidence={"stored": machine.state.value, "seen": None, "host": machine.host},
        touches=frozenset({machine.id}),
        actions=("adopt",),
    )


def _differs(machine: KnownMachine, found: SeenMachine) -> Difference:
    wants_live = machine.wanted != "stopped"
    lost = wants_live and found.state in OFF
    severity: Severity = "error" if lost else "warning"
    reason = f" ({found.reason})" if found.reason else ""
    known_now = found.state is not MachineState.UNKNOWN
    actions: tuple[Policy, ...] = ("adopt", "reconcile") if known_now else ()
    return Difference(
        code="machine-state-mismatch",
        severity=severity,
        subject=machine.id,
        name=machine.name,
        message=f"machine {machine.name!r} is {machine.state} in the store "
        f"and {found.state} in the world{reason}",
        hint=f"reconcile brings it to {machine.wanted}, adopt writes {found.state} into the store"
        if known_now
        else "its hypervisor does not answer for it: look at that, or kill the machine",
        source=f"host:{machine.host}",
        evidence={
            "stored": machine.state.value,
            "seen": found.state.value,
            "wanted": machine.wanted,
            "reason": found.reason,
            "host": machine.host,
        },
        touches=frozenset({machine.id}),
        actions=actions,
    )


def orphan_machine(known: Known, seen: Seen) -> Iterator[Difference]:
    """Machines of the manager's at a hypervisor that the store does not know."""
    for found in seen.machines:
        if (found.host, found.at) in known.placed or not found.state.is_stable:
            continue
        # One of the store's that is on its way to another host is what its operation is about.
        elsewhere = known.named.get(found.at)
        # A machine of the store's is found by its name, which is made of its id.
        ours = _NAME.fullmatch(found.at) is not None
        actions: tuple[Policy, ...] = ("quarantine", "reconcile")
        yield Difference(
            code="orphan-machine",
            severity="warning",
            subject=f"{found.host}/{found.id}",
            name=found.at,
            message=f"host {found.host!r} has a machine {found.at!r} ({found.state}) "
            "that the store does not know",
            hint=("adopt takes it in; " if ours else "")
            + "reconcile deletes it with its disks, and wants its name typed",
            source=f"host:{found.host}",
            evidence={
                "host": found.host,
                "machine": found.id,
                "at": found.at,
                "seen": found.state.value,
            },
            touches=frozenset({found.at} | ({elsewhere.id} if elsewhere is not None else set())),
            actions=("adopt", *actions) if ours else actions,
        )


def orphan_process(known: Known, seen: Seen) -> Iterator[Difference]:
    """Processes of the manager's whose machine or network is not there, or is off."""
    if "processes" not in seen.looked or not seen.hosts_looked_at(known.hosts):
        return
    states = {machine.id: machine for machine in seen.machines}
    for process in seen.processes:
        if process.network is not None:
            shared = process.network == SWITCH and any(each.vlan for each in known.networks)
            if not shared and process.network not in known.network and not _young(process, known):
                yield _orphan(process, f"network {process.network}, which the store has not")
            continue
        if process.machine is None or _young(process, known):
            continue
        owner = states.get(process.machine)
        if owner is None:
            yield _orphan(process, f"machine {process.machine}, which no hypervisor has")
        elif owner.state in OFF:
            stored = known.placed.get((owner.host, owner.at))
            touches = frozenset({stored.id}) if stored is not None else frozenset[str]()
            yield _orphan(process, f"machine {owner.at}, which is {owner.state}", touches)


def _young(process: SeenProcess, known: Known) -> bool:
    """Whether it may be what an operation under way has begun."""
    return known.since is not None and process.began >= known.since


def process_subject(process: SeenProcess) -> str:
    """What findings about a process are about: numbers of processes come again."""
    return f"process {process.pid} of {process.start}"


def _orphan(process: SeenProcess, whose: str, touches: frozenset[str] = frozenset()) -> Difference:
    program = process.argv[0].rsplit("/", 1)[-1] if process.argv else "?"
    return Difference(
        code="orphan-process",
        severity="warning",
        subject=process_subject(process),
        name=f"{program} ({process.pid})",
        message=f"process {process.pid} ({program}) is for {whose}",
        hint="reconcile ends it, quarantine stops it with SIGSTOP",
        source="processes",
        evidence={
            "pid": process.pid,
            "start": process.start,
            "began": process.began.isoformat(),
            "argv": list(process.argv[:64]),
            "machine": process.machine,
            "network": process.network,
        },
        touches=touches | ({process.network} if process.network else frozenset()),
        actions=("reconcile", "quarantine"),
    )

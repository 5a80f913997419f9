"""The emergency stop: kill everything of a host, of a label, or all, now, and say what was done.

It waits for no worker and for nobody's turn: what is queued for a machine is cancelled, what is
under way is interrupted, and the machine is killed meanwhile. It asks the hypervisors and not the
store alone, so that machines are killed, too, of which the store knows nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Machine
from vmlab.machine.errors import OperationFailed, VmlabError
from vmlab.machine.states import LIVE, MachineState
from vmlab.manager.operator.handler import Handler, PlannedStep, Target, key, register
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.operator.journal import Work
from vmlab.manager.operator.wiring import ended
from vmlab.manager.requests import EmergencyStop
from vmlab.manager.store.changes import set_machine_state
from vmlab.manager.store.queries import find_host
from vmlab.manager.store.tables import MachineRow

__all__ = ["EmergencyHandler"]

_HOLDING: Final = frozenset(state.value for state in LIVE | {MachineState.UNKNOWN})
_AT_ONCE: Final = 32
_SECONDS: Final = 60.0
"""Time that one host has to say what runs on it, and that one machine has to be killed."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A machine of the store's that is meant."""

    id: str
    name: str
    host: str
    live: bool
    busy: bool


@dataclass(slots=True)
class _Done:
    """What was done, by machines' names."""

    stopped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@register
class EmergencyHandler(Handler[EmergencyStop]):
    """Kills every live machine of a host, of a label or all."""

    kind = "emergency.stop"
    immediate = True
    seconds = 600.0

    def check(self, session: Session, request: EmergencyStop) -> Target:
        if request.host is not None:
            find_host(session, request.host)
        return Target(None, _scope(request))

    def plan(self, session: Session, request: EmergencyStop) -> Sequence[PlannedStep]:
        live = [machine for machine in _meant(session, request) if machine.live or machine.busy]
        return [
            PlannedStep(
                f"kill-{machine.id[:12]}",
                f"kill {machine.name!r} on host {machine.host!r}"
                + (", after cancelling what is under way with it" if machine.busy else ""),
            )
            for machine in live
        ]

    async def run(self, work: Work[EmergencyStop]) -> dict[str, Any] | None:
        request = work.request
        async with work.step("kill", f"kill {_scope(request)}") as step:
            if not step.done_before:
                done = await self._kill_all(work)
                step.data.update({"stopped": sorted(done.stopped), "failed": done.failed})
        failed: dict[str, str] = step.data.get("failed", {})
        if failed:
            names = "; ".join(f"{name}: {why}" for name, why in sorted(failed.items()))
            raise OperationFailed(
                f"{len(failed)} of {len(failed) + len(step.data['stopped'])} machines could not "
                f"be stopped: {names}",
                hint="the others are stopped; `vmlab list` shows what each machine does",
            )
        return {"stopped": step.data.get("stopped", []), "scope": _scope(request)}

    async def _kill_all(self, work: Work[EmergencyStop]) -> _Done:
        request = work.request
        known = await work.database.read(_meant, request)
        hosts = [request.host] if request.host is not None else list(self.manager.hosts.names)
        running, silent = await self._running(hosts)
        done = _Done()
        turns = asyncio.Semaphore(_AT_ONCE)
        meant = {machine_name(machine.id): machine for machine in known}

        async def one(machine: _Known) -> None:
            async with turns:
                found = running.get((machine.host, machine_name(machine.id)))
                await self._stop(work, machine, found, silent.get(machine.host), done)

        async def stray(name: str, machine: Machine) -> None:
            async with turns:
                await self._kill_stray(name, machine, done)

        wanted = [
            one(machine)
            for machine in known
            if machine.live
            or machine.busy
            or _lives(running.get((machine.host, machine_name(machine.id))))
        ]
        # Those that the store does not know have no labels.
        strays = [
            stray(name, machine)
            for (_, name), machine in running.items()
            if request.label is None and name not in meant and _lives(machine)
        ]
        await asyncio.gather(*wanted, *strays)
        return done

    async def _running(
        self, hosts: Sequence[str]
    ) -> tuple[Mapping[tuple[str, str], Machine], Mapping[str, str]]:
        """The machines of hosts by host and name; and why some hosts do not say."""
        found: dict[tuple[str, str], Machine] = {}
        silent: dict[str, str] = {}

        async def ask(host: str) -> None:
            try:
                async with asyncio.timeout(_SECONDS):
                    hypervisor = await self.manager.hosts.get(host)
                    for machine in await hypervisor.list():
                        found[host, machine.name] = machine
            except (VmlabError, OSError) as error:
                silent[host] = str(error) or f"it did not answer within {_SECONDS:g} s"

        await asyncio.gather(*map(ask, hosts))
        return found, silent

    async def _stop(
        self,
        work: Work[EmergencyStop],
        machine: _Known,
        found: Machine | None,
        silent: str | None,
        done: _Done,
    ) -> None:
        """Kill one machine of the store's, whatever is under way with it."""
        try:
            if found is not None:
                # At once: what is under way with it is aborted by that.
                await _kill(found)
            async with (
                asyncio.timeout(_SECONDS),
                self.manager.operator.alone(key("machine", machine.id)),
            ):
                if found is not None:
                    await _kill(found)
                if silent is not None:
                    raise OperationFailed(f"its host does not answer: {silent}")
                await work.database.write(_say_stopped, machine.id, work.operation_id)
                await ended(self.manager, machine.id)
        except (VmlabError, TimeoutError) as error:
            done.failed[machine.name] = str(error) or f"it took more than {_SECONDS:g} s"
        else:
            done.stopped.append(machine.name)

    async def _kill_stray(self, name: str, machine: Machine, done: _Done) -> None:
        """Kill a machine that the store does not know."""
        try:
            await _kill(machine)
        except VmlabError as error:
            done.failed[name] = str(error)
        else:
            done.stopped.append(name)


def _lives(machine: Machine | None) -> bool:
    return machine is not None and (machine.state.is_live or machine.state is MachineState.UNKNOWN)


async def _kill(machine: Machine) -> None:
    if _lives(machine):
        await machine.kill(timeout=_SECONDS)


def _say_stopped(session: Session, machine_id: str, operation: str) -> None:
    """A machine that was live is stopped now; one that never ran is as it was."""
    row = session.get(MachineRow, machine_id)
    if row is None:
        return
    row.wanted = "stopped"
    if row.state in _HOLDING:
        set_machine_state(
            session, row, MachineState.STOPPED, reason="emergency stop", operation=operation
        )


def _scope(request: EmergencyStop) -> str:
    """What is meant, in words."""
    parts = []
    if request.host is not None:
        parts.append(f"of host {request.host!r}")
    if request.label is not None:
        parts.append(f"with the label {request.label!r}")
    return " ".join(["all machines", *parts])


def _meant(session: Session, request: EmergencyStop) -> list[_Known]:
    """The machines of the store that are meant, by name."""
    query = select(
        MachineRow.id,
        MachineRow.name,
        MachineRow.host,
        MachineRow.state,
        MachineRow.labels,
        MachineRow.operation_id,
    ).order_by(MachineRow.name)
    if request.host is not None:
        query = query.where(MachineRow.host == request.host)
    return [
        _Known(id_, name, host, state in _HOLDING, operation is not None)
        for id_, name, host, state, labels, operation in session.execute(query)
        if _labelled(labels, request.label)
    ]


def _labelled(labels: Mapping[str, str], wanted: str | None) -> bool:
    if wanted is None:
        return True
    name, given, value = wanted.partition("=")
    return name in labels and (not given or labels[name] == value)

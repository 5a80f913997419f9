"""Processes, locks and reservations that nobody needs any more: ended, removed, let go."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from vmlab.hypervisors.locks import FileLock
from vmlab.hypervisors.process_identity import ProcessIdentity, send_signal
from vmlab.hypervisors.processes import collect
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import MachineNotFound, OperationFailed, VmlabError
from vmlab.machine.states import OFF
from vmlab.manager.documents import ENDED
from vmlab.manager.observer.repairs.repair import Facts, Repair, repair
from vmlab.manager.operator.handler import key
from vmlab.manager.operator.journal import Work
from vmlab.manager.store.changes import Conflict
from vmlab.manager.store.tables import NetworkRow, OperationRow, ReservationRow

__all__: list[str] = []


# ------------------------------------------------------------------------ processes


class _OnProcess(Repair):
    """What repairs of processes share: they have to be still the same, and still nobody's."""

    code = "orphan-process"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        network = facts.evidence.get("network")
        if network is not None and session.get(NetworkRow, network) is not None:
            raise _belongs(facts, f"network {network}")
        return frozenset({key("process", str(facts.evidence["pid"]))})

    async def prepare(self, facts: Facts) -> None:
        machine = facts.evidence.get("machine")
        if machine is None:
            return
        for name in self.manager.hosts.names:
            hypervisor = self.manager.hosts.opened(name)
            if hypervisor is None:
                continue
            try:
                found = await hypervisor.get(str(machine))
                state = (await found.status()).state
            except MachineNotFound:
                continue
            if state not in OFF:
                raise _belongs(facts, f"machine {found.name}, which is {state}")

    @staticmethod
    def signal(facts: Facts, number: int) -> bool:
        """Send that very process a signal; False if it has ended.

        Raises:
            OperationFailed: it is somebody else's.
        """
        process = _identity(facts)
        try:
            return send_signal(process, number)
        except PermissionError as error:
            raise OperationFailed(
                f"process {process.pid} cannot be sent a signal: {error.strerror}",
                hint="it runs as another user: end it yourself",
                operation="finding.repair",
            ) from error


def _identity(facts: Facts) -> ProcessIdentity:
    return ProcessIdentity(int(facts.evidence["pid"]), int(facts.evidence["start"]))


def _belongs(facts: Facts, whose: str) -> Conflict:
    return Conflict(
        f"process {facts.evidence['pid']} belongs to {whose} by now",
        hint="there is nothing to repair",
    )


@repair
class EndProcess(_OnProcess):
    """The process is ended."""

    action = "reconcile"
    text = "end the process"

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async with work.step("reconcile", self.text) as step:
            if not step.done_before:
                if not self.signal(facts, signal.SIGKILL):
                    step.skip("it has ended already")
                elif await done_in_thread(collect, [_identity(facts)]):
                    raise OperationFailed(
                        f"process {facts.evidence['pid']} was killed and does not end",
                        hint="it waits for the kernel: look at the host's log",
                        operation="finding.repair",
                    )
        return None


@repair
class StopProcess(_OnProcess):
    """The process is stopped (SIGSTOP)."""

    action = "quarantine"
    text = "stop the process (SIGSTOP)"

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async def go_on() -> None:
            self.signal(facts, signal.SIGCONT)

        async with work.step("quarantine", self.text) as step:
            work.on_undo(step, go_on)
            if not step.done_before and not self.signal(facts, signal.SIGSTOP):
                step.skip("it has ended already")
        return {"pid": facts.evidence["pid"]}

    async def undo(self, work: Work[Any], facts: Facts, before: Mapping[str, Any]) -> None:
        async with work.step("continue", "let the process run on (SIGCONT)") as step:
            if not step.done_before:
                self.signal(facts, signal.SIGCONT)


# ------------------------------------------------------------------------ locks


@repair
class LetGo(Repair):
    """What nobody waits for is let go."""

    code = "stale-lock"
    action = "reconcile"
    text = "let go of what nobody waits for"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        operation = facts.evidence.get("operation")
        if operation is not None:
            state = session.scalar(select(OperationRow.state).where(OperationRow.id == operation))
            if state is not None and state not in ENDED:
                raise Conflict(
                    f"operation {operation} is {state}", hint="there is nothing to repair"
                )
        return frozenset({key("lock", facts.subject)})

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async with work.step("reconcile", self.text) as step:
            if step.done_before:
                return None
            reservation = facts.evidence.get("reservation")
            if reservation is not None:
                step.also(_drop, str(reservation))
            else:
                await done_in_thread(partial(_remove, Path(facts.evidence["path"])))
        return None


def _drop(session: Session, reservation: str) -> None:
    session.execute(delete(ReservationRow).where(ReservationRow.id == reservation))


def _remove(path: Path) -> None:
    """Remove a lock file that nobody holds: its lock is taken first.

    Raises:
        VmlabError: somebody holds it by now, or it cannot be removed.
    """
    try:
        lock = FileLock.take(path, create=False)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OperationFailed(f"{path}: {error.strerror}", operation="finding.repair") from error
    if lock is None:
        raise VmlabError(f"{path} is held by somebody now", hint="there is nothing to repair")
    try:
        path.unlink()
    finally:
        lock.release()

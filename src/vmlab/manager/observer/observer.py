"""The observer: looks at once where something happened, and at everything every few seconds.

A difference is a finding only if two looks show it and nothing was under way with what it is about,
before, meanwhile and after. Findings are only told of unless a policy says more; what a policy does
is an operation like any other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.hypervisors.base import Hypervisor
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import VmlabError
from vmlab.machine.events import Event, EventType
from vmlab.machine.states import OFF, MachineState
from vmlab.manager.documents import FindingDocument
from vmlab.manager.observer.automatic import Automatic
from vmlab.manager.observer.checks import Thresholds, differences
from vmlab.manager.observer.checks.machines import process_subject
from vmlab.manager.observer.collect.hypervisors import Turns
from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.eyes import Eyes, Scope
from vmlab.manager.observer.findings import Open, Raised, documents, note, open_findings
from vmlab.manager.observer.known import Known, KnownMachine
from vmlab.manager.observer.policies import policy_for
from vmlab.manager.observer.seen import Seen
from vmlab.manager.operator.hosts import machine_name
from vmlab.manager.store.failures import EventsGone
from vmlab.manager.store.tables import MachineRow, now

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["Observer", "Pace"]

_LOG: Final = logging.getLogger(__name__)
_BAD: Final = frozenset({EventType.CRASHED, EventType.GUEST_PANIC})
_NOTED_AT_ONCE: Final = 200
"""Findings that are written down in one transaction."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often and how much the observer looks; times are seconds.

    Attributes:
        settle: Between the two looks that a finding needs.
        asked: Machines that are asked themselves in one sweep; all of them have their turn.
        guests: Guests that are asked in one round.
        guest_every: Between two rounds.
        guest_answers: That a guest has to answer.
        boots: That a guest has from its machine's start before it has to answer at all.
        share: Most of the time that sweeps may take up.
    """

    settle: float = 0.5
    asked: int = 1000
    guests: int = 32
    guest_every: float = 30.0
    guest_answers: float = 15.0
    boots: float = 300.0
    share: float = 0.2


class Observer:
    """Looks after one manager's store and world.

    Args:
        manager: Whose.
        pace: How often and how much it looks.
        thresholds: From where on something is worth telling.
    """

    def __init__(
        self,
        manager: Manager,
        *,
        pace: Pace | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        self._manager = manager
        self.pace = pace or Pace()
        self.thresholds = thresholds or Thresholds()
        self.sweeps = 0
        """Sweeps that were finished."""
        self.seconds = 0.0
        """Seconds that the last one took."""
        self._eyes = Eyes(manager, self.pace.guest_answers)
        self._automatic = Automatic(manager)
        self._turns = Turns()
        self._guest_turns = Turns()
        # By machine of the store's, since when it runs in the boot in which its guest answered.
        self._answered: dict[str, object] = {}
        self._concerned: frozenset[str] = frozenset()
        self._attention: set[str] = set()
        self._called = asyncio.Event()
        self._looking = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._followed: dict[str, asyncio.Task[None]] = {}

    # ------------------------------------------------------------------ its life

    async def start(self) -> None:
        """Look from now on, until `close`."""
        for run in (self._sweep_on, self._attend, self._ask_guests, self._follow_store):
            self._tasks.append(asyncio.create_task(run(), name=f"observer{run.__name__}"))

    async def close(self) -> None:
        """Look no more."""
        tasks = [*self._tasks, *self._followed.values()]
        self._tasks.clear()
        self._followed.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    @property
    def running(self) -> bool:
        """Whether it looks, as it does from `start` to `close`."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def sweep(self, *, asked: int | None = None) -> list[FindingDocument]:
        """Look at everything now; all findings that are open.

        Args:
            asked: How many machines are asked themselves, in turns, and no guests; None is all
                machines and all guests.

        Raises:
            VmlabError: the store does not answer.
        """
        await self._sweep(asked)
        return await self._manager.database.read(documents)

    # ------------------------------------------------------------------ looking

    async def _sweep(self, asked: int | None) -> None:
        begun = time.monotonic()
        async with self._looking:
            known = await self._eyes.know(Scope())
            if asked is None:
                scope = Scope(guests=frozenset(self._guests_due(known)))
            else:
                names = self._turns.next((machine.at for machine in known.machines), asked)
                scope = Scope(ask=frozenset(names))
            await self._examine(known, scope)
        self.sweeps += 1
        self.seconds = time.monotonic() - begun
        self._follow_hypervisors()

    async def _examine(self, known: Known, scope: Scope) -> None:
        """Look at what `scope` says, twice where something is different, and write it down."""
        seen = await self._eyes.see(known, scope)
        self._remember(known, seen)
        candidates = await done_in_thread(self._candidates, known, seen)
        about = None
        if scope.machines is not None:
            # A look at one machine costs the same, however many findings there are of others.
            about = scope.machines | {difference.subject for difference in candidates}
        open_ = await self._manager.database.read(open_findings, about)
        kept = {finding.key for finding in open_}
        new = [difference for difference in candidates if difference.key not in kept]
        confirmed = [difference for difference in candidates if difference.key in kept]
        if new:
            await asyncio.sleep(self.pace.settle)
            confirmed += await self._confirmed(new, known, scope)
        shown = {difference.key for difference in candidates}
        gone = {
            finding.id
            for finding in open_
            if finding.key not in shown and _is_over(finding, known, seen, scope)
        }
        raised = [self._with_policy(difference, known) for difference in confirmed]
        if not raised and not gone:
            return
        ids = await self._note(raised, sorted(gone), known.event)
        if scope.machines is None:
            left = await self._manager.database.read(open_findings)
            self._concerned = frozenset().union(*(finding.touches for finding in left))
        else:
            touched = (each.difference.touches for each in raised)
            self._concerned = self._concerned.union(*touched)
        if ids:
            await self._automatic.repair(ids)

    async def _note(self, raised: Sequence[Raised], gone: Sequence[str], event: int) -> list[str]:
        """As `findings.note`, in transactions that keep nobody else from writing for long."""
        ids: list[str] = []
        for first in range(0, max(len(raised), len(gone)), _NOTED_AT_ONCE):
            part = slice(first, first + _NOTED_AT_ONCE)
            ids += await self._manager.database.write(note, raised[part], gone[part], event=event)
        return ids

    def _candidates(self, known: Known, seen: Seen) -> list[Difference]:
        found: dict[tuple[str, str], Difference] = {}
        for difference in differences(known, seen, self.thresholds):
            # Two things wrong with one subject are told one after the other.
            found.setdefault(difference.key, difference)
        return list(found.values())

    async def _confirmed(
        self, new: Sequence[Difference], known: Known, scope: Scope
    ) -> list[Difference]:
        """Those of the differences that a second look shows as well."""
        names = {machine.id: machine.at for machine in known.machines}
        touched = frozenset().union(*(difference.touches for difference in new))
        about = {difference.subject for difference in new if difference.source.startswith("guest:")}
        second = replace(
            scope,
            ask=frozenset(names.get(id_, id_) for id_ in touched),
            guests=frozenset(about),
        )
        known = await self._eyes.know(second)
        seen = await self._eyes.see(known, second)
        shown = await done_in_thread(self._candidates, known, seen)
        again = {difference.key: difference for difference in shown}
        return [again[each.key] for each in new if each.key in again]

    def _with_policy(self, difference: Difference, known: Known) -> Raised:
        everywhere = self._manager.settings.findings
        return Raised(
            difference, policy_for(difference.code, difference.touches, known, everywhere)
        )

    # ------------------------------------------------------------------ every few seconds

    async def _sweep_on(self) -> None:
        """Sweep, and rest: at least as long as the settings say, longer where sweeps take long."""
        while True:
            await self._surely(self._paced_sweep)
            rest = self.seconds * (1 / self.pace.share - 1)
            await asyncio.sleep(max(self._manager.settings.sweep_seconds, rest))

    async def _paced_sweep(self) -> None:
        await self._sweep(self.pace.asked)

    async def _surely(self, look: Callable[[], Awaitable[object]]) -> None:
        """Look, whatever goes wrong: the next look may go well."""
        try:
            await look()
        except VmlabError as error:
            _LOG.warning("a look failed: %s", error)
        except Exception:
            _LOG.exception("a look failed")

    # ------------------------------------------------------------------ guests

    async def _ask_guests(self) -> None:
        while True:
            await asyncio.sleep(self.pace.guest_every)
            await self._surely(self._guest_round)

    async def _guest_round(self) -> None:
        scope = Scope(around=False, hypervisors=False)
        known = await self._eyes.know(scope)
        due = self._guest_turns.next(self._guests_due(known), self.pace.guests)
        if due:
            await self._examine(known, replace(scope, guests=frozenset(due)))

    def _guests_due(self, known: Known) -> Iterable[str]:
        """The machines whose guests should answer by now."""
        moment = now()
        for machine in known.machines:
            if not self._should_answer(machine) or machine.id in known.busy:
                continue
            if machine.started is None:
                continue
            booted = (moment - machine.started).total_seconds() >= self.pace.boots
            if booted or self._answered.get(machine.id) == machine.started:
                yield machine.id
            elif machine.simulated:
                yield machine.id  # it boots in no time

    def _should_answer(self, machine: KnownMachine) -> bool:
        return machine.answers and machine.state is MachineState.RUNNING

    def _remember(self, known: Known, seen: Seen) -> None:
        """Which guests have answered in which boot."""
        for guest in seen.guests:
            machine = known.machine.get(guest.machine)
            if guest.answered and machine is not None:
                self._answered[machine.id] = machine.started
        if len(self._answered) > 2 * len(known.machines) + 16:
            self._answered = {
                id_: since for id_, since in self._answered.items() if id_ in known.machine
            }

    # ------------------------------------------------------------------ where something happened

    def call(self, machines: Iterable[str]) -> None:
        """Have those machines of the store's looked at soon."""
        self._attention.update(machines)
        self._called.set()

    async def _attend(self) -> None:
        while True:
            await self._called.wait()
            self._called.clear()
            await self._surely(self._look_where_called)

    async def _look_where_called(self) -> None:
        machines = frozenset(self._attention)
        self._attention.clear()
        if not machines:
            return
        scope = Scope(machines=machines, around=False)
        async with self._looking:
            await self._examine(await self._eyes.know(scope), scope)

    async def _follow_store(self) -> None:
        """Look again at what findings are about when an operation on it has ended."""
        while True:
            try:
                async for event in self._manager.database.events.subscribe(None):
                    if event.kind != "operation.ended":
                        continue
                    # It may have opened a host.
                    self._follow_hypervisors()
                    target = event.data.get("target")
                    if target in self._concerned:
                        self.call([target])
                return
            except EventsGone:
                continue  # the next sweep sees what was missed

    def _follow_hypervisors(self) -> None:
        """Hear of what happens to machines by themselves, on every host that is open."""
        for name in self._manager.hosts.names:
            hypervisor = self._manager.hosts.opened(name)
            task = self._followed.get(name)
            if hypervisor is not None and self._tasks and (task is None or task.done()):
                # From the first event on: something may have happened before anybody listened.
                # Where events were lost, a sweep has just seen what came of them.
                since = 0 if task is None else None
                self._followed[name] = asyncio.create_task(
                    self._follow(hypervisor, since), name=f"observer-{name}"
                )

    async def _follow(self, hypervisor: Hypervisor, since: int | None) -> None:
        try:
            async for event in hypervisor.subscribe(since):
                # What an operation does is that operation's to write down, but not what befalls it.
                if event.machine is not None and (event.operation is None or event.type in _BAD):
                    await self._heard(event)
        except VmlabError as error:
            _LOG.info("events of %s are followed anew: %s", hypervisor.name, error)

    async def _heard(self, event: Event) -> None:
        ids = await self._manager.database.read(_machines_called, event.name or "")
        self.call(ids)


def _is_over(finding: Open, known: Known, seen: Seen, scope: Scope) -> bool:
    """Whether a finding that a look did not show can be said to be over."""
    if finding.touches & known.busy or _is_of_now(finding, known, seen):
        return False
    if finding.source in seen.looked:
        # A look at some machines says nothing about the others.
        return scope.machines is None or finding.subject in scope.machines
    kind, _, id_ = finding.source.partition(":")
    if scope.machines is not None:
        return False
    if kind == "host":
        return finding.code == "machine-state-mismatch" and finding.subject not in known.machine
    if kind in {"parts", "guest"}:
        # Nobody asks a machine any more that is gone, or a guest that does not run.
        machine = known.machine.get(id_)
        return machine is None or (kind == "guest" and machine.state in OFF)
    return False


def _is_of_now(finding: Open, known: Known, seen: Seen) -> bool:
    """Whether it is of a process or file that may be an operation's by its age: it says nothing."""
    if known.since is None:
        return False
    if finding.code == "orphan-process":
        return any(
            process.began >= known.since and process_subject(process) == finding.subject
            for process in seen.processes
        )
    return finding.code == "orphan-disk" and any(
        file.changed >= known.since and file.path.name == finding.subject for file in seen.files
    )


# ------------------------------------------------------------------------ transactions


def _machines_called(session: Session, name: str) -> list[str]:
    """The machines of the store's that have that name at their hypervisor."""
    _, _, digits = name.partition("-")
    if len(digits) != _DIGITS or not digits.isalnum():
        return []
    rows = session.scalars(
        select(MachineRow.id).where(MachineRow.id >= digits, MachineRow.id < digits + "g")
    )
    return [id_ for id_ in rows if machine_name(id_) == name]


_DIGITS: Final = 12
"""Digits of a machine's id in its name at its hypervisor."""

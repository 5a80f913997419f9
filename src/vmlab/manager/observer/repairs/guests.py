"""Guests made to answer again, and their clocks set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from vmlab.machine.faults import ClockJump
from vmlab.manager.observer.repairs.repair import Delegated, Facts, Repair, repair
from vmlab.manager.operator.handler import PlannedStep, key
from vmlab.manager.operator.journal import Work
from vmlab.manager.requests import RestartMachine
from vmlab.manager.store.queries import find_machine

__all__: list[str] = []


@repair
class RestartGuest(Repair):
    """The machine is restarted."""

    code = "guest-agent-unreachable"
    action = "reconcile"
    text = "restart the machine"

    def _delegated(self, facts: Facts) -> Delegated:
        request = RestartMachine(machine=facts.subject, graceful=False)
        return Delegated(self.manager, request, facts.subject)

    async def prepare(self, facts: Facts) -> None:
        await self._delegated(facts).prepare()

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        return self._delegated(facts).check(session)

    def plan(self, session: Session, facts: Facts) -> Sequence[PlannedStep]:
        return self._delegated(facts).plan(session)

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        await self._delegated(facts).run(work)
        await self.manager.guests.forget(facts.subject)
        return None


@repair
class SetClock(Repair):
    """The guest's clock is set."""

    code = "clock-drift"
    action = "reconcile"
    text = "set the guest's clock"

    def check(self, session: Session, facts: Facts) -> frozenset[str]:
        return frozenset({key("machine", find_machine(session, facts.subject).id)})

    async def run(self, work: Work[Any], facts: Facts) -> dict[str, Any] | None:
        async with work.step("reconcile", self.text) as step:
            if not step.done_before:
                machine = await self.manager.machine(facts.subject)
                if machine.hypervisor.name == "simulated":
                    # Its guest takes no commands: its hypervisor sets its clock.
                    await machine.inject(ClockJump(seconds=-float(facts.evidence["drift"])))
                else:
                    guest = await self.manager.guests.get(facts.subject)
                    await guest.refresh()
        return None

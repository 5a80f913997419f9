"""How a simulated operation goes: what the seed has in store for it, the wait, and the effect.

Each operation of each machine has draws of its own, so that what one machine meets does not depend
on what others do meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS, Operation
from vmlab.hypervisors.simulated.profile import ANY, LATENCY_OF
from vmlab.machine.errors import DeadlineExceeded, FaultInjected, HypervisorUnavailable
from vmlab.machine.faults import OperationFailure, OperationHang

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.hypervisor import SimulatedHypervisor
    from vmlab.hypervisors.simulated.machine import SimulatedMachine

T = TypeVar("T")


@dataclass(slots=True)
class Fortune:
    """What the seed has in store for one operation."""

    operation: str
    machine: str
    epoch: int
    seconds: float
    factor: float
    failure: str | None = None
    partial: str | None = None
    hangs: bool = False
    crashes: bool = False
    limit: float = 0.0


class Conductor:
    """Conducts the operations of one hypervisor."""

    def __init__(self, hypervisor: SimulatedHypervisor) -> None:
        self._hypervisor = hypervisor
        self._profile = hypervisor.profile
        self._chances = hypervisor.chances
        self._counts: Counter[str] = Counter()
        self._all = 0
        latency = self._profile.latency
        self._latency = {
            name: float(getattr(latency, LATENCY_OF.get(name, name), 0.0))
            for name in DEFAULT_TIMEOUTS
        }
        self._variability = latency.variability

    async def conduct(
        self,
        name: str,
        machine: SimulatedMachine,
        operation: Operation | None,
        effect: Callable[[], T],
        before: Callable[[], object] | None,
    ) -> T:
        """One operation with one effect, at its end.

        Args:
            name: The operation, by the name that latencies and rates are given for.
            machine: The machine.
            operation: For its deadline and its id; a question has none.
            effect: What it does.
            before: What it does at its beginning, if anything.
        """
        fortune = self.begin(name, machine, operation)
        if before is not None:
            before()
        await self.wait(fortune, fortune.seconds)
        self.fail_if_due(fortune)
        result = effect()
        self.fail_if_partial(fortune)
        return result

    def begin(self, name: str, machine: SimulatedMachine, operation: Operation | None) -> Fortune:
        """Draw what an operation meets, and put it into the trace."""
        hypervisor = self._hypervisor
        hypervisor.require_up()
        key = f"{machine.name}/{name}"
        self._counts[key] += 1
        count = self._counts[key]
        factor = 1.0 + self._variability * (2.0 * self._chances.unit("latency", key, count) - 1.0)
        fortune = Fortune(
            operation=name,
            machine=machine.name,
            epoch=hypervisor.epoch,
            seconds=self._latency[name] * factor,
            factor=factor,
            limit=operation.timeout if operation is not None else DEFAULT_TIMEOUTS[name],
        )
        facts: dict[str, object] = {
            "operation": operation.id if operation is not None else name,
            "machine": machine.name,
            "seconds": round(fortune.seconds, 9),
        }
        if not hypervisor.closing:
            self._all += 1
            self._draw_misfortune(fortune, key, count)
            self._meet_faults(fortune, machine.id)
            misfortunes = {
                "failure": fortune.failure,
                "partial": fortune.partial,
                "hangs": fortune.hangs,
                "crashes": fortune.crashes,
            }
            facts |= {what: value for what, value in misfortunes.items() if value}
        else:
            fortune.seconds = 0.0
        hypervisor.record.add(hypervisor.now(), "operation", facts)
        return fortune

    def _draw_misfortune(self, fortune: Fortune, key: str, count: int) -> None:
        luck, name = self._profile.luck, fortune.operation

        def strikes(what: str, rates: dict[str, float]) -> bool:
            rate = rates.get(name, rates.get(ANY, 0.0)) if rates else 0.0
            return rate > 0 and self._chances.unit(what, key, count) < rate

        if strikes("failure", luck.failures):
            fortune.failure = f"{name} failed at random"
        if strikes("partial", luck.partial_failures):
            fortune.partial = f"{name} failed at random after it had its effect"
        fortune.hangs = strikes("hang", luck.hangs)
        if luck.crashes > 0:
            fortune.crashes = self._chances.unit("crash", key, count) < luck.crashes
        end = luck.fail_after
        if end is not None:
            hypervisor = self._hypervisor
            late = end.seconds is not None and hypervisor.age >= end.seconds
            if late or (end.operations is not None and self._all > end.operations):
                fortune.failure = f"{name} failed as all do from now on (fail_after)"

    def _meet_faults(self, fortune: Fortune, id_: str) -> None:
        world = self._hypervisor.world
        hardware = world.machines.get(id_)
        for fault in world.faults.operation(fortune.operation, hardware, fortune.machine):
            if isinstance(fault, OperationFailure):
                fortune.failure = fault.message
            elif isinstance(fault, OperationHang):
                fortune.hangs = True
            else:
                fortune.partial = getattr(fault, "message", "")

    async def wait(self, fortune: Fortune, seconds: float) -> None:
        """Let time pass; a hang, a crash, or a hypervisor that went down meanwhile ends it.

        Raises:
            HypervisorUnavailable: the hypervisor crashed.
            DeadlineExceeded: it hung, and nothing else ended it.
        """
        hypervisor = self._hypervisor
        if fortune.crashes:
            await asyncio.sleep(seconds / 2)
            hypervisor.crash(
                f"crashed under {fortune.operation}",
                restart_after=self._profile.luck.back_after,
            )
        elif fortune.hangs:
            # One that has passed its point of no return has no deadline, but must end as well.
            await asyncio.sleep(min(self._profile.luck.hang_seconds, fortune.limit))
            raise DeadlineExceeded(
                fortune.operation,
                seconds=fortune.limit,
                machine=fortune.machine,
                hypervisor=hypervisor.name,
                hint=hypervisor.blame("a hang"),
            )
        else:
            await asyncio.sleep(seconds)
        if hypervisor.down or hypervisor.epoch != fortune.epoch:
            raise HypervisorUnavailable(
                f"the simulated hypervisor crashed during {fortune.operation}",
                hint=hypervisor.blame("a crash"),
                machine=fortune.machine,
                hypervisor=hypervisor.name,
                operation=fortune.operation,
            )

    def fail_if_due(self, fortune: Fortune) -> None:
        """Fail before the effect, if that is what was drawn (FaultInjected)."""
        if fortune.failure is not None:
            self._fail(fortune, fortune.failure)

    def fail_if_partial(self, fortune: Fortune) -> None:
        """Fail after the effect, if that is what was drawn (FaultInjected)."""
        if fortune.partial is not None:
            self._fail(fortune, fortune.partial)

    def _fail(self, fortune: Fortune, message: str) -> None:
        raise FaultInjected(
            message,
            hint=self._hypervisor.blame("a failure"),
            machine=fortune.machine,
            hypervisor=self._hypervisor.name,
            operation=fortune.operation,
        )

"""A schedule of faults at work on machines of a lab, for people who call without `await`.

What becomes of each fault is told to its machine's `on_fault`; the schedule itself is applied by
`vmlab.lab.faulting`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from vmlab.lab.faulting import FaultEvent, FaultRun, jump_clock
from vmlab.machine.faults import ClockJump, Fault, FaultKind, FaultSchedule

if TYPE_CHECKING:
    from vmlab.hypervisors.base import Machine
    from vmlab.lab.vm import VM

_ENDING: Final = frozenset({FaultKind.KILL, FaultKind.POWER_CUT})
"""Kinds that end a machine."""
_ENDS: Final = ("unexpected-exit", "unexpected-reboot")
"""The incidents (`IncidentKind`) that this is, if nobody meant it."""

OnFault = Callable[[FaultEvent, Fault], None]
"""Takes what became of a fault, in any thread; must not wait for the lab."""


class Armed:
    """Faults at work on machines, until `disarm` or the end of a `with` block.

    Args:
        machines: Those that it is for: of one hypervisor, and made already.
        schedule: What is broken, and when.

    Raises:
        UnsupportedOperation: naming each fault that a machine's hypervisor cannot inject;
            nothing was injected.
        InvalidSpec: a fault names something that is not there.
    """

    def __init__(self, machines: Sequence[VM], schedule: FaultSchedule) -> None:
        self._machines = {vm.name: vm for vm in machines}
        self._first = machines[0]
        self._faults = {fault.id: fault for fault in schedule.faults}
        self._run = FaultRun(
            [vm.machine for vm in machines],
            schedule,
            on_fault=self._happened,
            # Only a guest that can be talked to can be told the time.
            set_clock=self._set_clock if self._first.venue.has_guests else None,
        )
        # What a fault is to end, it may end.
        self._meant = ExitStack()
        for vm in machines:
            ends = any(
                fault.kind in _ENDING and fault.machine in {None, vm.name}
                for fault in schedule.faults
            )
            if ends and vm.watchdog is not None:
                self._meant.enter_context(vm.watchdog.expect(*_ENDS))
        try:
            self._first.run(self._run.arm())
        except BaseException:
            self._meant.close()
            raise

    def _happened(self, event: FaultEvent) -> None:
        vm = self._machines.get(event.machine, self._first)
        if vm.on_fault is not None:
            vm.on_fault(event, self._faults[event.id])

    async def _set_clock(self, machine: Machine, fault: ClockJump) -> None:
        await jump_clock(self._machines[machine.name].inside("inject"), fault)

    def disarm(self) -> None:
        """End everything that is in effect or still to come; again does nothing."""
        with self._meant:
            self._first.run(self._run.disarm())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disarm()

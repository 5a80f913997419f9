"""The faults of a test's mark at work on its machines, each told to the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vmlab.lab.faulting import FaultEvent, FaultRun
from vmlab.machine.faults import FaultSchedule

if TYPE_CHECKING:
    from vmlab.lab.vm import VM
    from vmlab.pytest_plugin.trial import Trial

_COMMON: Final = frozenset({"id", "kind", "machine"})


class Armed:
    """A schedule at work on machines that run, until `disarm`.

    Args:
        machines: Those that it is for.
        schedule: What is broken, and when.
        trial: The test that it is for.

    Raises:
        UnsupportedOperation: naming each fault that a machine's hypervisor cannot inject; all of
            them are in the report, and nothing was injected.
        InvalidSpec: a fault names something that is not there.
    """

    def __init__(
        self, machines: Sequence[VM], schedule: FaultSchedule, trial: Trial | None
    ) -> None:
        self._vm = machines[0]
        self._trial = trial
        self._parameters = {fault.id: parameters_of(fault) for fault in schedule.faults}
        self._run = FaultRun([vm.machine for vm in machines], schedule, on_fault=self._happened)
        self._vm.run(self._run.arm())

    def _happened(self, event: FaultEvent) -> None:
        if self._trial is not None:
            self._trial.fault(event, self._parameters.get(event.id, {}))

    def disarm(self) -> None:
        """End everything that is in effect or still to come."""
        self._vm.run(self._run.disarm())


def parameters_of(fault: Any) -> dict[str, Any]:
    """A fault's own fields, and when it is to happen."""
    fields: dict[str, Any] = fault.model_dump(mode="json", exclude_none=True)
    return {name: value for name, value in fields.items() if name not in _COMMON}

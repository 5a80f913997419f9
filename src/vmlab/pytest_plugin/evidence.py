"""What is kept of a test that failed: each machine's console and specification go into the report.

The end of the console stands below what pytest prints of the failure too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    import pytest

    from vmlab.lab.vm import VM
    from vmlab.pytest_plugin.trial import Trial

_SHOWN_LINES: Final = 25
"""Lines of a console that pytest prints; all of it is in the report."""


def gather(trial: Trial, report: pytest.TestReport) -> None:
    """Collect the evidence of all machines of a test that has just failed."""
    for vm in list(trial.machines.values()):
        try:
            _of(vm, trial, report)
        except VmlabError as error:
            trial.attempt.message(f"no evidence of machine {vm.name!r}: {error}", source="evidence")


def _of(vm: VM, trial: Trial, report: pytest.TestReport) -> None:
    console = vm.console_text()
    trial.attempt.attach(f"{vm.name}-console.log", console)
    spec = vm.spec.model_dump_json(indent=1, exclude_defaults=True)
    trial.attempt.attach(f"{vm.name}-spec.json", spec, media_type="application/json")
    text = "\n".join(line.rstrip() for line in console.splitlines()[-_SHOWN_LINES:])
    report.sections.append((f"Console of {vm.name} (its end)", text))

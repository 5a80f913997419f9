"""What is kept of a test that failed: each machine's console, kernel log, specification, memory.

What there is and how long each piece may take is `vmlab.lab.evidence`'s business; here it goes into
the report, and the end of the console below what pytest prints of the failure.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.lab.evidence import collect_evidence
from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    import pytest

    from vmlab.lab.vm import VM
    from vmlab.pytest_plugin.trial import Trial

MEMORIES: Final = 5
"""Failures of a process for which memory is kept: it takes seconds and space, and a run of which
everything fails has one cause."""

_SHOWN_LINES: Final = 25
"""Lines of a console that pytest prints; all of it is in the report."""
_CONSOLE: Final = "console-"


def gather(trial: Trial, report: pytest.TestReport, *, memory: bool) -> None:
    """Collect the evidence of all machines of a test that has just failed.

    Args:
        trial: The test.
        report: What pytest prints of its failure.
        memory: Whether the machines' memory is wanted as well.
    """
    for vm in list(trial.machines.values()):
        try:
            _of(vm, trial, report, memory)
        except VmlabError as error:
            trial.attempt.message(f"no evidence of machine {vm.name!r}: {error}", source="evidence")


def _of(vm: VM, trial: Trial, report: pytest.TestReport, memory: bool) -> None:
    place = vm.lab.owner.directory
    pieces = vm.run(collect_evidence(vm.machine, vm.guest, run_directory=place, memory=memory))
    for piece in pieces:
        name = f"{vm.name}-{piece.name}"
        trial.attempt.attach(name, piece.content, media_type=piece.media_type)
        if isinstance(piece.content, Path):
            piece.content.unlink(missing_ok=True)
        elif piece.name.startswith(_CONSOLE):
            lines = piece.content.decode("utf-8", "replace").splitlines()[-_SHOWN_LINES:]
            if lines:
                text = "\n".join(line.rstrip() for line in lines)
                report.sections.append((f"{vm.name}: {piece.name} (its end)", text))

"""QEMU keeps the contract: a sample of the suite here, all of it on each architecture in `soak`.

`make soak` runs the whole through the command, as a user would, and writes the figures of each run
to the directory that VMLAB_RESULTS names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.integration.whole_suite import whole_suite

from vmlab.conformance.registry import select
from vmlab.conformance.runner import Subject, run_check
from vmlab.machine.architecture import Architecture
from vmlab.report import Outcome

pytestmark = [pytest.mark.boots, pytest.mark.slow]

SAMPLE = {
    # One of each room that the mutants do not visit: see test_mutants.
    Architecture.X86_64: (
        "cancel.making",
        "change.resize-at-rest",
        "channel.bytes",
        "console.input",
        "display.keys",
        "fault.guest",
        "fault.network",
        "fork.identity",
        "metrics.present",
        "migration.live",
        "share.seen",
        "states.illegal",
    ),
    # QEMU's board before 8.2 ends with its guest's power-off: the one that tells of no event.
    Architecture.RISCV64: (
        "change.hotplug-disk",
        "fork.copies",
        "fork.identity",
        "snapshot.memory-returns",
        "stop.by-guest",
    ),
}
CASES = [(architecture, check) for architecture, ids in SAMPLE.items() for check in ids]
WHOLE = {
    Architecture.X86_64: (),
    Architecture.RISCV64: (),
    # How a guest lives, its console, and what it answers to commands.
    Architecture.AARCH64: ("lifecycle.*", "console.*", "configuration.*", "channel.*"),
    Architecture.PPC64LE: ("lifecycle.*", "console.*", "configuration.*", "channel.*"),
}
"""The checks that each architecture has to pass; none named is all."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("architecture", "check"), CASES, ids=[f"{arch.value}-{check}" for arch, check in CASES]
)
def test_sample_of_the_contract_is_kept(
    subject_of: Any, architecture: Architecture, check: str
) -> None:
    subject: Subject = subject_of(architecture)
    (found,) = select([check])
    result = run_check(found, subject)
    assert result.outcome is Outcome.PASS, f"{result.reason}\n{result.details}"


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("architecture", WHOLE)
def test_whole_suite_passes(images: Any, tmp_path: Path, architecture: Architecture) -> None:
    image = images(architecture)
    whole_suite(
        "qemu",
        image.directory.parent.parent,
        tmp_path,
        architecture=architecture.value,
        words=["--option", f"architecture={architecture.value}"],
        checks=WHOLE[architecture],
    )

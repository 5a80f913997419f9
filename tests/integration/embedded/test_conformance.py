"""The embedded engine keeps the contract: a sample of the suite here, all of it in `soak`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.whole_suite import whole_suite

from vmlab.conformance.registry import select
from vmlab.conformance.runner import Subject, run_check
from vmlab.report import Outcome

pytestmark = [pytest.mark.boots, pytest.mark.slow]

# One of each room that the mutants do not visit: see test_mutants.
SAMPLE = ("change.resize-disk", "configuration.info", "fault.disks", "lifecycle.round-trip")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("check", SAMPLE)
def test_sample_of_the_contract_is_kept(subject: Subject, check: str) -> None:
    (found,) = select([check])
    result = run_check(found, subject)
    assert result.outcome is Outcome.PASS, f"{result.reason}\n{result.details}"


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_whole_suite_passes(image_store: Path, tmp_path: Path) -> None:
    whole_suite("embedded", image_store, tmp_path, architecture="riscv64")

"""The suite notices every broken hypervisor, and needs each of its checks to do so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mutants import Mutant, mutants
from mutants.base import PROFILE
from mutants.leaks import end_leaks

from vmlab.conformance.audits import AUDITS
from vmlab.conformance.registry import checks
from vmlab.conformance.runner import Subject, run_check
from vmlab.conformance.together import TOGETHER, run_together
from vmlab.hypervisors.simulated import provider

ALL = mutants()
SOUND = Subject(provider, PROFILE)
EVERYTHING = sorted({*checks(), *AUDITS, TOGETHER})


@pytest.fixture(autouse=True)
def _leaks_end() -> Iterator[None]:
    yield
    end_leaks()


def found_in(subject: Subject) -> dict[str, str]:
    """What the whole suite finds wrong: the id of each check or audit, and the first finding."""
    found: dict[str, str] = {}
    for check in checks().values():
        result = run_check(check, subject)
        for finding in result.findings:
            told = f"after {check.id}: {finding.message}; {finding.expected}; {finding.actual}"
            found.setdefault(finding.id, told)
    for finding in run_together([SOUND, subject]).findings:
        found.setdefault(finding.id, finding.message)
    return found


def test_sound_hypervisor_passes_every_check() -> None:
    assert found_in(SOUND) == {}


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant) -> None:
    found = found_in(mutant.subject())
    assert mutant.caught_by in found, f"{mutant.breaks} Found instead: {found}"
    if mutant.only:
        assert set(found) == {mutant.caught_by}, f"{mutant.breaks} Found too: {found}"


@pytest.mark.parametrize("removed", EVERYTHING)
def test_without_any_single_check_some_mutant_gets_through(removed: str) -> None:
    # That it is found by `removed` and nothing else is what test_mutant_is_caught asserts.
    through = [mutant.name for mutant in ALL if mutant.only and mutant.caught_by == removed]
    assert through, f"no mutant needs {removed}"


def test_mutants_name_checks_that_exist() -> None:
    assert {mutant.caught_by for mutant in ALL} <= set(EVERYTHING)
    assert len({mutant.name for mutant in ALL}) == len(ALL)

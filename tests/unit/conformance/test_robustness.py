"""Random walks: failures are clean on the unreliable simulator, and unclean ones are found."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mutants.base import PROFILE, BrokenHypervisor, BrokenMachine, BrokenProvider

from vmlab.conformance.bench import Bench, CheckFailed
from vmlab.conformance.registry import Check
from vmlab.conformance.results import CheckResult
from vmlab.conformance.robustness import RETRIES, patiently, walk_of
from vmlab.conformance.runner import Subject, run_check
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.simulated import provider
from vmlab.machine.errors import FaultInjected, OperationFailed
from vmlab.machine.states import MachineState
from vmlab.report import Outcome

SEEDS = 200


def walk(subject: Subject, seed: int, profile: str = "unreliable") -> CheckResult:
    seeded = subject.with_seed(seed).with_options({"profile": profile})
    return run_check(walk_of(seed), seeded)


@pytest.mark.parametrize("profile", ["unreliable", "standard"])
def test_every_failure_is_clean(profile: str) -> None:
    subject = Subject(provider, PROFILE)
    failed = {
        seed: result.reason
        for seed in range(SEEDS)
        if (result := walk(subject, seed, profile)).outcome is not Outcome.PASS
    }
    assert failed == {}


def test_a_walk_is_walked_again_by_its_seed() -> None:
    subject = Subject(provider, PROFILE)
    first, again, other = (walk(subject, seed).expectations for seed in (5, 5, 6))
    assert first == again != other


class KeepsTheEffect(BrokenMachine):
    """Leaves a machine paused whose pausing failed, and says that it runs."""

    async def _undo(self, operation: Operation) -> None:
        if operation.name != "pause":
            await super()._undo(operation)

    async def _observe(self) -> MachineState:
        seen = await super()._observe()
        return MachineState.RUNNING if seen is MachineState.PAUSED else seen


class StuckBroken(BrokenMachine):
    """Is pausing for ever when pausing failed."""

    async def pause(self, **options: Any) -> None:
        try:
            await super().pause(**options)
        except FaultInjected:
            self._lifecycle._state = MachineState.PAUSING
            raise


class Undeletable(BrokenMachine):
    """Cannot be deleted any more when a delete has failed."""

    cursed = False

    async def delete(self, **options: Any) -> None:
        if self.cursed and not self._hypervisor.closing:
            raise OperationFailed("no", machine=self.name)
        try:
            await super().delete(**options)
        except FaultInjected:
            self.cursed = True
            raise


class SwapsDisks(BrokenMachine):
    """Gives a machine whose start failed the disks of another."""

    async def start(self, **options: Any) -> None:
        try:
            await super().start(**options)
        except FaultInjected:
            for other in self._hypervisor._machines.values():
                self.hardware.disks = other.hardware.disks
            raise


@pytest.mark.parametrize("machine", [KeepsTheEffect, StuckBroken, Undeletable, SwapsDisks])
def test_unclean_failures_are_found(machine: type[BrokenMachine]) -> None:
    kind = type("Unclean", (BrokenHypervisor,), {"machine_class": machine})
    subject = Subject(BrokenProvider(kind), PROFILE)
    results = (walk(subject, seed) for seed in range(SEEDS))
    found = next((result for result in results if result.findings), None)
    assert found is not None, machine.__doc__
    assert found.outcome is Outcome.FAIL


def test_what_never_works_is_not_waited_for_for_ever() -> None:
    async def ask() -> None:
        raise OperationFailed("no")

    async def check(lab: Bench) -> None:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(CheckFailed, match="it answers"):
            await patiently(ask, "it answers")
        assert asyncio.get_running_loop().time() - begun == RETRIES

    result = run_check(Check("own.patience", "", check), Subject(provider, PROFILE))
    assert result.outcome is Outcome.PASS, result.reason

"""Runs a plan in a machine: its phases in order, what they print, measure and leave behind.

The machine is somebody else's, booted, with the plan's shares in their places and its faults armed
by whoever made it. What happens is recorded when it happens, so that a phase in whose midst
everything dies is seen to be the one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from vmlab.guests.command import CommandResult, Sink
from vmlab.guests.guest import CONNECT_TIMEOUT, Guest
from vmlab.lab.plans.guest_tests import LARGEST_RESULTS, GuestTest, NoResults, read_results
from vmlab.lab.plans.measuring import Meter, Sample
from vmlab.lab.plans.phases import Phase
from vmlab.lab.plans.plan import Plan
from vmlab.lab.plans.printing import Printed
from vmlab.lab.plans.retrieval import find_files, read_file, retrieve
from vmlab.lab.vm import Expecting
from vmlab.machine.errors import DeadlineExceeded, VmlabError
from vmlab.report import AttemptRecorder, Outcome, Severity

__all__ = ["PhaseResult", "PlanResult", "run_plan"]

T = TypeVar("T")

_OPERATION: Final = "run a plan in"

_ANSWER_TIMEOUT: Final = 60.0
"""Seconds that a guest has to say that it lives."""

_ENDS: Final = ("panic", "unexpected-exit", "unexpected-reboot")
"""The incidents (`IncidentKind`) that a phase may cause whose failure is let pass."""

_POWER_TIMEOUT: Final = 60.0
"""Seconds in which a machine that lost its power is started again, if it is."""


class Inhabited(Protocol):
    """What a plan needs of a machine: its inside, and the loop that it is talked to on."""

    @property
    def name(self) -> str:
        """The machine's name."""

    @property
    def watchdog(self) -> Expecting | None:
        """Who watches it, if anybody."""

    def inside(self, operation: str) -> Guest:
        """Its guest: another one after every boot.

        Raises:
            VmlabError: it has none that takes commands, or it has not booted, or is gone.
        """

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Wait for a coroutine on the machine's loop."""

    async def greeted(self, *, step: str = "boot", timeout: float | None = None) -> None:
        """Connect to a guest that boots, and have it have its shares; `guest` is it then."""


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """How a phase ended.

    `status` is the exit status of its script, None where it has none; `forgiven` is whether its
    failure fails nothing else.
    """

    name: str
    outcome: Outcome
    duration_s: float = 0.0
    status: int | None = None
    message: str = ""
    forgiven: bool = False


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What came of a plan.

    `tests` are those that ran in the guest, by the path of the file that told of them;
    `artifacts` are files of the guest and where they are now.
    """

    phases: tuple[PhaseResult, ...]
    tests: tuple[tuple[str, GuestTest], ...] = ()
    artifacts: tuple[tuple[str, Path], ...] = ()

    @property
    def outcome(self) -> Outcome:
        """That of the worst phase whose failure counts; tests of the guest's are not in it."""
        counted = [phase.outcome for phase in self.phases if not phase.forgiven]
        # What was skipped was so because of something that is worse.
        return Outcome.worst(counted) if counted else Outcome.PASS

    @property
    def message(self) -> str:
        """Why it did not pass, by the phases that failed; empty if it did."""
        wrong = [one for one in self.phases if not one.outcome.ok and not one.forgiven]
        return "\n".join(f"phase {one.name!r}: {one.message}" for one in wrong)


def run_plan(
    vm: Inhabited, plan: Plan, attempt: AttemptRecorder | None, *, artifacts: Path
) -> PlanResult:
    """Run the phases of `plan` in `vm`.

    Args:
        vm: The machine, booted.
        plan: What to run.
        attempt: Where to record; None for nowhere.
        artifacts: A directory for what is copied out and for whole outputs; made if need be.

    Returns:
        How every phase ended. What goes wrong in the guest is in it, and raises nothing.

    Raises:
        VmlabError: the machine has no guest that takes commands, or the report cannot be written.
        OSError: `artifacts` cannot be written to.
    """
    return _PlanRun(vm, plan, attempt, artifacts).go()


class _PlanRun:
    """One run of a plan."""

    def __init__(
        self, vm: Inhabited, plan: Plan, attempt: AttemptRecorder | None, directory: Path
    ) -> None:
        vm.inside(_OPERATION)
        self.vm = vm
        self.plan = plan
        self.attempt = attempt
        self.directory = directory
        self.results: dict[str, PhaseResult] = {}
        self.tests: list[tuple[str, GuestTest]] = []
        self.artifacts: list[tuple[str, Path]] = []
        self.lost = ""

    @property
    def guest(self) -> Guest:
        """The inside of the machine, which is another one after every boot."""
        return self.vm.inside(_OPERATION)

    def go(self) -> PlanResult:
        needs = self.plan.needs
        for phase in self.plan.ordered:
            failed = [name for name in needs[phase.name] if self._stops(name)]
            if failed or self.lost:
                reason = self.lost or f"it needs {' and '.join(map(repr, failed))}"
                result = PhaseResult(phase.name, Outcome.SKIP, message=reason)
                self._record(result)
            else:
                result = self._phase(phase)
            self.results[phase.name] = result
        return PlanResult(tuple(self.results.values()), tuple(self.tests), tuple(self.artifacts))

    def _stops(self, name: str) -> bool:
        """Whether what needs that phase cannot run."""
        result = self.results[name]
        return result.outcome is Outcome.SKIP or not (result.outcome.ok or result.forgiven)

    def _record(self, result: PhaseResult, started_s: float | None = None) -> None:
        if self.attempt is not None:
            self.attempt.phase(
                result.name,
                result.outcome,
                duration_s=result.duration_s,
                started_s=started_s,
                message=result.message,
            )

    def _tell(self, text: str, severity: Severity = Severity.WARNING, details: str = "") -> None:
        if self.attempt is not None:
            self.attempt.message(text, severity=severity, details=details, source="plan")

    def _phase(self, phase: Phase) -> PhaseResult:
        began_s = self.attempt.elapsed_s if self.attempt is not None else None
        if self.attempt is not None:
            self.attempt.phase(phase.name, Outcome.PENDING, started_s=began_s)
        began = time.monotonic()
        with self._expecting_ends(phase):
            outcome, status, message = self._script(phase)
            message = self._clear_out(phase, message, reachable=not self.lost)
            if outcome is Outcome.PASS and message:
                outcome = Outcome.FAIL
            if self.lost and phase.continue_on_error:
                message += self._wait_for_return()
        # A guest that is gone for good leaves nothing that could be gone on with.
        forgiven = phase.continue_on_error and not outcome.ok and not self.lost
        result = PhaseResult(
            phase.name, outcome, time.monotonic() - began, status, message, forgiven
        )
        self._record(result, began_s)
        if forgiven:
            self._tell(
                f"phase {phase.name!r} ended with {outcome.value}, which is let pass: {message}"
            )
        return result

    def _expecting_ends(self, phase: Phase) -> AbstractContextManager[object]:
        """While it is entered, the end of a machine that a phase may end is no incident."""
        if self.vm.watchdog is None or not phase.continue_on_error:
            return nullcontext()
        return self.vm.watchdog.expect(*_ENDS)

    def _script(self, phase: Phase) -> tuple[Outcome, int | None, str]:
        """Run a phase's script; its outcome, exit status, and what is wrong."""
        with Printed(self.directory / phase.name) as printed:
            meters = {"stdout": Meter(phase.metrics), "stderr": Meter(phase.metrics)}
            try:
                result = self.vm.run(self._execute(phase, printed, meters))
            except VmlabError as error:
                if isinstance(error, DeadlineExceeded) and error.seconds == phase.timeout:
                    self._see_whether_it_answers(phase)
                    return Outcome.FAIL, None, f"it did not end within {phase.timeout:g} s"
                self.lost = f"the guest was lost in phase {phase.name!r}"
                return Outcome.ERROR, None, f"{type(error).__name__}: {error}"
            finally:
                # Also of what was interrupted: it is the best that there is to read.
                self._settle(phase, printed, meters)
        if result.ok:
            return Outcome.PASS, 0, ""
        how = f"signal {result.signal}" if result.signal else f"exit status {result.status}"
        last = printed.last_line("stderr") or printed.last_line("stdout")
        return Outcome.FAIL, result.status, f"{how}{': ' + last if last else ''}"

    def _see_whether_it_answers(self, phase: Phase) -> None:
        """A guest that is dead takes all time that it is given; it is asked before what follows."""
        try:
            self.vm.run(self.guest.execute("true", timeout=_ANSWER_TIMEOUT))
        except VmlabError as error:
            self.lost = f"the guest does not answer after phase {phase.name!r}: {error}"

    async def _execute(
        self, phase: Phase, printed: Printed, meters: dict[str, Meter]
    ) -> CommandResult:
        def into(stream: str) -> Sink:
            async def take(data: bytes) -> None:
                printed.take(stream, data)
                self._measured(meters[stream].feed(data))

            return take

        return await self.guest.execute(
            f"set -e\n{phase.run}",
            environment={**self.plan.environment, **phase.environment},
            directory=phase.directory,
            stdout=into("stdout"),
            stderr=into("stderr"),
            timeout=phase.timeout,
        )

    def _measured(self, samples: Iterator[Sample]) -> None:
        for one in samples:
            if self.attempt is not None:
                self.attempt.metric(one.name, one.value, one.unit, direction=one.direction)

    def _settle(self, phase: Phase, printed: Printed, meters: dict[str, Meter]) -> None:
        """Record what a phase printed, and the numbers in its last lines."""
        for meter in meters.values():
            self._measured(meter.finish())
            for text in meter.unreadable:
                self._tell(f"phase {phase.name!r}: the metric {text}")
        if self.attempt is None:
            return
        for stream in meters:
            text, whole = printed.shown(stream)
            if text:
                self.attempt.output(stream, f"==> {phase.name} <==\n{text}")
            if whole is not None:
                self.attempt.attach(f"{phase.name}.{stream}.log", whole, media_type="text/plain")

    def _clear_out(self, phase: Phase, message: str, *, reachable: bool) -> str:
        """Take a phase's results and artifacts; returns what is wrong, `message` first."""
        if not reachable or not (phase.results or phase.artifacts):
            return message
        wrong = [message] if message else []
        try:
            if phase.results:
                wrong += self._take_results(phase)
            if phase.artifacts:
                self._take_artifacts(phase)
        except VmlabError as error:
            wrong.append(f"what it left cannot be taken: {error}")
        return "; ".join(wrong)

    def _take_results(self, phase: Phase) -> list[str]:
        """Read the results that a phase left; returns what is wrong with them."""
        found, remarks = self.vm.run(find_files(self.guest, phase.results))
        wrong = list(remarks)
        if not found:
            wrong.append(f"no file of results matches {', '.join(phase.results)}")
        for path in found:
            data = self.vm.run(read_file(self.guest, path, LARGEST_RESULTS))
            if self.attempt is not None:
                self.attempt.attach(path, data)
            try:
                tests = read_results(data)
            except NoResults as error:
                wrong.append(f"{path}: {error}")
                continue
            self.tests += [(path, test) for test in tests]
            if not tests:
                wrong.append(f"{path}: it has no tests")
        return wrong

    def _take_artifacts(self, phase: Phase) -> None:
        place = self.directory / phase.name / "artifacts"
        retrieved = self.vm.run(retrieve(self.guest, phase.artifacts, place))
        self.artifacts += retrieved.files
        for text in retrieved.remarks:
            self._tell(f"phase {phase.name!r}, artifacts: {text}")
        if self.attempt is not None:
            for path, file in retrieved.files:
                self.attempt.attach(path, file)

    def _wait_for_return(self) -> str:
        """Wait for a guest that was lost on purpose: by a power cut, a reboot; a word on that."""
        try:
            self.vm.run(self._greeted_again(self.plan.machine.timeout or CONNECT_TIMEOUT))
        except VmlabError as error:
            return f", and did not come back: {error}"
        self.lost = ""
        return ", and came back"

    async def _greeted_again(self, patience: float) -> None:
        """Connect to a guest that boots again, once whoever has ended its machine has started it.

        Raises:
            VmlabError: nobody starts it, or it does not boot within `patience` seconds.
        """
        deadline = time.monotonic() + _POWER_TIMEOUT
        while True:
            try:
                return await self.vm.greeted(timeout=patience)
            except VmlabError:
                # Refused at once while it is off; later it has had its time.
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.2)


def summary(results: Sequence[PhaseResult]) -> str:
    """The phases in a line: "build pass 2.1 s, test fail 0.3 s"."""
    return ", ".join(
        f"{one.name} {one.outcome.value} {one.duration_s:.1f} s"
        if one.outcome is not Outcome.SKIP
        else f"{one.name} skip"
        for one in results
    )

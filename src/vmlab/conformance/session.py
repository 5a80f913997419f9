"""One run of the suite: which hypervisors, which checks, and what becomes of the results.

Knows nothing of pytest, which `plugin` lets do the running; the results go to `vmlab.report` as
they come, and from there into files.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from pathlib import Path

from vmlab.conformance.profiles import ConformanceProfile, find_profile
from vmlab.conformance.registry import Check, select
from vmlab.conformance.results import CheckResult
from vmlab.conformance.robustness import walk_of
from vmlab.conformance.runner import Subject, declared, medians, run_check
from vmlab.conformance.together import CLAUSE, TOGETHER, run_together
from vmlab.hypervisors import registry as hypervisors
from vmlab.hypervisors.base import HypervisorProvider
from vmlab.machine.capabilities import Capabilities, Capability, sorted_names
from vmlab.machine.errors import HypervisorUnavailable, VmlabError
from vmlab.machine.spec import MachineSpec
from vmlab.report import AttemptRecorder, Outcome, Recorder


@dataclass(frozen=True)
class Settings:
    """What to run, as the command line says it.

    Attributes:
        hypervisors: Names of the hypervisors.
        options: Options to open them with; a key "NAME:key" is for one of them alone.
        spec: A specification to use instead of the profile's.
        seed: Source of everything random.
        patterns: Shell patterns of the ids of the checks to run; none is all.
        walks: How many seeds to walk instead of running the checks (`robustness`); 0 is none.
        place: Where the checks have their directories; None is the temporary directory.
    """

    hypervisors: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    spec: Path | None = None
    seed: int = 0
    patterns: tuple[str, ...] = ()
    walks: int = 0
    place: Path | None = None


@dataclass(frozen=True)
class Case:
    """One test of the run: an id, on which hypervisors, and what runs it."""

    id: str
    clause: str
    hypervisor: str
    run: Callable[[], CheckResult]
    needs: tuple[Capability, ...] = ()

    @property
    def label(self) -> str:
        """How pytest names it."""
        return f"{self.hypervisor}-{self.id}"


@dataclass(frozen=True)
class Standing:
    """What a run says of one hypervisor's capabilities, by name."""

    hypervisor: str
    declared: list[str]
    proven: list[str]
    disproven: list[str]
    unproven: list[str]
    undeclared_working: list[str]
    missing: list[str]


class Session:
    """The cases of one run and their results.

    Args:
        settings: What to run.
        providers: Where hypervisors come from by name; the registry unless given.

    Raises:
        HypervisorUnavailable: one of them does not exist or cannot be used here.
        InvalidSpec: an option or the specification is wrong.
        VmlabError: no check matches the patterns.
    """

    def __init__(
        self,
        settings: Settings,
        providers: Callable[[str], HypervisorProvider] = hypervisors.provider,
        profiles: Callable[[str], ConformanceProfile] = find_profile,
    ) -> None:
        self.settings = settings
        self.subjects = [
            _subject(settings, name, providers(name), profiles(name))
            for name in settings.hypervisors
        ]
        self.capabilities: dict[str, Capabilities] = {
            subject.name: declared(subject) for subject in self.subjects
        }
        self.cases = list(self._cases())
        if not self.cases:
            raise VmlabError(
                f"no check matches {', '.join(settings.patterns)}",
                hint="`vmlab conformance --list` lists the checks",
            )
        self.results: list[tuple[Case, CheckResult]] = []
        self.recorder: Recorder | None = None
        self.on_result: Callable[[int, int, CheckResult], None] | None = None

    def _cases(self) -> Sequence[Case]:
        cases: list[Case] = []
        for subject in self.subjects:
            if self.settings.walks:
                cases += self._walks(subject)
            else:
                _require_reliable(subject)
                cases += [
                    Case(
                        check.id,
                        check.clause,
                        subject.name,
                        partial(run_check, check, subject),
                        check.needs,
                    )
                    for check in select(self.settings.patterns)
                ]
        patterns = self.settings.patterns
        wanted = not patterns or any(fnmatchcase(TOGETHER, pattern) for pattern in patterns)
        if len(self.subjects) > 1 and not self.settings.walks and wanted:
            names = "+".join(subject.name for subject in self.subjects)
            cases.append(Case(TOGETHER, CLAUSE, names, partial(run_together, self.subjects)))
        return cases

    def _walks(self, subject: Subject) -> list[Case]:
        first = self.settings.seed
        cases = []
        for seed in range(first, first + self.settings.walks):
            check: Check = walk_of(seed)
            seeded = subject.with_seed(seed)
            cases.append(
                Case(check.id, check.clause, subject.name, partial(run_check, check, seeded))
            )
        return cases

    def plan(self, recorder: Recorder) -> None:
        """Record every case as pending, and all results from now on."""
        self.recorder = recorder
        for (hypervisor, clause), cases in groupby(
            self.cases, key=lambda case: (case.hypervisor, case.clause)
        ):
            ids = [case.id for case in cases]
            recorder.plan(hypervisor, ids, hypervisor=hypervisor, labels={"clause": clause})

    def run(self, case: Case) -> CheckResult:
        """Run one case and record how it ended."""
        if self.recorder is None:
            result = case.run()
        else:
            with self.recorder.start(
                case.hypervisor,
                case.id,
                hypervisor=case.hypervisor,
                labels={"clause": case.clause},
            ) as attempt:
                result = case.run()
                _record(attempt, result)
        self.results.append((case, result))
        if self.on_result is not None:
            self.on_result(len(self.results), len(self.cases), result)
        return result

    # What the run says.

    def standings(self) -> list[Standing]:
        """For each hypervisor what became of its capabilities."""
        return [self._standing(subject) for subject in self.subjects]

    def _standing(self, subject: Subject) -> Standing:
        supported = self.capabilities[subject.name].supported
        passed: set[Capability] = set()
        failed: set[Capability] = set()
        working: set[Capability] = set()
        for case, result in self.results:
            if case.hypervisor == subject.name:
                working |= result.undeclared_working
                if result.outcome is Outcome.PASS:
                    passed |= set(case.needs) | result.used
                elif result.outcome is not Outcome.SKIP:
                    failed |= set(case.needs)
        proven = (passed - failed) & supported
        return Standing(
            hypervisor=subject.name,
            declared=sorted_names(supported),
            proven=sorted_names(proven),
            disproven=sorted_names(failed & supported),
            unproven=sorted_names(supported - proven - failed),
            undeclared_working=sorted_names(working),
            missing=sorted_names(subject.profile.must_declare - supported),
        )

    def timings(self) -> dict[str, dict[str, float]]:
        """Operation -> hypervisor -> its usual time in seconds on the hypervisor's clock."""
        table: dict[str, dict[str, float]] = {}
        for subject in self.subjects:
            mine = [result for case, result in self.results if case.hypervisor == subject.name]
            for operation, seconds in medians(mine).items():
                table.setdefault(operation, {})[subject.name] = seconds
        return dict(sorted(table.items()))

    def conclude(self) -> None:
        """Record what the run says as a whole."""
        if self.recorder is None:
            return
        for standing in self.standings():
            for what, names in (
                ("declared", standing.declared),
                ("proven", standing.proven),
                ("declared, and a check of it failed", standing.disproven),
                ("declared, and no check of it ran", standing.unproven),
                ("works, and is not declared", standing.undeclared_working),
                ("due, and not declared", standing.missing),
            ):
                if names:
                    self.recorder.message(
                        f"{standing.hypervisor}: {what}: {', '.join(names)}", source="capabilities"
                    )


def _record(attempt: AttemptRecorder, result: CheckResult) -> None:
    """Everything about one result into the report."""
    for statement in result.expectations:
        attempt.check(
            statement.what,
            statement.passed,
            expected=statement.expected,
            actual=statement.actual,
        )
    for finding in result.findings:
        if finding.id != result.id:
            attempt.check(
                finding.id,
                False,
                finding.message,
                expected=finding.expected,
                actual=finding.actual,
            )
    for note in result.notes:
        attempt.message(note)
    for operation, seconds in result.timings.items():
        attempt.metric(f"{operation}_s", statistics.median(seconds), "s")
    attempt.finish(result.outcome, reason=result.reason or None, details=result.details)


def _subject(
    settings: Settings, name: str, provider: HypervisorProvider, profile: ConformanceProfile
) -> Subject:
    probe = provider.probe()
    if not probe.available:
        raise HypervisorUnavailable(
            f"hypervisor {name!r} cannot be used here: {probe.reason or 'its probe says no more'}",
            hint=probe.hint or "`vmlab doctor` explains this host",
            hypervisor=name,
        )
    options: dict[str, str] = {}
    for key, value in settings.options.items():
        whose, separator, option = key.partition(":")
        if not separator:
            options[key] = value
        elif whose == name:
            options[option] = value
    if profile.variant is not None:
        profile = profile.variant({**profile.options, **options})
    if settings.spec is not None:
        profile = _with_spec(profile, MachineSpec.load(settings.spec))
    return Subject(provider, profile, settings.seed, settings.place).with_options(options)


def _with_spec(profile: ConformanceProfile, spec: MachineSpec) -> ConformanceProfile:
    """The profile with machines of another specification, with the channels that it needs."""
    channels = [name for name in profile.spec.channels if name not in spec.channels]
    return profile.with_changes(
        spec=spec.with_changes(channels=[*channels, *spec.channels]),
        scratch=tuple(name for name in profile.scratch if spec.disk(name) is not None),
    )


def _require_reliable(subject: Subject) -> None:
    """Refuse to run checks where operations fail by chance: what they state is not so then."""
    if not subject.profile.reliable(subject.profile.options):
        raise VmlabError(
            f"operations of {subject.name!r} fail by chance with these options, so no check of "
            "what they do can pass",
            hint="--seeds 200 checks instead that every failure is clean",
            hypervisor=subject.name,
        )

"""What running one check gives: findings, expectations, notes, timings."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmlab.machine.capabilities import Capability
from vmlab.report import Outcome


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: the check or audit that found it, and what it found."""

    id: str
    message: str
    expected: str | None = None
    actual: str | None = None


@dataclass(frozen=True, slots=True)
class Expectation:
    """One thing that was looked at and how it was."""

    what: str
    passed: bool
    expected: str | None = None
    actual: str | None = None


@dataclass(slots=True)
class CheckResult:
    """How one check of one hypervisor ended."""

    id: str
    hypervisor: str
    outcome: Outcome = Outcome.PENDING
    reason: str = ""
    details: str = ""
    findings: list[Finding] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=dict)
    used: set[Capability] = field(default_factory=set)
    undeclared_working: set[Capability] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def found(self) -> frozenset[str]:
        """Ids of the checks and audits that found something wrong."""
        return frozenset(finding.id for finding in self.findings)

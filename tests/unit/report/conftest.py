"""A run with every outcome in it, and a clock that tests can turn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from lxml import etree

from vmlab.report import (
    Artifact,
    Attempt,
    Check,
    Clock,
    Direction,
    Message,
    Metric,
    Outcome,
    Output,
    Run,
    Severity,
    Suite,
    Test,
)

STARTED = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)


def _attempt(outcome: Outcome, seconds: float, **more: object) -> Attempt:
    return Attempt(
        outcome=outcome,
        started=STARTED,
        finished=STARTED + timedelta(seconds=seconds),
        duration_s=seconds,
        **more,
    )


@pytest.fixture
def run() -> Run:
    """Eight tests in two suites: each outcome, a flaky test, one that failed twice."""
    error = Message(
        text="the machine died: \x1b[31mkernel panic\x1b[0m \udcff",
        severity=Severity.ERROR,
        details="Traceback ...\n\x00<&>]]>",
        source="console",
    )
    wrong = Check(name="state", outcome=Outcome.FAIL, expected="paused", actual="running")
    right = Check(name="exists", outcome=Outcome.PASS)
    lifecycle = Suite(
        name="lifecycle",
        tests=[
            Test(
                suite="lifecycle",
                name="test_boot",
                hypervisor="qemu",
                labels={"image": "debian"},
                attempts=[
                    _attempt(
                        Outcome.PASS,
                        1.5,
                        checks=[right],
                        messages=[Message(text="warm", source="image"), Message(text="quiet")],
                        metrics=[
                            Metric(name="boot_s", value=1.25, unit="s", direction=Direction.LOWER),
                            Metric(name="exits", value=12),
                        ],
                        artifacts=[
                            Artifact(
                                name="console.log",
                                path="artifacts/console.log",
                                media_type="text/plain",
                                sha256="0" * 64,
                                size=3,
                            )
                        ],
                        output=[
                            Output(stream="stdout", text="out\r\n"),
                            Output(stream="stderr", text="err\r"),
                        ],
                    )
                ],
            ),
            Test(
                suite="lifecycle",
                name="test_pause",
                attempts=[_attempt(Outcome.FAIL, 0.25, checks=[right, wrong])],
            ),
            Test(
                suite="lifecycle",
                name="test_fork",
                attempts=[_attempt(Outcome.ERROR, 0.5, messages=[error])],
            ),
            Test(suite="lifecycle", name="test_never_begun"),
        ],
    )
    other = Suite(
        name="other",
        labels={"owner": "me"},
        tests=[
            Test(
                suite="other",
                name="test_gpu",
                attempts=[_attempt(Outcome.SKIP, 0, skip_reason="no GPU here")],
            ),
            Test(
                suite="other",
                name="test_known_bug",
                attempts=[_attempt(Outcome.XFAIL, 0.125, messages=[Message(text="issue 7")])],
            ),
            Test(
                suite="other",
                name="test_flaky",
                attempts=[
                    _attempt(
                        Outcome.FAIL,
                        1,
                        checks=[wrong],
                        output=[
                            Output(stream="stdout", text="first out"),
                            Output(stream="stderr", text="first err"),
                        ],
                    ),
                    Attempt(outcome=Outcome.PENDING, started=STARTED),
                    _attempt(Outcome.PASS, 1),
                ],
            ),
            Test(
                suite="other",
                name="test_broken_twice",
                attempts=[
                    _attempt(Outcome.PASS, 1),
                    _attempt(Outcome.ERROR, 1, messages=[error]),
                    _attempt(Outcome.FAIL, 1, checks=[wrong]),
                ],
            ),
        ],
    )
    return Run(
        id="20261121T093000Z-0badcafe",
        tool="vmlab conformance",
        version="0.1.0",
        started=STARTED,
        finished=STARTED + timedelta(seconds=7),
        duration_s=7,
        seed=2**63,
        command=["vmlab", "conformance", "qemu", "--seed", "it's"],
        environment={"hostname": "lab", "cpus": 2, "kvm": False, "load": 0.5, "gpu": None},
        labels={"branch": "main"},
        messages=[Message(text="slow disk", severity=Severity.WARNING), Message(text="hello")],
        suites=[lifecycle, other],
    )


class TurnableClock:
    """Time stands until it is turned; both clocks on their own."""

    def __init__(self) -> None:
        self.time = STARTED
        self.seconds = 1000.0
        self.clock = Clock(now=lambda: self.time, monotonic=lambda: self.seconds)

    def pass_(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)
        self.seconds += seconds


@pytest.fixture
def turnable() -> TurnableClock:
    return TurnableClock()


@pytest.fixture(scope="session")
def junit_schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(Path(__file__).parent / "data" / "junit-10.xsd"))

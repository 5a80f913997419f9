"""A run with every outcome in it, and a clock that tests can turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jsonschema
import pytest
from lxml import etree

from vmlab.report import (
    Artifact,
    Attempt,
    AttemptRecorder,
    Check,
    Clock,
    Direction,
    FaultRecord,
    MachineRecord,
    Mark,
    Message,
    Metric,
    Outcome,
    Output,
    Phase,
    Recorder,
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


@pytest.fixture
def run_with_machines() -> Run:
    """A run that died: a test that passed on two machines, one that panicked, one under way."""
    disk = {"name": "root", "size": 2**30}
    web = MachineRecord(
        name="web",
        hypervisor="qemu",
        accelerator="tcg",
        architecture="x86_64",
        image="debian-12",
        spec={"memory": {"size": 512 * 2**20}, "cpus": {"count": 2}, "disks": [disk]},
        timeline=[
            Mark(at_s=-1.5, kind="template"),
            Mark(at_s=0, kind="boot", text="forked", duration_s=1.25),
            Mark(at_s=2, kind="panic", text="Kernel panic - not syncing: <b>\x1b[31m\nmore"),
        ],
    )
    store = MachineRecord(name="store", hypervisor="qemu", accelerator="tcg", image="debian-12")
    passed = _attempt(
        Outcome.PASS,
        3,
        machines=[web.model_copy(update={"timeline": web.timeline[:2]}), store],
        metrics=[
            Metric(name="boot_s", value=1.25, unit="s", direction=Direction.LOWER, at_s=1),
            Metric(name="boot_s", value=0.75, unit="s", direction=Direction.LOWER, at_s=2),
            Metric(name="cpu", value=12.5, unit="%"),
        ],
        phases=[Phase(name="boot", outcome=Outcome.PASS, started_s=0, duration_s=1.25)],
    )
    panicked = _attempt(
        Outcome.FAIL,
        2.5,
        messages=[
            Message(
                text="web: kernel panic",
                severity=Severity.ERROR,
                details="Kernel panic - not syncing: <b>\x1b[31m",
                source="console",
            )
        ],
        machines=[web],
        phases=[
            Phase(name="boot", outcome=Outcome.PASS, started_s=0, duration_s=1.25),
            Phase(
                name="build",
                outcome=Outcome.FAIL,
                started_s=1.25,
                duration_s=1,
                message="exit status 2\nand much more",
            ),
        ],
        faults=[
            FaultRecord(id="slow", kind="disk-slow", machine="web", at_s=1.5, cleared_s=1.75),
            FaultRecord(id="cut", kind="power-cut", machine="web", at_s=0, refused="it cannot"),
            FaultRecord(
                id="lag", kind="net-delay", machine="web", at_s=2, parameters={"delay_s": 0.5}
            ),
        ],
        output=[
            Output(
                stream="console",
                text="[    0.0] Linux version 6\r\n"
                "[    1.9] insmod: <script>alert(1)</script>\r\n"
                "[    2.0] Kernel panic - not syncing: <b>\x1b[31m\r\n"
                "[    2.1] Rebooting\r\n",
            )
        ],
    )
    begun = Attempt(
        outcome=Outcome.PENDING,
        started=STARTED,
        phases=[Phase(name="boot", outcome=Outcome.PENDING, started_s=0)],
    )
    names = {"test_two": passed, "test_panic": panicked, "test_begun": begun}
    return Run(
        id="20261121T093000Z-0000feed",
        tool="vmlab test",
        version="0.1.0",
        started=STARTED,
        seed=7,
        command=["vmlab", "test", "--vm-seed", "7"],
        environment={"hostname": "lab", "system": "Linux", "kernel": "6.1"},
        suites=[
            Suite(
                name="net",
                tests=[
                    Test(suite="net", name=name, hypervisor="qemu", attempts=[attempt])
                    for name, attempt in names.items()
                ],
            )
        ],
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


@pytest.fixture
def recorder(tmp_path: Path, turnable: TurnableClock) -> Iterator[Recorder]:
    with Recorder.create(tmp_path / "run", tool="t", clock=turnable.clock) as recorder:
        yield recorder


@pytest.fixture
def attempt(recorder: Recorder) -> AttemptRecorder:
    return recorder.start("s", "t")


@pytest.fixture(scope="session")
def ctrf_schema() -> jsonschema.protocols.Validator:
    """The schema as the npm package `ctrf` 0.3.0 publishes it; see its README beside it."""
    schema = json.loads((Path(__file__).parent / "data/ctrf/ctrf-schema-0.0.json").read_text())
    return jsonschema.Draft7Validator(schema, format_checker=jsonschema.FormatChecker())


@pytest.fixture(scope="session")
def junit_schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(Path(__file__).parent / "data" / "junit-10.xsd"))

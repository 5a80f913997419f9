"""`vmlab conformance`: what it prints, writes and exits with, wherever it is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mutants import mutants
from mutants.base import BrokenHypervisor, BrokenMachine, BrokenProvider

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import main
from vmlab.conformance.audits import AUDITS
from vmlab.conformance.plugin import TOOL, run_suite
from vmlab.conformance.registry import checks
from vmlab.conformance.session import Session, Settings
from vmlab.conformance.simulated import profile as simulated
from vmlab.conformance.together import TOGETHER
from vmlab.hypervisors.base import HypervisorProvider, Probe
from vmlab.hypervisors.simulated import provider
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import HypervisorUnavailable, InvalidSpec, VmlabError
from vmlab.report import Outcome, read_run

BY_NAME = {mutant.name: mutant for mutant in mutants()}


def broken(name: str, settings: Settings) -> Session:
    """A session whose hypervisors are one mutant."""
    mutant = BY_NAME[name]
    return Session(settings, lambda _: mutant.subject().provider, lambda _: mutant.profile)


def test_suite_passes_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, junit = tmp_path / "out.json", tmp_path / "out.xml"
    files = ["--json", str(json_file), "--junitxml", str(junit)]
    chosen = ["--seed", "3", "--select", "snapshot.*", "--select", "fork.*"]
    status = main(["conformance", "simulated", *chosen, *files])
    out = capsys.readouterr().out
    assert status == ExitCode.OK
    assert "proven" in out and "memory-snapshot" in out and "SECONDS (median)" in out
    run = read_run(json_file)
    assert run.tool == TOOL and run.seed == 3 and run.outcome is Outcome.PASS
    assert run.totals.tests == run.totals.passed == 11
    test = run.test("simulated", "snapshot.memory-returns", "simulated")
    assert test.labels["clause"] == checks()["snapshot.memory-returns"].clause
    assert any(check.expected for check in test.checks)
    assert {metric.unit for metric in test.metrics} == {"s"}
    assert any("simulated: proven: " in message.text for message in run.messages)
    assert "--select=snapshot.*" in run.command
    assert junit.read_bytes().startswith(b"<?xml")


def test_whole_suite_in_a_hostile_directory(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise SystemExit(7)\n")
    environment = {**os.environ, "PYTEST_ADDOPTS": "--neither-this", "PYTEST_PLUGINS": "no_such"}
    ended = subprocess.run(
        [sys.executable, "-m", "vmlab", "conformance", "simulated"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == ExitCode.OK, ended.stdout + ended.stderr
    assert f"PASS: {len(checks())} tests" in ended.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conftest.py", "pytest.ini"]


def test_what_a_killed_run_leaves_is_cleared_by_the_next(tmp_path: Path) -> None:
    environment = {**os.environ, "VMLAB_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "vmlab", "conformance", "simulated"]
    runs = tmp_path / "home" / "runs"
    with subprocess.Popen(
        [*command, "--seeds", "3000"], env=environment, stderr=subprocess.DEVNULL
    ) as running:
        try:
            while not any(b"start" in it.read_bytes() for it in runs.glob("*/report/*/main.jsonl")):
                assert running.poll() is None
                time.sleep(0.01)
        finally:
            running.kill()
    (left,) = runs.glob("*/run.json")
    sockets = json.loads(left.read_text())["runtime"]
    ended = subprocess.run(
        [*command, "--select", "pause.*"], env=environment, capture_output=True, check=False
    )
    assert ended.returncode == ExitCode.OK, ended.stderr
    assert list(runs.iterdir()) == []
    assert sockets is None or not Path(sockets).exists()


def test_plain_pytest_runs_the_suite_on_the_simulator(tmp_path: Path) -> None:
    arguments = ["--pyargs", "vmlab.conformance", "-q", "-k", "errors.", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "7 passed" in ended.stdout


def test_failure_is_told_with_what_was_expected(tmp_path: Path) -> None:
    session = broken("ForgetsMemory", Settings(("simulated",), patterns=("snapshot.*",)))
    run = run_suite(session, tmp_path / "run", ["vmlab", "conformance", "simulated"])
    test = run.test("simulated", "snapshot.memory-returns", "simulated")
    assert test.outcome is Outcome.FAIL
    assert "memory" in test.reason and "expected" in test.reason
    assert run.test("simulated", "snapshot.list", "simulated").outcome is Outcome.PASS
    standing = session.standings()[0]
    assert "memory-snapshot" in standing.disproven
    assert "pause" in standing.unproven or "pause" in standing.disproven


def test_finding_of_an_audit_is_told_under_its_name(tmp_path: Path) -> None:
    session = broken("LeaksFile", Settings(("simulated",), patterns=("delete.idempotent",)))
    run = run_suite(session, tmp_path / "run", [])
    test = run.test("simulated", "delete.idempotent", "simulated")
    assert [check.name for check in test.checks if not check.outcome.ok] == ["audit.files"]
    assert test.reason.startswith("[audit.files]")


class _PinsAnyway(BrokenMachine):
    """Can pin vCPUs although its hypervisor does not declare it."""

    async def pin(self, pinning: Any, **options: Any) -> None:
        self.hardware.pinning = dict(pinning)


class _HidesPinning(BrokenHypervisor):
    machine_class = _PinsAnyway

    async def capabilities(self) -> Capabilities:
        return (await super().capabilities()).without(Capability.PINNING)


def test_undeclared_that_works_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = (lambda _: BrokenProvider(_HidesPinning), lambda _: simulated)
    monkeypatch.setattr(Session.__init__, "__defaults__", defaults)
    status = main(["conformance", "simulated", "--select", "capability.*"])
    out, err = capsys.readouterr()
    assert status == ExitCode.FAILED
    assert "[3/4] capability.undeclared" not in err and "capability.required (simulated)" in err
    assert "works, not declared" in out and "MISSING" in out and "pinning" in out
    assert "again: vmlab conformance simulated" in out


def test_unreliable_profile_needs_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["conformance", "simulated", "--option", "profile=unreliable"]
    assert main(arguments) == ExitCode.CANNOT
    assert "--seeds" in capsys.readouterr().err
    assert main([*arguments, "--seeds", "3", "--seed", "40"]) == ExitCode.OK
    assert "walked from seeds 40 to 42" in capsys.readouterr().out


def test_several_hypervisors_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    class Second(HypervisorProvider):
        name = "second"
        summary = "the simulator under another name"

        def probe(self) -> Probe:
            return provider.probe()

        open = provider.open

    by_name = {"simulated": provider, "second": Second()}
    session = Session(
        Settings(("simulated", "second"), {"second:profile": "performance"}, patterns=(TOGETHER,)),
        by_name.__getitem__,
        lambda _: simulated,
    )
    assert [case.id for case in session.cases] == [TOGETHER]
    result = session.run(session.cases[0])
    assert result.outcome is Outcome.PASS, result.reason
    both = Session(
        Settings(
            ("simulated", "second"), {"second:profile": "performance"}, patterns=("lifecycle.*",)
        ),
        by_name.__getitem__,
        lambda _: simulated,
    )
    for case in both.cases:
        both.run(case)
    timings = both.timings()["start"]
    assert timings["second"] < timings["simulated"]


def test_unknown_hypervisor_and_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "simulatd"]) == ExitCode.UNAVAILABLE
    assert "did you mean 'simulated'" in capsys.readouterr().err
    assert main(["conformance", "simulated", "--option", "profile"]) == ExitCode.USAGE
    assert main(["conformance", "simulated", "--option", "profil=standard"]) == ExitCode.USAGE
    assert main(["conformance", "simulated", "--spec", "no-such.toml"]) == ExitCode.USAGE
    assert main(["conformance"]) == ExitCode.USAGE
    assert main(["conformance", "simulated", "--select", "no.such"]) == ExitCode.CANNOT
    assert "--list" in capsys.readouterr().err


def test_unavailable_hypervisor_says_why() -> None:
    class Absent(HypervisorProvider):
        name = "absent"
        summary = "not here"

        def probe(self) -> Probe:
            return Probe(hypervisor="absent", available=False, reason="no such program")

        open = provider.open

    with pytest.raises(HypervisorUnavailable, match="no such program") as refused:
        Session(Settings(("absent",)), lambda _: Absent(), lambda _: simulated)
    assert refused.value.exit_code == ExitCode.UNAVAILABLE


def test_list_names_every_check_and_audit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--list"]) == ExitCode.OK
    out = capsys.readouterr().out
    for id_ in (*checks(), *AUDITS, TOGETHER):
        assert id_ in out
    assert main(["conformance", "--list", "--select", "pause.*"]) == ExitCode.OK
    assert "snapshot.list" not in capsys.readouterr().out


def test_other_specification(tmp_path: Path) -> None:
    spec = tmp_path / "machine.json"
    spec.write_text(json.dumps({"name": "mine", "memory": "64M", "cpus": 3}))
    session = Session(Settings(("simulated",), spec=spec, patterns=("metrics.*", "fork.copies")))
    outcomes = {case.id: session.run(case) for case in session.cases}
    assert outcomes["metrics.paused"].outcome is Outcome.PASS
    # It has no disk that the guest could write to.
    assert outcomes["fork.copies"].outcome is Outcome.SKIP
    assert "disk" in outcomes["fork.copies"].reason


def test_nothing_proven_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "machine.json"
    spec.write_text(json.dumps({"name": "mine", "memory": "64M"}))
    arguments = ["conformance", "simulated", "--spec", str(spec), "--select", "fork.copies"]
    assert main(arguments) == ExitCode.FAILED
    assert "nothing was proven" in capsys.readouterr().out


def test_without_pytest_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert main(["conformance", "simulated"]) == ExitCode.CANNOT
    assert "vmlab[test]" in capsys.readouterr().err


def test_pytest_that_cannot_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(Settings(("simulated",), patterns=("pause.*",)))
    monkeypatch.setattr("pytest.main", lambda *_, **__: pytest.ExitCode.USAGE_ERROR)
    with pytest.raises(VmlabError, match="USAGE_ERROR"):
        run_suite(session, tmp_path / "run", [])
    monkeypatch.setattr("pytest.main", lambda *_, **__: pytest.ExitCode.INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        run_suite(session, tmp_path / "again", [])
    # What was planned and not run is in the report all the same.
    assert read_run(tmp_path / "again").totals.pending == 1


def test_progress_is_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["conformance", "simulated", "--select", "pause.*"]) == ExitCode.OK
    assert "[1/1] pause.stands-still" in capsys.readouterr().err


def test_options_reach_the_hypervisor() -> None:
    with pytest.raises(InvalidSpec, match="profile"):
        Session(Settings(("simulated",), {"profile": "no-such"}))

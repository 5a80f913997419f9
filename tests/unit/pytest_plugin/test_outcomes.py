"""How tests with machines end is in the report, from before their machines exist."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.unit.pytest_plugin.conftest import Project, only

from vmlab.report import Outcome, read_run

pytest_plugins = ["pytester"]

OUTCOMES = """
    import pytest

    @pytest.fixture
    def broken():
        raise RuntimeError("a fixture broke")

    @pytest.fixture
    def breaks_later():
        yield
        raise RuntimeError("clearing up broke")

    def test_passes(vm):
        assert vm.alive
        print("said by the test")
        vm.record("answer_s", 1.5, unit="s")

    def test_fails(vm):
        assert vm.name == "somebody else"

    def test_is_in_error(broken, vm):
        pass

    def test_breaks_afterwards(breaks_later, vm):
        pass

    def test_is_skipped(vm):
        pytest.skip("for a reason")

    @pytest.mark.skip(reason="never")
    def test_is_never_begun(vm):
        pass

    @pytest.mark.xfail(reason="known")
    def test_fails_as_declared(vm):
        assert not vm.alive

    @pytest.mark.xfail(strict=True)
    def test_passes_undeclared(vm):
        pass

    def test_needs_no_machine():
        pass
"""


def test_each_outcome_of_pytest_is_one_of_the_report(project: Project) -> None:
    project.write(test_it=OUTCOMES)
    result = project.run()
    result.assert_outcomes(passed=3, failed=2, errors=2, skipped=2, xfailed=1)
    assert project.outcomes() == {
        "test_passes": "pass",
        "test_fails": "fail",
        "test_is_in_error": "error",
        "test_breaks_afterwards": "error",
        "test_is_skipped": "skip",
        "test_is_never_begun": "skip",
        "test_fails_as_declared": "xfail",
        "test_passes_undeclared": "fail",
        "test_needs_no_machine": "pass",
    }
    tests = project.tests()
    assert tests["test_is_skipped"].reason == "for a reason"
    assert tests["test_is_never_begun"].reason == "never"
    assert "somebody else" in tests["test_fails"].reason
    assert tests["test_is_in_error"].reason == "RuntimeError: a fixture broke"
    assert tests["test_breaks_afterwards"].reason == "RuntimeError: clearing up broke"
    assert tests["test_passes"].hypervisor == "simulated"
    assert tests["test_needs_no_machine"].hypervisor is None


def test_a_test_tells_its_phases_machines_metrics_and_output(project: Project) -> None:
    project.write(test_it=OUTCOMES)
    project.run("-k", "test_passes and not undeclared")
    attempt = project.tests()["test_passes"].attempts[-1]
    assert [(phase.name, phase.outcome.value) for phase in attempt.phases] == [
        ("setup", "pass"),
        ("call", "pass"),
        ("teardown", "pass"),
    ]
    (machine,) = attempt.machines
    assert machine.name == "vm" and machine.hypervisor == "simulated"
    assert machine.spec["name"] == "vm"
    assert "start" in [mark.kind for mark in machine.timeline]
    metrics = {metric.name: metric for metric in attempt.metrics}
    assert metrics["answer_s"].value == 1.5 and metrics["answer_s"].unit == "s"
    assert {"start_s", "vcpu_s", "memory_bytes", "disk_written_bytes"} <= set(metrics)
    assert [(stream.stream, stream.text) for stream in attempt.output] == [
        ("stdout", "said by the test\n")
    ]


def test_a_failure_keeps_console_and_specification_and_shows_the_consoles_end(
    project: Project,
) -> None:
    project.write(test_it=OUTCOMES)
    result = project.run("-k", "test_fails and not declared")
    attempt = project.tests()["test_fails"].attempts[-1]
    kept = {artifact.name: artifact for artifact in attempt.artifacts}
    assert {"vm-console-serial.log", "vm-machine-spec.json"} <= set(kept)
    console = only(project.reports) / kept["vm-console-serial.log"].path
    assert "login:" in console.read_text()
    result.stdout.fnmatch_lines(["*vm: console-serial.log (its end)*", "*login:*"])


def test_where_the_report_is_and_what_makes_the_same_happen_again_is_said(
    project: Project,
) -> None:
    project.write(test_it="def test_a(vm): pass")
    result = project.run("--vm-seed", "42")
    directory = only(project.reports)
    result.stdout.fnmatch_lines(
        [
            f"report: {directory}/report.json",
            f"report: {directory}/report.xml",
            f"report: {directory}/report.html",
            "seed: 42 (again: --vm-seed=42)",
        ]
    )
    run = project.report()
    assert run.seed == 42
    assert run.command[0] == "pytest" and run.command[-2:] == ("--vm-seed", "42")
    assert (project.reports / "latest").resolve() == directory


def test_everything_is_pending_before_the_first_machine_is_made(project: Project) -> None:
    project.write(
        conftest="""
            import pathlib
            import pytest
            from vmlab.report import read_run

            @pytest.fixture
            def known(request):
                (run,) = pathlib.Path(request.config.getoption("vm_report")).iterdir()
                return {test.name: len(test.attempts) for test in read_run(run).tests()}
        """,
        test_it="""
            def test_first(known, vm):
                assert known == {
                    "test_first[simulated]": 1, "test_second[simulated]": 0, "test_third": 0,
                }

            def test_second(vm):
                pass

            def test_third():
                pass
        """,
    )
    project.run().assert_outcomes(passed=3)


def test_what_ran_again_has_several_attempts(project: Project) -> None:
    project.write(
        conftest="""
            from _pytest.runner import runtestprotocol

            def pytest_runtest_protocol(item, nextitem):
                item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
                for attempt in range(2):
                    reports = runtestprotocol(item, nextitem=nextitem, log=False)
                    if all(report.passed for report in reports):
                        break
                for report in reports:
                    item.ihook.pytest_runtest_logreport(report=report)
                return True
        """,
        test_it="""
            tried = []

            def test_flaky(vm):
                tried.append(vm.name)
                assert len(tried) > 1
        """,
    )
    project.run().assert_outcomes(passed=1)
    test = project.tests()["test_flaky"]
    assert [attempt.outcome for attempt in test.attempts] == [Outcome.FAIL, Outcome.PASS]
    assert test.flaky


def test_what_is_known_when_the_runner_is_killed_stays_known(project: Project) -> None:
    project.write(
        test_it="""
            import os, pathlib, time

            def test_before(vm):
                pass

            def test_meanwhile(vm):
                os.write(1, b"now\\n")
                time.sleep(600)

            def test_after(vm):
                pass
        """
    )
    runner = subprocess.Popen(
        project.command("-s"), cwd=project.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert runner.stdout is not None
    with runner.stdout as said:
        seen = b""
        while b"now\n" not in seen:
            line = said.readline()
            assert line, seen.decode()
            seen += line
        os.kill(runner.pid, signal.SIGKILL)
        runner.wait()
    directory = only(project.reports)
    assert not (directory / "report.json").exists()
    run = read_run(directory)
    outcomes = {test.name: (test.outcome.value, len(test.attempts)) for test in run.tests()}
    assert outcomes == {
        "test_before[simulated]": ("pass", 1),
        "test_meanwhile[simulated]": ("pending", 1),
        "test_after[simulated]": ("pending", 0),
    }
    assert run.finished is None


def test_nothing_is_left_of_machines(project: Project, tmp_path: Path) -> None:
    project.write(test_it=OUTCOMES)
    home = tmp_path / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMLAB_HOME", str(home))
        project.run()
    assert [*(home / "runs").iterdir()] == []


def test_the_peak_of_a_processs_memory_is_read_from_the_host() -> None:
    from vmlab.pytest_plugin.supervision import peak_memory

    peak = peak_memory(os.getpid())
    assert peak is not None and peak > 1 << 20
    assert peak_memory(None) is None
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert peak_memory(ended.pid) is None

"""pytest-xdist: one run, one report, one seed; a worker that dies is the error of its test."""

from __future__ import annotations

import subprocess
import time

import psutil
from tests.unit.pytest_plugin.conftest import Project, only

pytest_plugins = ["pytester"]


def test_workers_record_in_one_report_and_share_the_seed(project: Project) -> None:
    project.write(
        test_it="""
            import pytest

            @pytest.mark.parametrize("number", range(4))
            def test_passes(vm, vm_seed, number):
                print(f"seed {vm_seed}.")

            def test_fails(vm):
                assert vm.name == "somebody else"

            def test_needs_no_machine():
                pass
        """
    )
    done = project.run_apart("-n", "2", "--vm-seed", "42")
    assert done.returncode == 1, done.stdout
    directory = only(project.reports)
    assert f"report: {directory}/report.html" in done.stdout
    assert "seed: 42 (again: --vm-seed=42)" in done.stdout
    run = project.report()
    outcomes = sorted((test.name, test.outcome.value) for test in run.tests())
    assert outcomes == [
        ("test_fails[simulated]", "fail"),
        ("test_needs_no_machine", "pass"),
        *((f"test_passes[simulated-{number}]", "pass") for number in range(4)),
    ]
    assert {test.hypervisor for test in run.tests()} == {"simulated", None}
    workers = {attempt.worker for test in run.tests() for attempt in test.attempts}
    assert workers == {"gw0", "gw1"}
    assert run.seed == 42 and run.finished is not None
    assert not (directory / "shared").exists()
    # The same seed gives a test the same of its own, also without workers.
    said = {
        test.name: test.output[0].text for test in run.tests() if test.name.startswith("test_p")
    }
    assert len(set(said.values())) == 4
    project.run("--vm-seed", "42")
    again = {
        test.name: test.output[0].text
        for test in project.report().tests()
        if test.name.startswith("test_p")
    }
    assert again == said


def test_a_worker_that_dies_is_the_error_of_its_test(project: Project) -> None:
    project.write(
        test_it="""
            import os, signal

            def test_before(vm):
                pass

            def test_kills_its_worker(vm):
                os.kill(os.getpid(), signal.SIGKILL)

            def test_after(vm):
                pass
        """
    )
    done = project.run_apart("-n", "1")
    assert done.returncode == 1, done.stdout
    tests = project.tests()
    assert {name: test.outcome.value for name, test in tests.items()} == {
        "test_before": "pass",
        "test_kills_its_worker": "error",
        "test_after": "pass",
    }
    killed = tests["test_kills_its_worker"]
    assert [attempt.outcome.value for attempt in killed.attempts] == ["pending", "error"]
    assert killed.hypervisor == "simulated"
    assert "crashed" in killed.reason


def test_workers_die_with_their_controller(project: Project) -> None:
    project.write(
        test_it="""
            import os, pathlib, time

            def test_takes_its_time(vm_off):
                pathlib.Path("pid").write_text(f"{os.getpid()}\\n")
                try:
                    time.sleep(600)
                except KeyboardInterrupt:
                    pathlib.Path("asked").touch()
        """
    )
    controller = subprocess.Popen(
        project.command("-n", "1"), cwd=project.path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    told = project.path / "pid"
    while not told.exists() or not told.read_text().endswith("\n"):
        assert controller.poll() is None
        time.sleep(0.05)
    worker = psutil.Process(int(told.read_text()))
    controller.kill()
    controller.wait()
    _, alive = psutil.wait_procs([worker], timeout=120)
    assert not alive
    # By itself it would have been interrupted after some seconds, and gone on to the test's end.
    assert not (project.path / "asked").exists()

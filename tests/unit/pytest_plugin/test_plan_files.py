"""Plan files as tests: which there are, how they end, and the tests that ran in their guests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.pytest_plugin.conftest import Project

import vmlab.lab.plans
import vmlab.pytest_plugin.plans
from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Probe
from vmlab.lab.plans import PhaseResult, PlanResult
from vmlab.lab.plans.guest_tests import GuestTest
from vmlab.lab.vm import VM
from vmlab.report import Outcome

pytest_plugins = ["pytester"]

ONE = "[[phases]]\nname = 'a'\nrun = 'true'\n"


def plan(project: Project, text: str = ONE, name: str = "hello") -> Path:
    path: Path = project.path / f"{name}.vmlab.toml"
    path.write_text(text)
    return path


def collected(project: Project, *words: str) -> list[str]:
    done = project.run("--collect-only", "-q", *words, on=())
    return [line for line in done.outlines if "::" in line]


def test_a_plan_is_a_test_on_the_hypervisor_that_would_be_taken(project: Project) -> None:
    plan(project)
    plan(project, ONE + "[machine]\nhypervisor = 'simulated'\n", "other")
    found = collected(project)
    assert found[0] in {"hello.vmlab.toml::plan[embedded]", "hello.vmlab.toml::plan[qemu]"}
    assert found[1] == "other.vmlab.toml::plan[simulated]"


def test_what_the_embedded_engine_cannot_do_is_left_to_qemu(project: Project) -> None:
    plan(project, "shares = [{source = '.', target = '/src', readonly = false}]\n" + ONE)
    assert collected(project) == ["hello.vmlab.toml::plan[qemu]"]
    plan(project, ONE + "[machine]\nimage = 'debian-12-amd64-dev'\n")
    assert collected(project) == ["hello.vmlab.toml::plan[qemu]"]


def test_each_cell_is_a_test(project: Project) -> None:
    plan(
        project,
        ONE + "[matrix]\nhypervisors = ['simulated', 'qemu']\narchitectures = ['riscv64', 'amd64']"
        "\nexclude = [{hypervisor = 'qemu', architecture = 'riscv64'}]\n",
    )
    assert collected(project) == [
        "hello.vmlab.toml::riscv64[simulated]",
        "hello.vmlab.toml::x86_64[simulated]",
        "hello.vmlab.toml::x86_64[qemu]",
    ]
    assert collected(project, "-k", "qemu") == ["hello.vmlab.toml::x86_64[qemu]"]


def test_an_image_of_another_architecture_makes_no_cell(project: Project) -> None:
    matrix = "[matrix]\nhypervisors = ['qemu']\nimages = {}\narchitectures = ['riscv64']\n"
    images = "['debian-12-amd64-tiny', 'debian-13-riscv64-tiny']"
    plan(project, ONE + matrix.format(images))
    assert collected(project) == ["hello.vmlab.toml::debian-13-riscv64-tiny[qemu]"]
    plan(project, ONE + matrix.format("['debian-12-amd64-tiny']"))
    done = project.run("--collect-only", "-q", on=())
    done.stdout.fnmatch_lines(["*matrix.images = *: an image of one of the architectures*"])


def test_options_choose_hypervisors_as_for_other_tests(project: Project) -> None:
    plan(project, ONE + "[matrix]\nhypervisors = ['qemu']\n", "matrix")
    plan(project)
    words = ("--vm-hypervisor", "simulated")
    assert collected(project, *words) == [
        "hello.vmlab.toml::plan[simulated]",
        "matrix.vmlab.toml::plan[qemu]",
    ]
    done = project.run("matrix.vmlab.toml", "-rs")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*runs on qemu, and --vm-hypervisor names others*"])


def test_a_plan_that_is_wrong_is_told_without_a_traceback(project: Project) -> None:
    plan(project, "[[phases]]\nname = 'a'\nrn = 'true'\n")
    plan(project, ONE + "[matrix]\nhypervisors = ['simulatd']\n", "other")
    done = project.run(on=())
    done.assert_outcomes(errors=2)
    done.stdout.fnmatch_lines(["*phases.0.rn = 'true': no such field; did you mean 'run'?*"])
    done.stdout.fnmatch_lines(["*simulatd*"])
    assert "Traceback" not in done.stdout.str()
    assert "plans.py" not in done.stdout.str()


def test_guests_that_take_no_commands_are_told(project: Project) -> None:
    plan(project)
    done = project.run()
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*does not have the capability 'commands in guests'*"])
    done.stdout.fnmatch_lines(["hint: its guests are simulated*"])


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[PlanResult], list[dict[str, Any]]]:
    """Have plans end so, whatever they say; what they were run with is kept."""

    def use(result: PlanResult) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = []

        def run_plan(vm: VM, plan: object, attempt: object, *, artifacts: Path) -> PlanResult:
            assert artifacts.is_dir()
            runs.append({"vm": vm, "plan": plan, "artifacts": artifacts, "spec": vm.spec})
            return result

        monkeypatch.setattr(vmlab.lab.plans, "run_plan", run_plan)
        return runs

    return use


PASSED = (PhaseResult("a", Outcome.PASS, 1.0, 0),)
TESTS = tuple(
    ("/tmp/r.xml", test)
    for test in (
        GuestTest("s / good", Outcome.PASS, 0.5, output="said"),
        GuestTest("s / bad", Outcome.FAIL, message="1 != 2", details="line 7"),
        GuestTest("s / broken", Outcome.ERROR, message="no memory"),
        GuestTest("s / not now", Outcome.SKIP, message="needs a disk"),
        GuestTest("s / known", Outcome.XFAIL, message="bug 5"),
    )
)


def test_a_plan_s_machine_is_as_it_says_and_goes(
    project: Project, ending: Callable[[PlanResult], list[dict[str, Any]]]
) -> None:
    runs = ending(PlanResult(PASSED))
    plan(
        project,
        ONE + "[machine]\nname = 'box'\nmemory = '256M'\ncpus = 3\n"
        "disks = [{name = 'data', size = '64M'}]\n",
    )
    project.run().assert_outcomes(passed=1)
    (run,) = runs
    spec = run["spec"]
    assert (spec.name, spec.memory.size, spec.cpus.count) == ("box", 256 << 20, 3)
    assert [disk.name for disk in spec.disks] == ["data"]
    assert run["vm"].lab.machines == []
    assert not run["artifacts"].exists()
    (test,) = project.report().tests()
    assert (test.suite, test.name, test.hypervisor) == (
        "hello.vmlab.toml", "plan[simulated]", "simulated",
    )  # fmt: skip
    assert [machine.name for machine in test.attempts[0].machines] == ["box"]


def test_tests_in_the_guest_are_tests_of_pytest_s_and_of_the_report(
    project: Project, ending: Callable[[PlanResult], list[dict[str, Any]]]
) -> None:
    ending(PlanResult(PASSED, TESTS))
    plan(project)
    done = project.run()
    # The plan itself has passed.
    done.assert_outcomes(passed=2, failed=2, skipped=1, xfailed=1)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["*hello.vmlab.toml: plan?simulated? :: s / bad*", "*1 != 2*"])
    tests = {test.name: test for test in project.report().tests()}
    assert {name: test.outcome.value for name, test in tests.items()} == {
        "plan[simulated]": "pass",
        "plan::s / good[simulated]": "pass",
        "plan::s / bad[simulated]": "fail",
        "plan::s / broken[simulated]": "error",
        "plan::s / not now[simulated]": "skip",
        "plan::s / known[simulated]": "xfail",
    }
    assert tests["plan::s / bad[simulated]"].reason == "1 != 2"
    assert tests["plan::s / not now[simulated]"].reason == "needs a disk"
    assert tests["plan::s / good[simulated]"].output[0].text == "said"


def test_a_plan_that_fails_says_which_phases(
    project: Project, ending: Callable[[PlanResult], list[dict[str, Any]]]
) -> None:
    failed = (
        PhaseResult("build", Outcome.FAIL, 2.0, 2, "exit status 2: no rule"),
        PhaseResult("run", Outcome.SKIP, message="it needs 'build'"),
    )
    ending(PlanResult(failed))
    plan(project)
    done = project.run()
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        ["phase 'build': exit status 2: no rule", "phases: build fail 2.0 s, run skip"]
    )
    assert "plans.py" not in done.stdout.str()
    (test,) = project.report().tests()
    assert test.outcome is Outcome.FAIL
    assert "exit status 2: no rule" in test.reason


def test_a_plan_that_lost_its_guest_is_an_error(
    project: Project, ending: Callable[[PlanResult], list[dict[str, Any]]]
) -> None:
    ending(PlanResult((PhaseResult("build", Outcome.ERROR, 2.0, None, "the guest died"),)))
    plan(project)
    done = project.run()
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*phase 'build': the guest died*", "phases: build error 2.0 s*"])
    (test,) = project.report().tests()
    assert test.outcome is Outcome.ERROR


def test_faults_of_a_plan_are_in_the_report_and_refused_by_name(
    project: Project, ending: Callable[[PlanResult], list[dict[str, Any]]]
) -> None:
    ending(PlanResult(PASSED))
    plan(project, ONE + "[faults]\nfaults = [{kind = 'pause', duration = 1}]\n")
    project.run().assert_outcomes(passed=1)
    (test,) = project.report().tests()
    assert [fault.kind for fault in test.attempts[0].faults] == ["pause"]
    plan(project, ONE + "[faults]\nfaults = [{kind = 'disk-slow', disk = 'no', delay = 1}]\n")
    done = project.run()
    done.assert_outcomes(errors=1)
    assert "'no'" in done.stdout.str()


def test_workers_run_plans_and_tell_of_tests_in_guests(project: Project) -> None:
    plan(project)
    plan(project, name="second")
    (project.path / "conftest.py").write_text(
        "import vmlab.lab.plans\n"
        "from vmlab.lab.plans import PhaseResult, PlanResult\n"
        "from vmlab.lab.plans.guest_tests import GuestTest\n"
        "from vmlab.report import Outcome\n"
        "RESULT = PlanResult((PhaseResult('a', Outcome.PASS),),\n"
        "    (('/r', GuestTest('bad', Outcome.FAIL, message='why')),))\n"
        "vmlab.lab.plans.run_plan = lambda *given, **more: RESULT\n"
    )
    done = project.run_apart("-n", "2")
    assert done.returncode == 1, done.stdout
    assert "2 failed, 2 passed" in done.stdout
    assert sorted(test.name for test in project.report().tests()) == [
        "plan::bad[simulated]", "plan::bad[simulated]", "plan[simulated]", "plan[simulated]",
    ]  # fmt: skip


def test_a_project_without_plans_imports_nothing_for_them(project: Project) -> None:
    (project.path / "test_a.py").write_text(
        "import sys\ndef test_a():\n    assert 'vmlab.pytest_plugin.plans' not in sys.modules\n"
        "    assert 'pydantic' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"],
        cwd=project.path, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_hypervisor_that_is_not_here_skips_marks_and_plans_alike(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry.provider

    def provider(name: str) -> Any:
        if name != "qemu":
            return known(name)
        lacking = Probe(hypervisor="qemu", available=False, reason="no program of that name")
        return SimpleNamespace(probe=lambda: lacking)

    monkeypatch.setattr(registry, "provider", provider)
    plan(project, "[machine]\nhypervisor = 'qemu'\n" + ONE)
    project.write(
        test_it="import pytest\n@pytest.mark.vm(hypervisors=['qemu'])\ndef test_it(vm): pass\n"
    )
    project.run(on=()).assert_outcomes(skipped=2)
    reasons = {test.reason for test in project.tests().values()}
    assert reasons == {"needs qemu: no program of that name"}

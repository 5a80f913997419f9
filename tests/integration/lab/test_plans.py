"""Plans in real guests: the examples, and what only a real guest can show; one boot for all."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.lab.laboratory import Lab
from vmlab.lab.plans import Plan, PlanResult, run_plan
from vmlab.lab.vm import VM
from vmlab.report import Attempt, Outcome, Recorder, read_run

pytestmark = [pytest.mark.boots, pytest.mark.timeout(1200)]

EXAMPLES = Path(__file__).parents[3] / "examples" / "plans"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of a program, built as it says."""
    need("qemu-system-x86_64")
    place = tmp_path_factory.mktemp("example") / "user-space"
    shutil.copytree(EXAMPLES / "user-space", place)
    subprocess.run(["make", "CC=x86_64-linux-gnu-gcc"], cwd=place, check=True, timeout=120)
    return place


@pytest.fixture(scope="module")
def vm(sources: Path) -> Iterator[VM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
        with Lab(hypervisor="qemu", image="debian-12-amd64-tiny") as lab:
            yield lab.vm(disks=["64M"], shares=[f"{sources}:/src"])


def run(vm: VM, plan: Plan, place: Path) -> tuple[PlanResult, Attempt]:
    with Recorder.create(place / "report", tool="test") as recorder:
        attempt = recorder.start("suite", "plan", hypervisor="qemu")
        result = run_plan(vm, plan, attempt, artifacts=place / "artifacts")
        attempt.finish(result.outcome, reason=result.message or None)
    (test,) = read_run(place / "report").tests()
    return result, test.attempts[0]


def test_a_program_s_tests_in_the_guest_are_tests_of_their_own(
    vm: VM, sources: Path, tmp_path: Path
) -> None:
    result, attempt = run(vm, Plan.load(sources / "sums.vmlab.toml"), tmp_path)
    assert result.outcome is Outcome.PASS, result.message
    assert [(test.name, test.outcome) for _, test in result.tests] == [
        ("nothing adds up to nothing", Outcome.PASS),
        ("numbers are added", Outcome.PASS),
        ("numbers may be negative", Outcome.PASS),
        ("what is no number is refused", Outcome.PASS),
    ]
    (metric,) = [metric for metric in attempt.metrics if metric.name == "sum_200000_s"]
    assert metric.unit == "s"
    assert metric.value >= 0
    assert "20000100000" in "".join(output.text for output in attempt.output)


def test_a_file_system_is_made_filled_and_checked_on_a_disk(vm: VM, tmp_path: Path) -> None:
    result, attempt = run(vm, Plan.load(EXAMPLES / "file-system" / "remount.vmlab.toml"), tmp_path)
    assert result.outcome is Outcome.PASS, result.message
    ((path, sums),) = result.artifacts
    assert path == "/tmp/sums"
    assert len(sums.read_text().splitlines()) == 100
    assert [artifact.name for artifact in attempt.artifacts] == ["/tmp/sums"]


def test_a_phase_s_time_is_up_in_the_guest_too(vm: VM, tmp_path: Path) -> None:
    plan = Plan.parse(
        'phases = [{name = "hang", run = "sleep 4242", timeout = 2},'
        ' {name = "look", needs = [], run = "while pgrep -f \'[s]leep 4242\'; do sleep 0.1; done"}]'
    )
    result, _ = run(vm, plan, tmp_path)
    assert [phase.outcome for phase in result.phases] == [Outcome.FAIL, Outcome.PASS]


def test_nothing_is_run_in_a_guest_that_died_in_a_phase(vm: VM, tmp_path: Path) -> None:
    # The last one here: it takes the guest with it.
    plan = Plan.parse(
        'phases = [{name = "before", run = "echo here"},'
        ' {name = "panic", run = "echo c >/proc/sysrq-trigger; sleep 600"},'
        ' {name = "after", needs = ["before"], run = "true"}]'
    )
    vm.succeed("echo 1 >/proc/sys/kernel/sysrq; echo 0 >/proc/sys/kernel/panic")
    result, attempt = run(vm, plan, tmp_path)
    before, panic, after = result.phases
    assert before.outcome is Outcome.PASS
    assert panic.outcome is Outcome.ERROR
    assert after.outcome is Outcome.SKIP
    assert after.message == "the guest was lost in phase 'panic'"
    assert "here" in "".join(output.text for output in attempt.output)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_kernel_module_is_built_and_loaded_in_a_guest_with_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("qemu-system-x86_64")
    monkeypatch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
    plan = Plan.load(EXAMPLES / "kernel-module" / "hello.vmlab.toml")
    with Lab(hypervisor="qemu") as lab:
        machine = lab.vm(
            image=plan.machine.image,
            memory=plan.machine.memory,
            cpus=plan.machine.cpus,
            shares=plan.shares,
            timeout=plan.machine.timeout,
        )
        result, _ = run(machine, plan, tmp_path)
    assert result.outcome is Outcome.PASS, result.message
    assert [path for path, _ in result.artifacts] == ["/root/build/hello.ko"]

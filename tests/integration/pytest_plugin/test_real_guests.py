"""Tests that own real machines: what becomes of them, and of the machines, is what pytest says."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from tests.integration.projects import Project
from tests.needs import needs

from vmlab.hypervisors import registry
from vmlab.hypervisors.ownership import Home, Run, Store
from vmlab.report import read_run

pytestmark = [
    pytest.mark.boots,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs("qemu-system-x86_64"),
]

QEMU = ("--vm-hypervisor", "qemu")


def test_outcomes_and_deaths_on_both_hypervisors(project: Project) -> None:
    project.write("""
        import time
        import pytest

        ARM = "echo 1 >/proc/sys/kernel/sysrq; "

        def test_passes(vm):
            assert "Linux" in vm.succeed("uname").stdout
            vm.record("answer", 42)

        @pytest.mark.vm(hypervisors=["qemu"])
        def test_fails(vm):
            vm.succeed("ls /nowhere")

        @pytest.mark.vm(hypervisors=["qemu"])
        def test_panics_while_it_sleeps(vm):
            vm.execute(ARM + "(sleep 1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
            time.sleep(600)

        def test_panics_in_a_call(vm):
            vm.succeed(ARM + "echo c >/proc/sysrq-trigger; sleep 600")

        @pytest.mark.vm(hypervisors=["qemu"])
        def test_powers_off_and_does_not_care(vm):
            try:
                vm.succeed("poweroff -f; sleep 600")
            except Exception:
                pass

        @pytest.mark.vm(hypervisors=["qemu"])
        def test_crashes_as_meant(vm):
            vm.crash()

        @pytest.mark.vm(hypervisors=["qemu"])
        @pytest.mark.xfail
        def test_fails_as_declared(vm):
            vm.fail("true")

        @pytest.mark.vm(hypervisors=["qemu"])
        def test_is_skipped(vm):
            pytest.skip(vm.succeed("echo in the guest").stdout.strip())

        @pytest.mark.vm(hypervisors=["qemu"], image="no-such-image")
        def test_has_no_machine(vm):
            pass
    """)
    said = project.run(*QEMU, "--vm-hypervisor", "embedded")
    tests = project.tests()
    assert {name: test.outcome.value for name, test in tests.items()} == {
        "test_passes[qemu]": "pass",
        "test_passes[embedded]": "pass",
        "test_fails[qemu]": "fail",
        "test_panics_while_it_sleeps[qemu]": "error",
        "test_panics_in_a_call[qemu]": "error",
        "test_panics_in_a_call[embedded]": "error",
        "test_powers_off_and_does_not_care[qemu]": "error",
        "test_crashes_as_meant[qemu]": "pass",
        "test_fails_as_declared[qemu]": "xfail",
        "test_is_skipped[qemu]": "skip",
        "test_has_no_machine[qemu]": "error",
    }, said
    assert tests["test_is_skipped[qemu]"].reason == "in the guest"
    assert "no-such-image" in tests["test_has_no_machine[qemu]"].reason
    # A user reads where the own test failed, and no line of ours.
    assert "ls: /nowhere: No such file" in said and "guest.py" not in said
    for hypervisor in ("qemu", "embedded"):
        passed = tests[f"test_passes[{hypervisor}]"].attempts[-1]
        metrics = {metric.name for metric in passed.metrics}
        assert {"answer", "vcpu_s", "memory_peak_bytes", "disk_written_bytes"} <= metrics
        assert passed.machines[0].accelerator
        panicked = tests[f"test_panics_in_a_call[{hypervisor}]"].attempts[-1]
        assert "Kernel panic - not syncing: sysrq triggered crash" in panicked.reason
        assert "panic" in [mark.kind for mark in panicked.machines[0].timeline]
        kept = {artifact.name for artifact in panicked.artifacts}
        assert {"vm-console-serial.log", "vm-machine-spec.json", "vm-evidence.txt"} <= kept
    kept = {artifact.name for artifact in tests["test_fails[qemu]"].attempts[-1].artifacts}
    assert any("dmesg" in name for name in kept), kept
    assert not project.left()


def test_workers_share_what_was_booted(project: Project) -> None:
    project.write("""
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_it(vm, number):
            vm.succeed("true")
    """)
    said = project.run(*QEMU, "-n", "2")
    tests = project.tests()
    assert {test.outcome.value for test in tests.values()} == {"pass"}, said
    assert len(tests) == 4
    assert {test.attempts[-1].worker for test in tests.values()} == {"gw0", "gw1"}
    machines = [machine for test in tests.values() for machine in test.attempts[-1].machines]
    assert all("boot" not in {mark.kind for mark in machine.timeline} for machine in machines)
    assert not project.left()


def test_the_machine_of_a_failure_is_kept_if_that_is_wanted(project: Project) -> None:
    project.write("""
        def test_passes(vm): vm.succeed("true")
        def test_fails(vm): vm.succeed("echo was here >/root/trace; false")
    """)
    said = project.run(*QEMU, "--vm-keep", "failed")
    (kept,) = [line for line in said.splitlines() if line.startswith("kept: ")]
    name = kept.removeprefix("kept: ").partition(" ")[0]
    assert f"runs on: `vmlab shell {name}`" in kept
    assert project.processes()
    done = subprocess.run(
        [sys.executable, "-m", "vmlab", "shell", name],
        env=project.environment,
        input=b"cat /root/trace\n",
        capture_output=True,
        check=False,
        timeout=300,
    )
    _delete_all(project)
    assert done.stdout == b"was here\n", done.stderr
    assert not project.left()


@pytest.mark.parametrize("all_of_it", [True, False], ids=["all of it", "QEMU alone"])
def test_a_host_that_stands_still_makes_no_guest_silent(project: Project, all_of_it: bool) -> None:
    (project.path / "watchdog.toml").write_text("silence = 5\n")
    project.write("""
        from pathlib import Path

        def test_it(vm):
            Path("began").touch()
            while not Path("thawed").exists():
                vm.succeed("sleep 5")
            Path("ended").touch()
    """)
    with project.start(*QEMU, "--vm-rules", "watchdog.toml", stderr=subprocess.STDOUT) as runner:
        while not (project.path / "began").exists():
            assert runner.poll() is None
            time.sleep(0.05)
        # Long enough that it has been asked for a sign of life; the test does not end meanwhile.
        time.sleep(7)
        frozen = [process for process in project.processes() if process.pid != runner.pid]
        assert any("qemu-system" in (process.info["cmdline"] or [""])[0] for process in frozen)
        if all_of_it:
            frozen.append(psutil.Process(runner.pid))
        for process in frozen:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        time.sleep(12 if all_of_it else 25)
        (project.path / "thawed").touch()
        for process in frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        said, _ = runner.communicate(timeout=1700)
    assert (project.path / "ended").exists(), said.decode()
    assert project.tests()["test_it[qemu]"].outcome.value == "pass", said.decode()


def _delete_all(project: Project) -> None:
    import asyncio

    async def work() -> None:
        owner = Store.open(Home.open(project.home)).owner
        async with registry.provider("qemu").open(owner) as hypervisor:
            for machine in await hypervisor.list():
                await machine.delete(force=True)

    asyncio.run(work())


def test_a_failure_may_be_sat_at(project: Project) -> None:
    project.write("""
        def test_fails(vm):
            colour = "green"
            vm.succeed("echo $((6 * 7)) >/root/answer; false")
    """)
    master, slave = pty.openpty()
    runner = project.start(
        *QEMU, "--vm-sit", stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    try:
        shown = _shows(master, "/# ")
        assert "'echo $((6 * 7)) >/root/answer; false' exited with status 1" in shown
        os.write(master, b"cat /root/ans*\r")
        assert "42\r\n" in _shows(master, "/# ")
        os.write(master, b"exit\r")
        assert "shell(vm) opens a shell in a guest" in _shows(master, ">>> ")
        os.write(master, b"print('from', vm.succeed('hostname').stdout)\r")
        assert "from vm\r\n" in _shows(master, ">>> ")
        os.write(master, b"\x04")
        assert "1 failed" in _shows(master, " failed")
        assert runner.wait(timeout=300) == 1
    finally:
        runner.kill()
        runner.wait()
        os.close(master)
    assert not project.left()


def _shows(master: int, wanted: str, seconds: float = 600) -> str:
    """What a terminal shows up to `wanted`, that included."""
    seen = b""
    deadline = time.monotonic() + seconds
    while wanted.encode() not in seen:
        ready, _, _ = select.select([master], [], [], deadline - time.monotonic())
        assert ready, f"{wanted!r} is not among {seen.decode(errors='replace')}"
        # A byte at a time: what comes after it is for the next one who waits.
        seen += os.read(master, 1)
    return seen.decode(errors="replace")


def test_nothing_is_left_of_a_run_that_was_killed(project: Project) -> None:
    project.write("""
        import os, time

        def test_before(vm): vm.succeed("true")

        def test_meanwhile(vm):
            os.write(2, b"now\\n")
            vm.succeed("sleep 600")

        def test_after(vm): pass
    """)
    runner = project.start(*QEMU, "-s", stderr=subprocess.PIPE)
    assert runner.stdout is not None and runner.stderr is not None
    with runner.stdout, runner.stderr:
        while (line := runner.stderr.readline()) != b"now\n":
            assert line
        os.kill(runner.pid, signal.SIGKILL)
        runner.wait()
    (directory,) = project.reports.iterdir()
    assert {test.name: test.outcome.value for test in read_run(directory).tests()} == {
        "test_before[qemu]": "pass",
        "test_meanwhile[qemu]": "pending",
        "test_after[qemu]": "pending",
    }
    # The next command clears what is left.
    with Run.begin(Home.open(project.home)) as run:
        others = [path for path in run.home.runs.iterdir() if path != run.directory]
        assert others == []
    assert not project.left()

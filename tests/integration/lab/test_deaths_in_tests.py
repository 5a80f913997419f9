"""Every kind of death fails the test that it belongs to, at once and with evidence; no other one.

One run of pytest in which each test's guest dies in another way, with tests that pass in between;
`vmlab debug` then opens what one of them left.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.projects import Project
from tests.needs import needs

from vmlab.report import Attempt, Outcome

pytestmark = [
    pytest.mark.boots,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs("qemu-system-x86_64"),
]

QEMU = ("--vm-hypervisor", "qemu")
MODULE = Path(__file__).parent / "crasher" / "crasher-x86_64.ko"

DYING = f"""
    import os, signal, time
    from pathlib import Path
    import pytest

    pytestmark = pytest.mark.vm(memory="256M")

    @pytest.fixture
    def crasher(vm):
        vm.write("/crasher.ko", Path({str(MODULE)!r}).read_bytes())
        vm.succeed("insmod /crasher.ko")
        return vm

    def dies(vm, how):
        vm.succeed(f"(sleep 0.5; echo {{how}} >/proc/crasher) >/dev/null 2>&1 </dev/null &")
        time.sleep(600)

    def passes(vm):
        vm.succeed("true")

    def test_its_process_is_killed(vm):
        os.kill(vm.info().pid, signal.SIGKILL)
        time.sleep(600)

    def test_oops(crasher): dies(crasher, "oops")
    def test_passes_1(vm): passes(vm)
    def test_bug(crasher): dies(crasher, "bug")
    def test_warns_and_would_pass(crasher): crasher.succeed("echo warn >/proc/crasher")
    def test_passes_2(vm): passes(vm)

    def test_soft_lockup(crasher):
        crasher.succeed("echo 1 >/proc/sys/kernel/watchdog_thresh")
        dies(crasher, "softlockup")

    def test_hung_task(crasher):
        crasher.succeed("echo 2 >/proc/sys/kernel/hung_task_timeout_secs")
        dies(crasher, "hungtask")

    def test_out_of_memory(vm):
        vm.succeed("echo 1 >/proc/sys/vm/overcommit_memory")
        vm.execute("dd if=/dev/zero of=/dev/null bs=1G count=1")

    def test_passes_3(vm): passes(vm)

    def test_panics_as_meant(vm):
        with vm.watchdog.expect("panic"):
            vm.crash()
"""


def reason(attempt: Attempt) -> str:
    return "\n".join([attempt.reason, *(message.text for message in attempt.messages)])


def artifact(project: Project, attempt: Attempt, name: str) -> bytes:
    (found,) = [each for each in attempt.artifacts if each.name == f"vm-{name}"]
    return (project.reports / "latest" / found.path).read_bytes()


def test_each_death_is_of_the_test_that_it_belongs_to(project: Project) -> None:
    project.write(DYING)
    said = project.run(*QEMU)
    assert "report: " in said, said
    found = {name.removesuffix("[qemu]"): test for name, test in project.tests().items()}
    expected = {
        "test_oops": "BUG: kernel NULL pointer dereference",
        "test_bug": "kernel BUG at",
        "test_warns_and_would_pass": "a warning that was asked for",
        "test_soft_lockup": "BUG: soft lockup - CPU#0 stuck for",
        "test_hung_task": "blocked for more than 2 seconds",
        "test_out_of_memory": "Out of memory: Killed process",
        "test_its_process_is_killed": "killed by signal 9",
    }
    for name, test in found.items():
        attempt = test.attempts[-1]
        if name in expected:
            assert test.outcome in {Outcome.FAIL, Outcome.ERROR}, f"{name}\n{said}"
            assert expected[name] in reason(attempt), f"{name}\n{said}"
            others = [text for other, text in expected.items() if other != name]
            assert not any(text in reason(attempt) for text in others), name
        else:
            assert test.outcome is Outcome.PASS, f"{name}\n{said}"
    assert set(expected) < set(found)

    for name in ("test_oops", "test_bug", "test_warns_and_would_pass"):
        reports = artifact(project, found[name].attempts[-1], "kernel-reports.txt")
        assert b"crasher" in reports and b"---[ end trace" in reports
    killed = found["test_its_process_is_killed"].attempts[-1]
    assert b"its memory is gone" in artifact(project, killed, "evidence.txt")
    assert artifact(project, killed, "process-qmp.log")

    # What a test left is opened as it was.
    debug = [sys.executable, "-m", "vmlab", "debug", str(project.reports / "latest")]
    looked = subprocess.run(
        [*debug, "test_warns", "--command", "cat /proc/modules; dmesg"],
        env=project.environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert looked.returncode == 0, looked.stderr
    assert looked.stdout.startswith("crasher ") and "a warning that was asked for" in looked.stdout
    refused = subprocess.run(
        [*debug, "killed"],
        env=project.environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 3
    assert "its memory is gone" in refused.stderr and "--vm-sit" in refused.stderr
    assert not project.left()


@pytest.fixture
def small_disk(project: Project) -> Iterator[None]:
    """The machines' home is on a file system of its own, which a test may fill."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount a file system (root)")
    project.home.mkdir()
    options = ["-t", "tmpfs", "-o", "size=768m,mode=700", "vmlab-test"]
    subprocess.run(["mount", *options, project.home], check=True, timeout=60)
    yield
    subprocess.run(["umount", project.home], check=True, timeout=60)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_of_the_host_fails_the_test_whose_machine_needs_it(project: Project) -> None:
    project.write("""
        import pytest

        pytestmark = pytest.mark.vm(memory="256M")

        @pytest.fixture
        def filled(vm_factory, disk_factory):
            vm = vm_factory(disks=[disk_factory("256M")])
            filler = vm.info().directory / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 20))
                except OSError:
                    pass
            yield vm
            filler.unlink(missing_ok=True)

        def test_fills(filled):
            filled.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=64 conv=fsync")

        def test_passes(vm):
            vm.succeed("true")
    """)
    said = project.run(*QEMU)
    tests = project.tests()
    full = tests["test_fills[qemu]"]
    assert full.outcome in {Outcome.FAIL, Outcome.ERROR}, said
    assert "Input/output error" in reason(full.attempts[-1]), said
    evidence = artifact(project, full.attempts[-1], "evidence.txt")
    assert b"the host's disk is full" in evidence
    # The log's own disk is the full one: it goes on to the end of a page, and no further.
    log = artifact(project, full.attempts[-1], "process-qmp.log")
    assert b"BLOCK_IO_ERROR" in log or len(log) % mmap.PAGESIZE == 0, log[-4096:]
    assert tests["test_passes[qemu]"].outcome is Outcome.PASS, said
    assert not project.left()

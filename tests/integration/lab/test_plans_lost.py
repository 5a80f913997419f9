"""Plans that take their machine down on purpose, with a watchdog: a reboot, and a power cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.report import Outcome, Run, read_run

pytestmark = [pytest.mark.boots, pytest.mark.timeout(1800)]


MACHINE = """
[machine]
hypervisor = "qemu"
image = "debian-12-amd64-tiny"
disks = [{ name = "data", size = "64M", breakable = true }]

[[phases]]
name = "write"
run = '''
echo kept >/tmp/kept
dd if=/tmp/kept of=/dev/vda conv=notrunc,fsync
echo lost >/tmp/lost
dd if=/tmp/lost of=/dev/vda seek=2048 conv=notrunc
'''
"""
VERIFY = """
[[phases]]
name = "verify"
run = '''
dd if=/dev/vda count=1 | grep kept
{}
'''
"""
LOST = "if dd if=/dev/vda skip=2048 count=1 | grep lost; then exit 1; fi"
REBOOT = """
[[phases]]
name = "down"
run = "reboot -f; sleep 600"
continue-on-error = true
"""
CUT = """
[[phases]]
name = "down"
run = "echo CUT NOW >/dev/console; sleep 600"
continue-on-error = true
"""
FAULTS = """
[faults]
faults = [{ kind = "power-cut", restart = true, when = { on = "console", text = "CUT NOW" } }]
"""
PANIC = """
[machine]
hypervisor = "qemu"
image = "debian-12-amd64-tiny"

[[phases]]
name = "dies"
run = "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 600"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All plans in one run, since they share what was booted."""
    need("qemu-system-x86_64")
    place: Path = tmp_path_factory.mktemp("lost")
    plans = {
        "reboot": MACHINE + REBOOT + VERIFY.format(""),
        "cut": MACHINE + CUT + VERIFY.format(LOST) + FAULTS,
        "panic": PANIC,
    }
    for name, text in plans.items():
        (place / f"{name}.vmlab.toml").write_text(text)
    (place / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    done = subprocess.run(
        [sys.executable, "-m", "vmlab", "test", "--vm-report=reports"],
        cwd=place, capture_output=True, text=True, check=False, timeout=1700,
        env={**os.environ, "VMLAB_IMAGE_STORE": str(IMAGE_STORE)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return read_run(place / "reports" / "latest")


@pytest.mark.parametrize("name", ["reboot", "cut"])
def test_a_phase_may_take_the_guest_down_and_the_next_one_has_it_back(run: Run, name: str) -> None:
    test = run.test(f"{name}.vmlab.toml", "plan[qemu]")
    assert test.outcome is Outcome.PASS, test.reason
    phases = {phase.name: phase for phase in test.attempts[0].phases}
    assert phases["down"].outcome is Outcome.ERROR
    assert "and came back" in phases["down"].message
    assert phases["verify"].outcome is Outcome.PASS
    assert [fault.kind for fault in test.attempts[0].faults] == (
        ["power-cut"] if name == "cut" else []
    )


def test_the_death_of_a_machine_that_nobody_meant_is_its_plan_s_error(run: Run) -> None:
    test = run.test("panic.vmlab.toml", "plan[qemu]")
    assert test.outcome is Outcome.ERROR
    assert "panic" in test.reason
    (phase,) = [phase for phase in test.attempts[0].phases if phase.name == "dies"]
    assert phase.outcome in {Outcome.PENDING, Outcome.ERROR}

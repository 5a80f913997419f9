"""Every kind of death, for real, is told as what it is: on QEMU and on the embedded engine.

Deaths that leave a machine alive share one; the others end one each.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.lab.evidence import collect_evidence
from vmlab.lab.incident import Incident
from vmlab.lab.incident import IncidentKind as K
from vmlab.lab.laboratory import Lab
from vmlab.lab.vm import VM
from vmlab.lab.watchdog import Watchdog
from vmlab.machine.errors import VmlabError

pytestmark = [pytest.mark.boots, pytest.mark.timeout(900)]

IMAGES = {"qemu": "debian-12-amd64-tiny", "embedded": "debian-13-riscv64-tiny"}
_PATIENCE = 300.0
CRASHER = Path(__file__).parent / "crasher"


class Told:
    """What a machine's watchdog has told, for a thread that waits for it."""

    def __init__(self) -> None:
        self.incidents: list[Incident] = []
        self._news = threading.Condition()

    def __call__(self, incident: Incident) -> None:
        with self._news:
            self.incidents.append(incident)
            self._news.notify_all()

    def wait_for(self, kind: K) -> Incident:
        """The first incident of a kind, as soon as it is told."""

        def found() -> Incident | None:
            return next((each for each in self.incidents if each.kind is kind), None)

        with self._news:
            incident = self._news.wait_for(found, _PATIENCE)
        assert incident is not None, f"no {kind} was told, but {self.incidents}"
        return incident

    @property
    def kinds(self) -> set[K]:
        return {incident.kind for incident in self.incidents}


@pytest.fixture(scope="module", params=["qemu", "embedded"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    hypervisor = request.param
    if hypervisor == "qemu":
        need("qemu-system-x86_64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
        with Lab(hypervisor=hypervisor, image=IMAGES[hypervisor]) as lab:
            if hypervisor == "qemu":
                # What the others are forks of is of no single test's.
                lab.vm(memory="256M").delete()
            yield lab


@contextmanager
def watched(lab: Lab) -> Iterator[tuple[VM, Told, Watchdog]]:
    """A machine of its own that knows how to die, and what its watchdog tells."""
    vm = lab.vm(memory="256M")
    told = Told()
    watchdog = Watchdog(vm.machine, on_incident=told)
    vm.run(watchdog.__aenter__())
    try:
        vm.write("/crasher.ko", (CRASHER / f"crasher-{vm.spec.architecture}.ko").read_bytes())
        vm.succeed("insmod /crasher.ko")
        yield vm, told, watchdog
    finally:
        vm.run(watchdog.__aexit__(None, None, None))
        vm.delete()


def ask_to_die(vm: VM, how: str) -> None:
    """Have a process of its own write to the module, since it may never come back."""
    ask(vm, f"sleep 0.5; echo {how} >/proc/crasher")


def ask(vm: VM, commands: str) -> None:
    """Have a process of its own run commands that may be the guest's last.

    Not before the guest has answered: it may have one CPU, which answers nobody any more then. But
    on a busy host its answer may come too late.
    """
    with suppress(VmlabError):
        vm.succeed(f"({commands}) >/dev/null 2>&1 </dev/null &", timeout=60)


def test_what_a_kernel_survives_is_told_with_its_report(lab: Lab) -> None:
    with watched(lab) as (vm, told, watchdog):
        # What users print is none of it.
        vm.succeed("echo 'BUG: kernel NULL pointer dereference' >/dev/console")
        vm.succeed("echo 'Kernel panic - not syncing: not really' >/dev/console")
        vm.run(watchdog.settle())
        assert told.incidents == []

        vm.succeed("echo warn >/proc/crasher")
        warn = told.wait_for(K.WARN)
        assert "crasher" in warn.excerpt and "a warning that was asked for" in warn.excerpt
        assert "cut here" in warn.excerpt.splitlines()[0]
        assert "end trace" in warn.excerpt.splitlines()[-1]
        assert not warn.fatal

        # Before the others: a kernel that has had an oops looks for no hung tasks any more.
        vm.succeed("echo 2 >/proc/sys/kernel/hung_task_timeout_secs")
        ask_to_die(vm, "hungtask")
        hung = told.wait_for(K.HUNG_TASK)
        assert "blocked for more than 2 seconds" in hung.message
        vm.succeed("echo 0 >/proc/sys/kernel/hung_task_timeout_secs")

        vm.succeed("echo 1 >/proc/sys/vm/overcommit_memory")
        killed = vm.execute("dd if=/dev/zero of=/dev/null bs=1G count=1")
        assert killed.status == 128 + signal.SIGKILL
        oom = told.wait_for(K.OOM_KILL)
        assert "Out of memory: Killed process" in oom.message and "(dd)" in oom.message

        ask_to_die(vm, "oops")
        oops = told.wait_for(K.OOPS)
        assert "crasher" in oops.excerpt and "end trace" in oops.excerpt.splitlines()[-1]

        # Its log, printed once more, tells nothing new.
        vm.run(watchdog.settle())
        before = list(told.incidents)
        vm.succeed("dmesg >/dev/console")
        vm.run(watchdog.settle())
        assert told.incidents == before
        assert told.kinds == {K.WARN, K.OOPS, K.HUNG_TASK, K.OOM_KILL}

        guest = vm.guest
        found = vm.run(
            collect_evidence(vm.machine, guest, run_directory=lab.owner.directory, memory=False)
        )
        names = {each.name: each.content for each in found}
        reports = names["kernel-reports.txt"]
        assert isinstance(reports, bytes) and reports.count(b"---[ end trace") >= 2
        dmesg = names["dmesg.txt"]
        assert isinstance(dmesg, bytes) and b"a warning that was asked for" in dmesg
        assert "process-qmp.log" in names and "process-command-line" in names

        ask_to_die(vm, "bug")
        bug = told.wait_for(K.BUG)
        assert "crasher" in bug.excerpt and "kernel BUG at" in bug.message
        if lab.hypervisor == "embedded":
            # On riscv that is an exception "in interrupt" (arch/riscv/kernel/traps.c: die).
            assert "Fatal exception in interrupt" in told.wait_for(K.PANIC).message


def test_a_panic_is_told_with_its_report_and_once(lab: Lab) -> None:
    with watched(lab) as (vm, told, watchdog):
        vm.run(vm.inside("crash").crash())
        panic = told.wait_for(K.PANIC)
        assert panic.fatal
        assert "sysrq triggered crash" in panic.message
        assert "sysrq triggered crash" in panic.excerpt
        vm.run(watchdog.settle())
        assert [each.kind for each in told.incidents] == [K.PANIC]


def test_a_soft_lockup_is_told_while_it_lasts(lab: Lab) -> None:
    with watched(lab) as (vm, told, _):
        vm.succeed("echo 1 >/proc/sys/kernel/watchdog_thresh")
        ask_to_die(vm, "softlockup")
        lockup = told.wait_for(K.SOFT_LOCKUP)
        assert "soft lockup - CPU#0 stuck for" in lockup.message
        assert "crasher" in lockup.excerpt


def test_a_process_that_is_killed_is_told(lab: Lab) -> None:
    with watched(lab) as (vm, told, _):
        process = vm.info().pid
        assert process is not None
        os.kill(process, signal.SIGKILL)
        exit_ = told.wait_for(K.UNEXPECTED_EXIT)
        assert "killed by signal 9" in exit_.message and exit_.fatal


def test_a_guest_that_leaves_is_told_and_one_that_was_sent_is_not(lab: Lab) -> None:
    with watched(lab) as (vm, told, watchdog):
        vm.watchdog = watchdog
        vm.reboot()
        vm.run(watchdog.settle())
        assert told.incidents == []
        ask(vm, "sleep 0.5; poweroff -f")
        assert "shut down" in told.wait_for(K.UNEXPECTED_EXIT).message

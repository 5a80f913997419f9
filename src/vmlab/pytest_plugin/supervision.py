"""Between a lab and the test that is under way: who is told of what befalls a machine.

The lab tells of machines made, marks and ends; watchdogs tell of incidents; a machine that ends
well says what it has used.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.lab.console_rules import DEFAULT, Rules
from vmlab.lab.watchdog import Watchdog
from vmlab.machine.errors import VmlabError
from vmlab.report import Direction

if TYPE_CHECKING:
    from vmlab.lab.faulting import FaultEvent
    from vmlab.lab.incident import Incident
    from vmlab.lab.vm import VM
    from vmlab.machine.faults import Fault
    from vmlab.machine.metrics import MachineMetrics
    from vmlab.pytest_plugin.machine_run import MachineRun

_COMMON: Final = frozenset({"id", "kind", "machine"})
"""Fields of a fault that a report has beside its own."""
_SECONDS: Final = 30.0
"""Seconds that a machine on a busy host has to say what it used."""


class Supervision:
    """The lab's observer: machines are watched from before their first instruction on."""

    def __init__(self, run: MachineRun) -> None:
        self._run = run
        self._watchdogs: dict[int, Watchdog] = {}
        self._unclaimed: dict[int, Incident] = {}
        self._lock = threading.Lock()
        rules = run.settings.rules
        self._rules = DEFAULT if rules is None else Rules.load(rules)

    def machine_made(self, vm: VM) -> None:
        """It belongs to the test that is under way, and is watched."""
        if self._run.current is not None:
            self._run.current.adopt(vm)

        def on_fault(event: FaultEvent, fault: Fault) -> None:
            trial = self._run.concerned(vm)
            if trial is not None:
                trial.fault(event, parameters_of(fault))

        vm.on_fault = on_fault

        def on_incident(incident: Incident) -> None:
            trial = self._run.concerned(vm)
            if trial is not None:
                trial.incident(vm, incident)
            else:
                with self._lock:
                    self._unclaimed.setdefault(id(vm), incident)

        async def heartbeat() -> None:
            # Whoever waits for it to boot has a limit for that.
            if vm.guest is not None:
                await vm.guest.ping()

        watchdog = Watchdog(
            vm.machine, rules=self._rules, on_incident=on_incident, heartbeat=heartbeat
        )
        vm.run(watchdog.__aenter__())
        vm.watchdog = watchdog
        with self._lock:
            self._watchdogs[id(vm)] = watchdog

    def unclaimed(self, vm: VM) -> Incident | None:
        """What befell a machine while no test had it; it is the next test's who has it."""
        with self._lock:
            return self._unclaimed.pop(id(vm), None)

    def settle(self, machines: Iterable[VM]) -> None:
        """Wait until all that has happened to machines until now has been told."""
        for vm in machines:
            with self._lock:
                watchdog = self._watchdogs.get(id(vm))
            if watchdog is not None:
                vm.run(watchdog.settle())

    def marked(self, vm: VM, kind: str, text: str, duration_s: float | None) -> None:
        """It goes onto the timeline."""
        trial = self._run.concerned(vm)
        if trial is not None:
            trial.marked(vm, kind, text, duration_s)

    def machine_gone(self, vm: VM) -> None:
        """What it used is a metric; from now on nobody watches it."""
        trial = self._run.concerned(vm)
        if trial is not None and vm.alive and not trial.attempt.finished:
            with suppress(VmlabError):
                record_use(vm, vm.run(vm.machine.metrics(), timeout=_SECONDS))
                info = vm.run(vm.machine.info(), timeout=_SECONDS)
                trial.ran_by(vm, info.accelerator)
                if (peak := peak_memory(info.pid)) is not None:
                    vm.record("memory_peak_bytes", peak, "bytes", Direction.LOWER)
        self.leave(vm)

    def leave(self, vm: VM) -> None:
        """Nobody watches a machine any more; again does nothing."""
        with self._lock:
            watchdog = self._watchdogs.pop(id(vm), None)
        if watchdog is not None:
            vm.run(watchdog.__aexit__(None, None, None))


def record_use(vm: VM, used: MachineMetrics) -> None:
    """What a machine has used, as metrics of the test."""
    lower = Direction.LOWER
    vm.record("vcpu_s", used.cpu.seconds, "s", lower)
    if used.memory.resident_bytes is not None:
        vm.record("memory_bytes", used.memory.resident_bytes, "bytes", lower)
    vm.record("disk_read_bytes", sum(disk.read_bytes for disk in used.disks), "bytes")
    vm.record("disk_written_bytes", sum(disk.written_bytes for disk in used.disks), "bytes")


def peak_memory(pid: int | None) -> int | None:
    """The most bytes of the host's memory that a process has held (proc(5), VmHWM), if known."""
    if pid is None:
        return None
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None  # it has just ended, or this system has no /proc
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def parameters_of(fault: Fault) -> dict[str, Any]:
    """A fault's own fields, and when it is to happen."""
    fields: dict[str, Any] = fault.model_dump(mode="json", exclude_none=True)
    return {name: value for name, value in fields.items() if name not in _COMMON}

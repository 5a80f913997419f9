"""One attempt at a test: its machines, what befalls them, and what of it the report is told.

Knows pytest by its reports alone; who decides when it begins and ends is `machine_run`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import pytest

from vmlab.lab.patience import wait_for_event
from vmlab.machine.errors import ChannelClosed, MachineCrashed, VmlabError
from vmlab.pytest_plugin.deaths import MachineDied, OutOfTime, TestEnded
from vmlab.report import AttemptRecorder, Direction, Outcome, Severity

if TYPE_CHECKING:
    from vmlab.lab.faulting import FaultEvent
    from vmlab.lab.incident import Incident
    from vmlab.lab.vm import VM
    from vmlab.pytest_plugin.interruption import Interruption


_LAST_WORDS: Final = 10.0
"""Seconds in which it is told why a machine is gone, once it has been found to be."""
_STATUS: Final = 60.0
"""Seconds that a hypervisor on a busy host has to say whether a machine is gone."""


class Trial:
    """One attempt at one test.

    Args:
        attempt: Records it.
        interruption: Ends what the test does.
        settle: Waits until all that has happened to machines has been told to `incident`.
        timeout: Seconds that it has; None is no limit.
    """

    def __init__(
        self,
        attempt: AttemptRecorder,
        interruption: Interruption,
        settle: Callable[[Iterable[VM]], None],
        timeout: float | None = None,
    ) -> None:
        self.attempt = attempt
        self.machines: dict[str, VM] = {}
        self.failed = False
        self._interruption = interruption
        self._settle = settle
        self._timeout = timeout
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._death: TestEnded | None = None
        self._died = threading.Event()
        self._told = False
        self._verdict: tuple[Outcome, str, str] = (Outcome.PASS, "", "")

    # Machines. These are called from the test's thread and from the lab's.

    def adopt(self, vm: VM) -> None:
        """From now on what befalls a machine is this test's."""
        with self._lock:
            self.machines[vm.name] = vm
        vm.recorder = self.attempt
        self.attempt.machine(
            vm.name,
            hypervisor=vm.hypervisor,
            architecture=str(vm.spec.architecture or ""),
            image=vm.image.name if vm.image is not None else None,
            spec=vm.spec.model_dump(mode="json", exclude_defaults=True),
        )

    def ran_by(self, vm: VM, accelerator: str) -> None:
        """Who has executed a machine's instructions is known."""
        if accelerator:
            self.attempt.machine(vm.name, hypervisor=vm.hypervisor, accelerator=accelerator)

    def marked(self, vm: VM, kind: str, text: str, duration_s: float | None) -> None:
        """Something happened to a machine; how long it took is a metric as well."""
        if self.attempt.finished:
            return
        self.attempt.mark(vm.name, kind, text, duration_s=duration_s)
        if duration_s is not None:
            self.attempt.metric(f"{kind}_s", duration_s, "s", direction=Direction.LOWER)

    def incident(self, vm: VM, incident: Incident) -> None:
        """A watchdog has seen something: the test ends now, whatever it is doing."""
        kind = str(getattr(incident.kind, "value", incident.kind))
        death = MachineDied(vm.name, kind, incident.message, incident.excerpt, fatal=incident.fatal)
        if not self.attempt.finished:
            with suppress(VmlabError):
                self.attempt.mark(vm.name, kind, incident.message)
        self._end(death)

    def fault(self, event: FaultEvent, parameters: dict[str, Any]) -> None:
        """A fault was injected, cleared or refused."""
        if self.attempt.finished:
            return
        if event.action == "cleared":
            with suppress(VmlabError):  # one that is over at once is not cleared again
                self.attempt.fault_cleared(event.id, event.machine)
            return
        refused = event.reason if event.action == "refused" else ""
        self.attempt.fault(
            event.id, event.kind, event.machine, parameters=parameters, refused=refused
        )

    # Its course.

    def begin(self) -> None:
        """Its time counts from here on."""
        if self._timeout is not None:
            self._timer = threading.Timer(self._timeout, self._out_of_time, (self._timeout,))
            self._timer.daemon = True
            self._timer.start()

    def _out_of_time(self, seconds: float) -> None:
        self._end(OutOfTime(seconds))

    def _end(self, death: TestEnded) -> None:
        with self._lock:
            # The first one is the cause; what follows from it is on the timeline.
            if self._death is not None:
                return
            self._death = death
        self._died.set()
        self._interruption.interrupt(death)

    @contextmanager
    def attended(self) -> Iterator[None]:
        """A part of the test that ends at once when a machine dies.

        Raises:
            TestEnded: a machine died or the time is over, also where the test went on.
        """
        try:
            with self._interruption.open():
                self._raise_if_ended()
                yield
        except (TestEnded, KeyboardInterrupt, pytest.exit.Exception):
            self._told = True
            raise
        except BaseException as error:
            # A call into a machine that is gone fails before it is known why that is so.
            if isinstance(error, VmlabError):
                self._look_after_machines(suspected=isinstance(error, ChannelClosed))
            if self._death is not None and not self._told:
                self._told = True
                raise self._death.with_traceback(error.__traceback__) from None
            raise
        self._look_after_machines()
        self._raise_if_ended()

    def _look_after_machines(self, *, suspected: bool = False) -> None:
        """Wait until it is told what has happened to the machines until now.

        Args:
            suspected: Whether there is reason to think that one has died.
        """
        machines = [vm for vm in list(self.machines.values()) if vm.guest is not None]
        gone = False
        for vm in machines:
            with suppress(VmlabError):
                status = vm.run(vm.machine.status(), timeout=_STATUS)
                # Whoever ends it on purpose lets go of its guest; a fault says that it was one.
                gone |= not status.state.is_live and "fault" not in (status.reason or "")
        self._settle(machines)
        if gone or suspected:
            wait_for_event(self._died, _LAST_WORDS)

    def _raise_if_ended(self) -> None:
        if self._death is not None and not self._told:
            self._told = True
            raise self._death

    # What pytest says of it.

    def heard(self, report: pytest.TestReport, reason: str | None = None) -> None:
        """One of pytest's three phases has ended.

        Args:
            report: How.
            reason: Why it failed, where that is known better than pytest says it.
        """
        if self.attempt.finished:
            return
        outcome, said = self._outcome_of(report)
        reason = said if reason is None or outcome.ok else reason
        self.attempt.phase(
            str(report.when), outcome, duration_s=max(0.0, report.duration), message=reason
        )
        self.failed = self.failed or not outcome.ok
        worse = not outcome.ok and self._verdict[0].ok
        if worse or (outcome in (Outcome.SKIP, Outcome.XFAIL) and self._verdict[0] is Outcome.PASS):
            self._verdict = (outcome, reason, report.longreprtext)
        elif not outcome.ok:
            self.attempt.message(
                reason, severity=Severity.ERROR, details=report.longreprtext, source=report.when
            )

    def _outcome_of(self, report: pytest.TestReport) -> tuple[Outcome, str]:
        declared = getattr(report, "wasxfail", None)
        if report.skipped and declared is not None:
            return Outcome.XFAIL, str(declared) or "declared as a failure"
        if report.skipped:
            where = report.longrepr
            reason = str(where[2]) if isinstance(where, tuple) else str(where)
            reason = reason.removeprefix("Skipped: ")
            return Outcome.SKIP, reason if reason else "no reason was given"
        if report.passed:
            return Outcome.PASS, ""
        reason = _crash_message(report)
        died = getattr(report, "vm_died", False)
        return (Outcome.FAIL if report.when == "call" and not died else Outcome.ERROR), reason

    @property
    def death(self) -> TestEnded | None:
        """What ended the test from outside, if anything did."""
        return self._death

    def stop_clock(self) -> None:
        """Its time does not count any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def finish(self, report: pytest.TestReport) -> None:
        """It is over, with everything cleared away; `report` is the last of pytest's."""
        self.stop_clock()
        if self.attempt.finished:
            return
        for stream, text in (("stdout", report.capstdout), ("stderr", report.capstderr)):
            if text:
                self.attempt.output(stream, text)
        if report.caplog:
            self.attempt.output("log", report.caplog)
        outcome, reason, details = self._verdict
        self.attempt.finish(
            outcome, reason=reason or None, details="" if outcome is Outcome.SKIP else details
        )


def _crash_message(report: pytest.TestReport) -> str:
    """Why a phase failed, without the lines of code around it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return str(text).strip() or "it failed without saying why"


def died_of(error: BaseException | None) -> bool:
    """Whether an error is the end of a machine, so that the test could not do its work."""
    if isinstance(error, TestEnded):
        return error.fatal
    return isinstance(error, MachineCrashed)

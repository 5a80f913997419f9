"""A pytest run in one process that has tests with machines: its lab, its recorder, its hooks.

Begun by the first test that is collected and asks for a machine. In a worker of pytest-xdist it
joins the run of the controller (`workers`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import vmlab
from vmlab.machine.errors import VmlabError
from vmlab.pytest_plugin import report_place
from vmlab.pytest_plugin.deaths import TestEnded, passes_through, shown, without_inner_frames
from vmlab.pytest_plugin.interruption import Interruption
from vmlab.pytest_plugin.marks import BadMark, VmMark, mark_of
from vmlab.pytest_plugin.options import settings_of
from vmlab.pytest_plugin.report_files import KEPT, RunReport, plan, split
from vmlab.pytest_plugin.trial import Trial, died_of
from vmlab.pytest_plugin.workers import Worker, is_worker
from vmlab.report import Recorder

if TYPE_CHECKING:
    from vmlab.lab.laboratory import Lab
    from vmlab.lab.vm import VM
    from vmlab.pytest_plugin.factories import VmFactory
    from vmlab.pytest_plugin.supervision import Supervision

NAME: Final = "vmlab-run"
_OURS: Final = Path(vmlab.__file__).parent

_TRIAL = pytest.StashKey[Trial]()
_MARK = pytest.StashKey[VmMark]()


class MachineRun:
    """One process's part in a run; a plugin of pytest's from when it is made."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.settings = settings_of(config)
        self.worker = Worker(config) if is_worker(config) else None
        if self.worker is not None:
            self.worker.die_with_controller()
        self.seed = self.worker.seed if self.worker else report_place.new_seed(self.settings)
        self.current: Trial | None = None
        self.factories: list[VmFactory] = []
        self.interruption = Interruption()
        self.report: RunReport | None = None
        self._recorder: Recorder | None = None
        self._lab: Lab | None = None
        self._lacking: dict[str, str] = {}
        self._failures = 0

    @classmethod
    def of(cls, config: pytest.Config) -> MachineRun:
        """The one of this process."""
        run = config.pluginmanager.get_plugin(NAME)
        if run is None:
            run = cls(config)
            config.pluginmanager.register(run, NAME)
        assert isinstance(run, MachineRun)
        return run

    # What tests are made of.

    def mark_of(self, item: pytest.Item) -> VmMark:
        """What the marks of a test say."""
        if _MARK not in item.stash:
            item.stash[_MARK] = mark_of(item)
        return item.stash[_MARK]

    def trial_of(self, item: pytest.Item) -> Trial | None:
        """The attempt at a test that is under way."""
        return item.stash.get(_TRIAL, None)

    @property
    def recorder(self) -> Recorder:
        """Records this process's results, from when its tests have been collected on."""
        assert self._recorder is not None, "nothing is recorded while tests are collected"
        return self._recorder

    @property
    def directory(self) -> Path | None:
        """The run's directory; None until its report has begun, and in a worker."""
        return self.report.recorder.directory if self.report is not None else None

    @property
    def default_hypervisor(self) -> str:
        """What runs a machine when neither test nor options say it."""
        return self._preferred(VmMark())

    def _preferred(self, mark: VmMark) -> str:
        from vmlab.lab.boot import Wish
        from vmlab.lab.preference import preference

        if self.settings.hypervisors:
            return self.settings.hypervisors[0]
        wish = Wish(image=mark.image or self.settings.image, shares=mark.shares)
        return preference(wish, None).hypervisor

    def hypervisors_for(self, definition: pytest.Item | pytest.Collector) -> list[Any]:
        """The hypervisors that a test runs on, as pytest's parameters; one may be skipped.

        Raises:
            BadMark: its mark cannot be meant.
        """
        mark = mark_of(definition)
        wanted = self.settings.hypervisors
        if not mark.hypervisors:
            try:
                return list(wanted) or [self._preferred(mark)]
            except VmlabError as error:
                raise BadMark(f"{definition.nodeid}: {shown(error)}") from None
        chosen = [name for name in mark.hypervisors if not wanted or name in wanted]
        if not chosen:
            reason = f"runs on {', '.join(mark.hypervisors)} only, as its mark says"
            return [pytest.param(wanted[0], marks=pytest.mark.skip(reason=reason))]
        return [self._parameter(name) for name in chosen]

    def _parameter(self, name: str) -> Any:
        """A hypervisor that a mark names; a test on one that is not here is skipped."""
        lacking = self.lacking(name)
        return pytest.param(name, marks=pytest.mark.skip(reason=lacking)) if lacking else name

    def lacking(self, name: str) -> str:
        """Why a hypervisor cannot be used here; empty if it can.

        Raises:
            HypervisorUnavailable: there is none of that name.
        """
        if name not in self._lacking:
            from vmlab.hypervisors import registry

            probe = registry.provider(name).probe()
            reason = probe.reason or "its probe says no more"
            self._lacking[name] = "" if probe.available else f"needs {name}: {reason}"
        return self._lacking[name]

    def seed_of(self, item: pytest.Item | pytest.Collector) -> int:
        """A test's seed: of the run's and of its name, 63 bits."""
        digest = hashlib.sha256(f"{self.seed}/{item.nodeid}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @contextmanager
    def factory(self, request: pytest.FixtureRequest, hypervisor: str) -> Iterator[VmFactory]:
        """What makes machines for a test, a module or the session; they go when it ends."""
        from vmlab.pytest_plugin.factories import VmFactory

        if self._recorder is None and request.session.items:
            # Nobody knew that this test would ask for a machine: the run begins in its midst.
            self.pytest_collection_finish(request.session)
            if isinstance(request.node, pytest.Item):
                self._begin(request.node)
        factory = VmFactory(self, request, hypervisor)
        self.factories.append(factory)
        try:
            yield factory
        finally:
            self.factories.remove(factory)
            factory.close()

    @cached_property
    def supervision(self) -> Supervision:
        """Who is told of what befalls machines."""
        from vmlab.pytest_plugin.supervision import Supervision

        return Supervision(self)

    @contextmanager
    def own_lab(self) -> Iterator[Lab]:
        """A laboratory with templates of its own, for a module."""
        from vmlab.pytest_plugin.factories import open_lab

        lab = open_lab(self, shared=None)
        try:
            yield lab
        finally:
            lab.close()

    @property
    def lab(self) -> Lab:
        """This process's laboratory; begun when it is first asked for."""
        if self._lab is None:
            from vmlab.pytest_plugin.factories import open_lab

            shared = self.worker.shared() if self.worker is not None else None
            self._lab = open_lab(self, shared=shared)
        return self._lab

    def keep(self, vm: VM) -> None:
        """Leave a machine when this process ends, and tell who it is."""
        self.supervision.leave(vm)
        vm.lab.leave(vm)
        state = "runs on" if vm.alive else f"stays, {vm.state.value}"
        if self._recorder is not None:
            self._recorder.message(f"{vm.name} {state}: `vmlab shell {vm.name}`", source=KEPT)

    def settle(self, machines: Iterable[VM]) -> None:
        """Wait until all that has happened to machines until now has been told."""
        self.supervision.settle(machines)

    def concerned(self, vm: VM) -> Trial | None:
        """Whose business it is what befalls a machine."""
        trial = self.current
        return trial if trial is not None and trial.machines.get(vm.name) is vm else None

    # Hooks of collection.

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Everything that will run is recorded as pending, before any machine is made."""
        config = session.config
        if config.option.collectonly or not session.items:
            return
        if self.worker is not None:
            self._recorder = Recorder.join(self.worker.directory, self.worker.name)
        else:
            directory = report_place.new_directory(self.settings)
            self.report = RunReport.begin(config, directory, self.seed)
            self._recorder = self.report.recorder
        tests = [(item.nodeid, hypervisor_of(item)) for item in session.items]
        plan(self._recorder, tests)
        self.interruption.install()

    # Hooks of a test's three phases. Those that may be ended from outside are the innermost:
    # an exception between the beginnings of others' would keep those from ending in order.

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """An attempt begins, with all that the test's fixtures do."""
        trial = self._begin(item)
        if trial is None:
            return (yield)
        with trial.attended():
            return (yield)

    def _begin(self, item: pytest.Item) -> Trial | None:
        if self._recorder is None:
            return None
        suite, name = split(item.nodeid)
        attempt = self._recorder.start(suite, name, hypervisor=hypervisor_of(item))
        timeout = None
        if uses_machines(item):
            timeout = self.mark_of(item).timeout or self.settings.timeout
        trial = Trial(attempt, self.interruption, self.settle, timeout)
        item.stash[_TRIAL] = self.current = trial
        for factory in self.factories:
            if factory.name in getattr(item, "fixturenames", ()):
                for vm in factory.machines:
                    trial.adopt(vm)
                    if (incident := self.supervision.unclaimed(vm)) is not None:
                        trial.incident(vm, incident)
        trial.begin()
        return trial

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """The test itself; the end of a machine of its is its own."""
        trial = self.trial_of(item)
        if trial is None:
            return (yield)
        with trial.attended():
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """What pytest found goes into the report, with evidence if it is bad."""
        error = call.excinfo.value if call.excinfo is not None else None
        if isinstance(error, VmlabError | TestEnded):
            call.excinfo = told_plainly(error, item.path)
        report = yield
        trial = self.trial_of(item)
        if trial is None:
            return report
        if report.failed and error is not None:
            if died_of(error):
                # Plain data of a report gets from a worker to the controller.
                vars(report)["vm_died"] = True
            if isinstance(error, VmlabError | TestEnded) and (
                report.when != "call" or not passes_through(error, item.path)
            ):
                # Wrong values and things that are not there: the code around is of no interest.
                report.longrepr = shown(error)
        plainly = isinstance(error, VmlabError | TestEnded)
        trial.heard(report, shown(error) if error is not None and plainly else None)
        if report.when != "teardown":
            if report.failed:
                self._keep_evidence(trial, report)
                if self.settings.sit:
                    from vmlab.pytest_plugin.sitting import sit

                    sit(item, trial, report)
            if report.when == "call" or report.failed:
                trial.stop_clock()
        else:
            trial.finish(report)
            self.current = None
            del item.stash[_TRIAL]
        return report

    def _keep_evidence(self, trial: Trial, report: pytest.TestReport) -> None:
        from vmlab.pytest_plugin.evidence import MEMORIES, gather

        if trial.machines:
            self._failures += 1
            gather(trial, report, memory=self._failures <= MEMORIES)

    # Its end.

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Everything goes; the report is written where this process owns it."""
        self.interruption.uninstall()
        lab, self._lab = self._lab, None
        try:
            if lab is not None:
                lab.close()
        finally:
            if self.report is not None:
                self.report.end()
            elif self._recorder is not None:
                self._recorder.close()
            self._recorder = None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where the report is."""
        if self.report is not None:
            self.report.tell(terminalreporter)


def told_plainly(error: VmlabError | TestEnded, test: Path) -> pytest.ExceptionInfo[BaseException]:
    """What a call into a machine raised, told where the test in that file made the call."""
    if isinstance(error, VmlabError) and error.hint:
        error.add_note(f"hint: {error.hint}")
    trace = without_inner_frames(error.__traceback__, test, _OURS)
    return pytest.ExceptionInfo.from_exception(error.with_traceback(trace))


def hypervisor_of(item: pytest.Item) -> str | None:
    """The hypervisor that a test was collected for; None where it has none."""
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("vm_hypervisor") if callspec is not None else None
    return str(name) if name is not None else getattr(item, "vm_hypervisor", None)


def uses_machines(item: pytest.Item) -> bool:
    """Whether a test asks for a machine."""
    return hypervisor_of(item) is not None or "vm_hypervisor" in getattr(item, "fixturenames", ())

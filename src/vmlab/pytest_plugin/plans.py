"""Plan files as tests of pytest's: each cell of the matrix of a `*.vmlab.toml` is one.

A cell boots a machine of its own, runs the plan in it and clears it away. Tests that ran inside
the guest and left a file of results are told of as well, each by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from vmlab.lab.armed import Armed
    from vmlab.lab.plans import Cell, Plan, PlanResult
    from vmlab.lab.plans.guest_tests import GuestTest
    from vmlab.lab.vm import VM
    from vmlab.machine.architecture import Architecture
    from vmlab.pytest_plugin.machine_run import MachineRun
    from vmlab.pytest_plugin.trial import Trial

SUFFIX: Final = ".vmlab.toml"
"""How names of plan files end; here once more, so that a project without one imports nothing."""

_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_.-]+")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Plan files are collected, by their suffix."""
    if file_path.name.endswith(SUFFIX):
        collector: pytest.Collector = PlanFile.from_parent(parent, path=file_path)
        return collector
    return None


class PlanFailed(Exception):
    """A plan did not do what it should; the message says which phases, and why."""


class PlanFile(pytest.File):
    """One plan file."""

    def collect(self) -> Iterator[pytest.Item]:
        """A test for each cell of its matrix, on each hypervisor that is asked for.

        Raises:
            CollectError: it is no plan; file, field and value are named.
        """
        from vmlab.lab.plans import Plan
        from vmlab.machine.errors import VmlabError
        from vmlab.pytest_plugin.plugin import run_with_machines

        run = run_with_machines(self.config)
        try:
            plan = Plan.load(self.path)
            cells = list(_cells_of(plan, run))
        except VmlabError as error:
            hint = f"\nhint: {error.hint}" if error.hint else ""
            raise self.CollectError(f"{error}{hint}") from None
        for cell, why_not in cells:
            item: PlanItem = PlanItem.from_parent(
                self, name=_name(plan, cell), plan=plan, cell=cell
            )
            if why_not:
                item.add_marker(pytest.mark.skip(reason=why_not))
            yield item


class PlanItem(pytest.Item):
    """A plan in one cell of its matrix."""

    def __init__(self, *, plan: Plan, cell: Cell, **rest: Any) -> None:
        super().__init__(**rest)
        self.plan = plan
        self.cell = cell
        self.vm_hypervisor = cell.hypervisor
        self._vm: VM | None = None
        self._armed: Armed | None = None

    @property
    def _run(self) -> MachineRun:
        from vmlab.pytest_plugin.plugin import run_with_machines

        return run_with_machines(self.config)

    @property
    def _trial(self) -> Trial:
        trial = self._run.trial_of(self)
        assert trial is not None, "a test that runs has begun"
        return trial

    def setup(self) -> None:
        """Boot the machine."""
        run, machine = self._run, self.plan.machine
        self._vm = vm = run.lab.vm(
            name=machine.name,
            image=self.cell.image,
            memory=machine.memory,
            cpus=machine.cpus,
            disks=machine.disks,
            nics=machine.nics,
            networks=("user",) if machine.network else (),
            shares=self.plan.shares,
            hypervisor=self.cell.hypervisor,
            template=run.settings.scope != "function",
            timeout=machine.timeout,
        )
        schedule = self.plan.schedule(run.seed_of(self))
        if schedule is not None and schedule.faults:
            from vmlab.lab.armed import Armed

            self._armed = Armed([vm], schedule)

    def runtest(self) -> None:
        """Run the plan's phases, and tell of the tests that ran in the guest.

        Raises:
            PlanFailed: a phase failed.
            MachineCrashed: the guest was lost in a phase.
        """
        from vmlab.lab.plans import run_plan
        from vmlab.machine.errors import MachineCrashed
        from vmlab.report import Outcome

        assert self._vm is not None, "setup has made it"
        # In the run's directory, which goes with it; a store's is no place for what is passing.
        lease = self._run.lab.lease
        with TemporaryDirectory(
            prefix="plan-", dir=lease.directory if lease is not None else None
        ) as place:
            result = run_plan(self._vm, self.plan, self._trial.attempt, artifacts=Path(place))
        for _, test in result.tests:
            self._tell(test)
        if result.outcome is Outcome.ERROR:
            raise MachineCrashed(_told(result), machine=self._vm.name)
        if not result.outcome.ok:
            raise PlanFailed(_told(result))

    def teardown(self) -> None:
        """The machine goes, unless it is to be kept."""
        vm, self._vm = self._vm, None
        armed, self._armed = self._armed, None
        if armed is not None:
            armed.disarm()
        if vm is None:
            return
        keep = self._run.settings.keep
        if keep == "always" or (keep == "failed" and self._trial.failed):
            self._run.keep(vm)
        else:
            vm.delete()

    def _tell(self, test: GuestTest) -> None:
        """Tell pytest and the report of a test that ran in the guest."""
        from vmlab.pytest_plugin.report_files import split
        from vmlab.report import Outcome, Severity

        suite, name = split(self.nodeid)
        cell, bracket, hypervisor = name.rpartition("[")
        named = f"{cell}::{test.name}{bracket}{hypervisor}"
        attempt = self._run.recorder.start(suite, named, hypervisor=self.vm_hypervisor)
        if test.output:
            attempt.output("stdout", test.output)
        if test.details and test.outcome is not Outcome.SKIP:
            severity = Severity.INFO if test.outcome.ok else Severity.ERROR
            attempt.message(
                test.message or test.outcome.value, severity=severity, details=test.details
            )
        if test.duration_s is not None:
            attempt.metric("guest_s", test.duration_s, "s")
        attempt.finish(test.outcome, reason=test.message or None)
        self.ihook.pytest_runtest_logreport(report=_report_of(self, test))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What failed, without our own lines of code."""
        from vmlab.machine.errors import VmlabError
        from vmlab.pytest_plugin.deaths import TestEnded, shown

        error = excinfo.value
        if isinstance(error, PlanFailed):
            return str(error)
        if isinstance(error, VmlabError | TestEnded):
            return shown(error)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test stands, and what it is called."""
        return self.path, 0, f"{self.path.name}: {self.name}"


def _report_of(item: PlanItem, test: GuestTest) -> pytest.TestReport:
    """A test that ran in the guest as pytest's own are told of; of its item, for pytest-xdist."""
    from vmlab.report import Outcome

    known = {Outcome.PASS: "passed", Outcome.SKIP: "skipped", Outcome.XFAIL: "skipped"}
    outcome = known.get(test.outcome, "failed")
    path, line, domain = item.location
    said = "\n".join(filter(None, (test.message, test.details))) or f"{test.name}: {outcome}"
    longrepr: Any = None
    if outcome == "failed":
        longrepr = said
    elif outcome == "skipped":
        longrepr = (str(item.path), 0, f"Skipped: {test.message}")
    report = pytest.TestReport(
        nodeid=item.nodeid,
        location=(path, line, f"{domain} :: {test.name}"),
        keywords={},
        outcome=outcome,  # type: ignore[arg-type]  # one of the three, by the table above
        longrepr=longrepr,
        when="call",
        duration=test.duration_s or 0.0,
        guest_test=test.name,
    )
    if test.outcome is Outcome.XFAIL:
        report.wasxfail = test.message
    return report


def _told(result: PlanResult) -> str:
    """Why a plan failed, and how all of its phases ended."""
    from vmlab.lab.plans.runner import summary

    return f"{result.message}\nphases: {summary(result.phases)}"


def _name(plan: Plan, cell: Cell) -> str:
    """What tells a cell from the others of its plan, as tests with parameters are told."""
    called = "plan"
    if plan.matrix.images and cell.image is not None:
        called = cell.image
    elif plan.matrix.architectures and cell.architecture is not None:
        called = cell.architecture.value
    return f"{_NOT_IN_NAMES.sub('_', called)}[{cell.hypervisor}]"


# ------------------------------------------------------------------------------- the matrix


def _cells_of(plan: Plan, run: MachineRun) -> Iterator[tuple[Cell, str]]:
    """The cells that are tests here, each with why it is skipped, or nothing.

    Raises:
        InvalidSpec: no image of the matrix is of an architecture of it.
    """
    from dataclasses import replace

    from vmlab.machine.errors import InvalidSpec, SpecProblem

    found = False
    for wanted in plan.cells():
        if not _fits(wanted.image, wanted.architecture):
            continue
        found = True
        pictured = _with_image(wanted, run)
        asked = run.settings.hypervisors
        if pictured.hypervisor is None:
            for name in asked or (_preferred(plan, pictured),):
                yield replace(pictured, hypervisor=name), ""
        elif asked and pictured.hypervisor not in asked:
            yield pictured, f"runs on {pictured.hypervisor}, and --vm-hypervisor names others"
        else:
            yield pictured, run.lacking(pictured.hypervisor)
    if not found:
        images = list(plan.matrix.images or (plan.machine.image,))
        right = "an image of one of the architectures"
        raise InvalidSpec([SpecProblem("matrix.images", images, right)], source=plan.name)


def _with_image(cell: Cell, run: MachineRun) -> Cell:
    """The cell with the image that an architecture alone, or an option, stands for."""
    from dataclasses import replace

    from vmlab.lab.preference import TINY

    if cell.image is not None:
        return cell
    if cell.architecture is not None:
        return replace(cell, image=TINY[cell.architecture])
    return replace(cell, image=run.settings.image)


def _preferred(plan: Plan, cell: Cell) -> str:
    """The hypervisor that the lab would take for a machine as the plan wants it."""
    from vmlab.lab.boot import Wish
    from vmlab.lab.preference import preference

    wish = Wish(
        image=cell.image,
        shares=plan.shares,
        nics=plan.machine.nics,
        network=plan.machine.network,
    )
    return preference(wish, None).hypervisor


def _fits(image: str | None, architecture: Architecture | None) -> bool:
    """Whether an image is of an architecture, as far as its recipe or the store tells."""
    from vmlab.lab.preference import architecture_of

    if image is None or architecture is None:
        return True
    return architecture_of(image) in {None, architecture}

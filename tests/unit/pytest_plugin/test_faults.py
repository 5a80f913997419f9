"""The faults of a mark, and those that a test injects itself, are at work and in the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.pytest_plugin.conftest import Project

from vmlab.report import FaultRecord

pytest_plugins = ["pytester"]

Written = Callable[[str], Project]


def faults(project: Project, test: str = "test_it") -> list[FaultRecord]:
    return list(project.tests()[test].attempts[-1].faults)


@pytest.mark.parametrize(
    "schedule",
    [
        "{'kind': 'pause', 'id': 'nap'}",
        "[{'kind': 'pause', 'id': 'nap'}]",
        "{'seed': 3, 'faults': [{'kind': 'pause', 'id': 'nap'}]}",
        "'nap.toml'",
        "PauseFault(id='nap')",
        "FaultSchedule(faults=(PauseFault(id='nap'),))",
    ],
)
def test_a_schedule_may_be_a_table_a_file_or_objects(written: Written, schedule: str) -> None:
    project = written(f"""
        import pytest
        from vmlab.machine.faults import FaultSchedule, PauseFault

        @pytest.mark.vm(fault={schedule})
        def test_it(vm):
            assert vm.state == "paused"
    """)
    (project.path / "nap.toml").write_text('[[faults]]\nkind = "pause"\nid = "nap"\n')
    project.run().assert_outcomes(passed=1)
    (fault,) = faults(project)
    assert (fault.id, fault.kind, fault.machine, fault.refused) == ("nap", "pause", "vm", "")
    assert fault.cleared_s is not None


def test_a_fault_is_for_the_machine_that_it_names(written: Written) -> None:
    project = written("""
        import pytest

        @pytest.mark.vm(fault={"kind": "pause", "machine": "right"})
        def test_it(vms):
            left, right = vms("left", "right")
            assert left.state == "running"
            assert right.state == "paused"
    """)
    project.run().assert_outcomes(passed=1)
    assert [fault.machine for fault in faults(project)] == ["right"]


def test_a_fault_of_something_that_is_not_there_is_told_plainly(written: Written) -> None:
    project = written("""
        import pytest

        @pytest.mark.vm(fault={"kind": "disk-error", "disk": "data"})
        def test_it(vm):
            pass
    """)
    result = project.run()
    result.assert_outcomes(errors=1)
    said = result.stdout.str()
    assert "faults.0.disk = 'data': one of the disks of 'vm': none" in said
    assert "Traceback" not in said and "factories.py" not in said


def test_what_a_test_injects_itself_is_in_the_report_too(written: Written) -> None:
    project = written("""
        from vmlab.machine.faults import ClockJump, PauseFault

        def test_it(vm):
            nap = vm.inject(PauseFault())
            vm.clear_fault(nap)
            vm.inject(ClockJump(seconds=60))
    """)
    project.run().assert_outcomes(passed=1)
    nap, jump = faults(project)
    assert nap.kind == "pause" and nap.cleared_s is not None
    assert jump.kind == "clock-jump" and jump.parameters["seconds"] == 60


def test_chances_come_from_the_seed_of_the_run(written: Written) -> None:
    project = written("""
        import pytest
        from vmlab.lab import armed

        seeds = []

        @pytest.fixture(autouse=True)
        def spied(monkeypatch):
            inner = armed.FaultRun

            def spy(machines, schedule, **rest):
                seeds.append(schedule.seed)
                return inner(machines, schedule, **rest)

            monkeypatch.setattr(armed, "FaultRun", spy)

        @pytest.mark.vm(fault={"kind": "pause"})
        def test_drawn(vm, vm_seed):
            assert seeds == [vm_seed]

        @pytest.mark.vm(fault={"seed": 5, "faults": [{"kind": "pause"}]})
        def test_said(vm):
            assert seeds[-1] == 5
    """)
    project.run().assert_outcomes(passed=2)


def test_a_machine_that_a_fault_kills_is_no_dead_machine(written: Written, tmp_path: Path) -> None:
    project = written("""
        import pytest

        @pytest.mark.vm(fault={"kind": "kill"})
        def test_it(vm):
            assert not vm.alive
    """)
    project.run().assert_outcomes(passed=1)

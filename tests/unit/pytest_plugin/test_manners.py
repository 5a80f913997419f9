"""A project that has no tests with machines does not notice that vmlab is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.pytest_plugin.conftest import SIMULATED, Project

from vmlab.report import read_run
from vmlab.report.place import find_report

pytest_plugins = ["pytester"]


def test_nothing_is_imported_and_nothing_is_written(project: Project) -> None:
    project.write(
        test_it="""
            import sys

            def test_it(pytestconfig):
                assert pytestconfig.pluginmanager.hasplugin("vmlab")
                known = {name for name in sys.modules if name.partition(".")[0] == "vmlab"}
                assert known == {
                    "vmlab", "vmlab.pytest_plugin",
                    "vmlab.pytest_plugin.plugin", "vmlab.pytest_plugin.options",
                }
                assert "pydantic" not in sys.modules
        """
    )
    before = set(project.path.iterdir())
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        words, cwd=project.path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert "vmlab" not in done.stdout
    assert {path for path in project.path.iterdir() if path.name != "__pycache__"} == before


def test_workers_of_a_project_without_machines_write_nothing(project: Project) -> None:
    project.write(test_it="def test_it(): pass")
    done = project.run_apart("-n", "1")
    assert done.returncode == 0, done.stdout
    assert "report:" not in done.stdout
    assert not project.reports.exists()


def test_a_projects_own_fixtures_of_the_same_names_are_the_projects(project: Project) -> None:
    project.write(
        conftest="""
            import pytest

            def pytest_configure(config):
                config.addinivalue_line("markers", "vm(colour): ours")

            @pytest.fixture
            def vm():
                return "ours"
        """,
        test_it="""
            import pytest

            @pytest.mark.vm("green")
            def test_it(vm):
                assert vm == "ours"
        """,
    )
    project.run("--strict-markers", on=()).assert_outcomes(passed=1)
    assert not project.reports.exists()


def test_what_is_only_collected_begins_no_report(project: Project) -> None:
    project.write(test_it="def test_it(vm): pass")
    project.run("--collect-only")
    assert not project.reports.exists()


def test_help_and_marks_tell_what_there_is(project: Project) -> None:
    said = project.run("--help", on=()).stdout.str()
    for option in ("hypervisor", "image", "scope", "timeout", "seed", "keep", "sit", "report"):
        assert f"--vm-{option}" in said
    assert "@pytest.mark.vm(image=, memory=, cpus=" in project.run("--markers").stdout.str()


def test_a_report_that_is_put_nowhere_in_particular_is_found_there(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    project.write(test_it="def test_it(vm): pass")
    project.pytester.runpytest_inprocess("-p", "no:cacheprovider", *SIMULATED)
    found = find_report()
    assert found.is_relative_to(tmp_path / "state")
    assert [test.name for test in read_run(found).tests()] == ["test_it[simulated]"]

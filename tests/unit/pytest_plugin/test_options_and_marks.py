"""What cannot be meant is refused before anything runs, in the user's words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.pytest_plugin.conftest import Project

pytest_plugins = ["pytester"]

Written = Callable[[str], Project]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("memroy='1G'", "memroy = '1G': did you mean 'memory'? the arguments are image, memory"),
        ("'1G'", "vm(...) = '1G': named arguments only, such as memory='1G'"),
        ("memory='lots'", "memory = 'lots': a size is a number with K, M, G, T or P, such as"),
        ("memory=4096", "memory = 4096: at least 1 MiB"),
        ("cpus=0", "cpus = 0: a whole number, at least 1"),
        ("cpus=True", "cpus = true: a whole number, at least 1"),
        ("image=''", "image = '': the name of an image"),
        ("hypervisors='qemu'", "hypervisors = 'qemu': a list of at least one name"),
        ("hypervisors=['qmu']", "did you mean 'qemu'?"),
        ("share='nowhere:/src'", "nowhere is no directory"),
        ("share='.'", "share = '.': a directory and its place in the guest"),
        ("scope='class'", "scope = 'class': one of 'session', 'module', 'function'"),
        ("timeout=0", "timeout = 0: seconds, as a number greater than 0"),
        ("fault='gone.toml'", "a file with a schedule: there is none at"),
        ("fault=3", "fault = 3: a schedule"),
        ("fault={'kind': 'disk-eror', 'disk': 'data'}", "did you mean 'disk-error'?"),
        ("fault={'kind': 'disk-slow', 'disk': 'data'}", "fault: faults.0.delay"),
    ],
)
def test_a_mark_that_cannot_be_meant_is_an_error_of_collection(
    written: Written, arguments: str, told: str
) -> None:
    project = written(f"""
        import pytest

        @pytest.mark.vm({arguments})
        def test_it(vm):
            pass
    """)
    result = project.run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    said = result.stdout.str()
    assert "@pytest.mark.vm has 1 problem" in said
    assert told in said
    assert "Traceback" not in said and "machine_run.py" not in said
    assert "test_it.py::test_it" in said


def test_all_problems_of_a_mark_are_told_at_once(written: Written) -> None:
    project = written("""
        import pytest
        pytestmark = pytest.mark.vm(cpus=0)

        @pytest.mark.vm(memory=-1, scope="x")
        def test_it(vm):
            pass
    """)
    assert "@pytest.mark.vm has 3 problems" in project.run().stdout.str()


def test_a_nearer_mark_comes_first_and_leaves_the_rest(written: Written) -> None:
    project = written("""
        import pytest
        pytestmark = pytest.mark.vm(memory="1G", cpus=2)

        @pytest.mark.vm(memory="256M")
        class TestThem:
            def test_class(self, vm):
                assert (vm.spec.memory.size, vm.spec.cpus.count) == (256 << 20, 2)

            @pytest.mark.vm(cpus=3)
            def test_function(self, vm, vm_factory):
                assert (vm.spec.memory.size, vm.spec.cpus.count) == (256 << 20, 3)
                assert vm_factory(cpus=1).spec.cpus.count == 1
    """)
    project.run().assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--vm-hypervisor", "qmu"], "--vm-hypervisor = 'qmu': there is no hypervisor 'qmu'; did"),
        (["--vm-timeout", "soon"], "--vm-timeout = 'soon': seconds, as a number greater than 0"),
        (["--vm-timeout", "-3"], "--vm-timeout = '-3': seconds"),
        (["--vm-seed", "x"], "--vm-seed = 'x': a whole number"),
        (["--vm-keep", "some"], "--vm-keep: invalid choice: 'some'"),
        (["--vm-scope", "class"], "--vm-scope: invalid choice: 'class'"),
        (["--vm-report", "test_it.py"], "--vm-report = 'test_it.py': a directory"),
        (["--vm-sit", "-n", "2"], "--vm-sit with -n"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    written: Written, words: list[str], told: str
) -> None:
    project = written("def test_it(vm): pass")
    result = project.run(*words)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = result.stderr.str()
    assert told in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("vm_scope = class", "vm_scope = 'class': one of 'session', 'module', 'function'"),
        ("vm_timeout = never", "vm_timeout = 'never': seconds"),
        ("vm_hypervisor = qemoo", "vm_hypervisor = 'qemoo': there is no hypervisor"),
    ],
)
def test_settings_of_the_ini_file_are_checked_alike(
    written: Written, setting: str, told: str
) -> None:
    project = written("def test_it(vm): pass")
    project.pytester.makeini(f"[pytest]\n{setting}\n")
    result = project.run(on=())
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert told in result.stderr.str()


def test_the_ini_file_says_what_the_command_line_does_not(written: Written) -> None:
    project = written("""
        import pathlib

        def test_it(vm, request):
            assert vm.hypervisor == "simulated"
            run = request.config.pluginmanager.get_plugin("vmlab-run")
            assert run.settings.timeout == 77
            assert run.settings.scope == "module"
    """)
    project.pytester.makeini(
        "[pytest]\nvm_hypervisor = simulated\nvm_timeout = 77\nvm_scope = module\n"
    )
    project.run(on=()).assert_outcomes(passed=1)


def test_tests_run_on_each_hypervisor_that_is_asked_for(written: Written) -> None:
    project = written("""
        import pytest

        def test_any(vm): pass

        @pytest.mark.vm(hypervisors=["qemu", "embedded"])
        def test_some(vm): pass

        def test_none(): pass
    """)
    both = ("--vm-hypervisor", "simulated", "--vm-hypervisor", "embedded")
    result = project.run("--collect-only", "-q", on=both)
    collected = [line for line in result.outlines if "::" in line]
    assert sorted(collected) == [
        "test_it.py::test_any[embedded]",
        "test_it.py::test_any[simulated]",
        "test_it.py::test_none",
        "test_it.py::test_some[embedded]",
    ]
    assert not project.reports.exists()


def test_a_test_for_other_hypervisors_is_skipped_and_says_so(written: Written) -> None:
    project = written("""
        import pytest

        @pytest.mark.vm(hypervisors=["qemu"])
        def test_it(vm): pass
    """)
    project.run().assert_outcomes(skipped=1)
    assert project.tests()["test_it"].reason == "runs on qemu only, as its mark says"


def test_a_seed_gives_each_test_its_own_and_the_same_again(written: Written) -> None:
    project = written("""
        def test_a(vm_seed): print(f"seed {vm_seed}.")
        def test_b(vm_seed): print(f"seed {vm_seed}.")
    """)

    def seeds(seed: str) -> list[str]:
        result = project.run("-s", "--vm-seed", seed)
        return [line.partition("seed ")[2] for line in result.outlines if "seed " in line][:2]

    first = seeds("7")
    assert len(set(first)) == 2
    assert seeds("7") == first
    assert not set(seeds("8")) & set(first)


def test_a_mark_s_image_and_shares_choose_the_hypervisor_as_the_lab_does(written: Written) -> None:
    project = written(
        """
        import pytest

        @pytest.mark.vm(image="debian-12-amd64")
        def test_image(vm):
            pass

        @pytest.mark.vm(share=".:/src:rw")
        def test_share(vm):
            pass
        """
    )
    done = project.run("--collect-only", "-q", on=())
    done.stdout.fnmatch_lines(["*::test_image?qemu?", "*::test_share?qemu?"])


def test_an_image_of_a_mark_that_is_no_recipe_is_told_plainly(written: Written) -> None:
    project = written(
        """
        import pytest

        @pytest.mark.vm(image="./mine.toml")
        def test_image(vm):
            pass
        """
    )
    (project.path / "mine.toml").write_text("nonsense", encoding="utf-8")
    done = project.run("--collect-only", "-q", on=())
    done.stdout.fnmatch_lines(["*test_image*mine.toml*"])
    assert "Traceback" not in done.stdout.str() and "store.py" not in done.stdout.str()

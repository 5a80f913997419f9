"""A test is ended from outside: by the death of its machine, or when its time is over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.pytest_plugin.conftest import Project

pytest_plugins = ["pytester"]

Written = Callable[[str], Project]

# What blocks a test, and the function of Python's that it is in meanwhile.
BLOCKING = {
    "sleep": ("time.sleep(600)", "test_it"),
    "lock": ("threading.Event().wait()", "wait"),
    # A process that is just being started would be nobody's.
    "process": ("subprocess.run(['sleep', '600'])", "communicate"),
    # What the collector finds unclosed would be an error of whichever test runs then.
    "socket": (
        "one, other = socket.socketpair()\n                with one, other: one.recv(1)",
        "test_it",
    ),
    "loop": ("\n                while True: pass", "test_it"),
}


@pytest.mark.parametrize("call", BLOCKING)
def test_a_test_out_of_time_ends_whatever_it_is_doing(written: Written, call: str) -> None:
    blocks, function = BLOCKING[call]
    project = written(f"""
        import pytest, socket, subprocess, sys, threading, time

        def end(trial):
            time.sleep(0.2)
            main = threading.main_thread().ident
            names = set()
            while {function!r} not in names:
                time.sleep(0.01)
                frame, names = sys._current_frames()[main], set()
                while frame is not None:
                    names.add(frame.f_code.co_name)
                    frame = frame.f_back
            trial._timer.function(*trial._timer.args)

        @pytest.mark.vm(timeout=600)
        def test_it(vm, request):
            trial = request.config.pluginmanager.get_plugin("vmlab-run").current
            threading.Thread(target=end, args=[trial], daemon=True).start()
            try:
                {blocks}
            except Exception:
                pytest.fail("it is no error of the test's own")

        def test_next(vm):
            pass
    """)
    result = project.run()
    result.assert_outcomes(failed=1, passed=1)
    test = project.tests()["test_it"]
    assert test.outcome.value == "fail"
    assert "the test did not end within 600 s" in test.reason
    assert "vm-console-serial.log" in [artifact.name for artifact in test.artifacts]


def test_the_time_of_a_test_counts_from_its_first_fixture_on(written: Written) -> None:
    project = written("""
        import pytest, time

        @pytest.fixture
        def slow():
            time.sleep(600)

        def test_it(slow, vm):
            pass

        def test_next(request):
            assert request.config.pluginmanager.get_plugin("vmlab-run").current._timer is None
    """)
    project.run("--vm-timeout", "2.5").assert_outcomes(errors=1, passed=1)
    assert "did not end within 2.5 s" in project.tests()["test_it"].reason


DYING = """
    import time
    import pytest
    from vmlab.lab.incident import Incident, IncidentKind

    @pytest.fixture
    def die(vm):
        def happen(kind, *, fatal):
            told = Incident(IncidentKind(kind), vm.name, "it did", "line 1\\nline 2", fatal=fatal)

            async def tell():
                vm.watchdog._on_incident(told)

            vm.run(tell())
        return happen

    def test_panics(vm, die):
        die("panic", fatal=True)
        time.sleep(600)

    def test_is_ill(vm, die):
        die("oops", fatal=False)
        time.sleep(600)

    def test_does_not_care(vm, die):
        try:
            die("panic", fatal=True)
        except BaseException:
            pass

    @pytest.fixture
    def dying(die):
        die("panic", fatal=True)

    def test_never_begins(dying):
        raise AssertionError("it began")

    def test_next(vm):
        assert vm.alive
"""


def test_a_machine_that_dies_is_the_error_of_its_test_and_of_no_other(written: Written) -> None:
    project = written(DYING)
    result = project.run()
    result.assert_outcomes(errors=3, failed=1, passed=1)
    assert project.outcomes() == {
        "test_panics": "error",
        "test_is_ill": "fail",
        "test_does_not_care": "error",
        "test_never_begins": "error",
        "test_next": "pass",
    }
    said = result.stdout.str()
    assert "machine 'vm': it did" in said and "line 2" in said
    assert "ERROR at call of test_panics" in said and "- MachineDied: machine 'vm': it" in said
    assert "interruption.py" not in said and "trial.py" not in said
    panicked = project.tests()["test_panics"].attempts[-1]
    assert panicked.reason.startswith("machine 'vm': it did")
    assert "panic" in [mark.kind for mark in panicked.machines[0].timeline]
    assert "vm-console-serial.log" in [artifact.name for artifact in panicked.artifacts]


def test_what_befalls_a_machine_between_tests_is_told_by_the_next_one_that_has_it(
    written: Written,
) -> None:
    project = written("""
        import pytest
        from vmlab.lab.incident import Incident, IncidentKind

        @pytest.fixture(scope="module")
        def service(module_vm_factory):
            return module_vm_factory(name="service")

        machines = []

        def test_uses_it(service):
            machines.append(service)

        def test_uses_none(vm_hypervisor):
            (service,) = machines
            told = Incident(IncidentKind.PANIC, "service", "it did", fatal=True)

            async def tell():
                service.watchdog._on_incident(told)

            service.run(tell())

        def test_finds_it_dead(service):
            raise AssertionError("it began")
    """)
    project.run()
    assert project.outcomes() == {
        "test_uses_it": "pass",
        "test_uses_none": "pass",
        "test_finds_it_dead": "error",
    }
    assert "machine 'service': it did" in project.tests()["test_finds_it_dead"].reason


def test_the_limit_of_pytest_timeout_is_as_good_an_end_with_evidence(written: Written) -> None:
    project = written("""
        import pytest, time

        @pytest.mark.timeout(1, func_only=True)
        def test_it(vm):
            # A signal that comes just before a sleep begins is looked at when the sleep is over,
            # and pytest-timeout sends one.
            while True:
                time.sleep(0.05)

        def test_next(vm):
            pass
    """)
    project.run().assert_outcomes(failed=1, passed=1)
    test = project.tests()["test_it"]
    assert "Timeout" in test.reason
    assert "vm-console-serial.log" in [artifact.name for artifact in test.artifacts]

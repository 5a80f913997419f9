"""The ladder of fixtures: what each hands out, and how long it lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.pytest_plugin.conftest import Project

pytest_plugins = ["pytester"]

Written = Callable[[str], Project]


def test_each_test_has_machines_of_its_own_which_go_with_it(written: Written) -> None:
    project = written("""
        seen = []

        def test_one(vm, vm_factory, request):
            more = vm_factory(name="another", memory="64M", disks=["1M"])
            seen.extend([vm, more])
            assert {machine.name for machine in vm.lab.machines} == {"vm", "another"}
            assert more.spec.memory.size == 64 << 20
            assert more.spec.disk("disk0").size == 1 << 20

        def test_two(vm):
            assert vm is not seen[0] and vm.name == "vm"
            assert vm.lab.machines == [vm]
            assert [old.state for old in seen] == ["deleted", "deleted"]
    """)
    project.run().assert_outcomes(passed=2)


def test_a_machine_may_be_had_before_its_first_boot(written: Written) -> None:
    project = written("""
        def test_it(vm_off):
            assert vm_off.state == "created"
            vm_off.start()
            assert vm_off.state == "running"
    """)
    project.run().assert_outcomes(passed=1)


def test_several_machines_are_on_one_network_and_know_their_names(written: Written) -> None:
    project = written("""
        def test_names(vms):
            client, server = vms("client", "server")
            assert (client.name, server.name) == ("client", "server")
            assert client.addresses.keys() == server.addresses.keys()

        def test_numbers(vms):
            assert len(vms(3, memory="64M")) == 3
    """)
    project.run().assert_outcomes(passed=2)


def test_disks_and_networks_are_made_for_machines(written: Written) -> None:
    project = written("""
        def test_it(vm_factory, disk_factory, network_factory):
            backbone = network_factory("backbone")
            data = disk_factory("2M", name="data")
            machines = [vm_factory(disks=[data], networks=[backbone]) for _ in range(2)]
            assert all(vm.spec.disk("data").size == 2 << 20 for vm in machines)
            first, second = (vm.addresses["backbone"] for vm in machines)
            assert first != second
    """)
    project.run().assert_outcomes(passed=1)


def test_machines_of_a_module_live_as_long_and_belong_to_each_test_that_uses_them(
    project: Project,
) -> None:
    project.write(
        conftest="""
            import pytest

            @pytest.fixture(scope="module")
            def service(module_vm_factory):
                return module_vm_factory(name="service")

            @pytest.fixture(scope="session")
            def ground(session_vm_factory):
                return session_vm_factory(name="ground")
        """,
        test_a="""
            kept = []

            def test_one(service, ground):
                kept.extend([service, ground])

            def test_two(service, ground):
                assert kept == [service, ground]
                service.record("seen", 1)

            def test_three():
                pass
        """,
        test_b="""
            def test_four(service, ground):
                assert service.lab.machines == [ground, service]
        """,
    )
    project.run().assert_outcomes(passed=4)
    machines = {
        name: [machine.name for machine in test.attempts[-1].machines]
        for name, test in project.tests().items()
    }
    assert machines == {
        "test_one": ["ground", "service"],
        "test_two": ["ground", "service"],
        "test_three": [],
        "test_four": ["ground", "service"],
    }
    metrics = {
        name: [metric.name for metric in test.attempts[-1].metrics]
        for name, test in project.tests().items()
    }
    assert "seen" in metrics["test_two"] and "seen" not in metrics["test_one"]


def test_templates_live_as_long_as_the_scope_says(written: Written) -> None:
    project = written("""
        import pytest

        def asked(monkeypatch, vm_factory):
            given = {}
            monkeypatch.setattr(vm_factory._lab, "vm", lambda **wishes: given.update(wishes))
            vm_factory()
            return given["template"], vm_factory._lab

        def test_session(monkeypatch, vm_factory, request):
            template, lab = asked(monkeypatch, vm_factory)
            run = request.config.pluginmanager.get_plugin("vmlab-run")
            assert template and lab is run.lab
            vm_factory.machines.clear()

        @pytest.mark.vm(scope="module")
        def test_module(monkeypatch, vm_factory, vm_module_lab, request):
            template, lab = asked(monkeypatch, vm_factory)
            run = request.config.pluginmanager.get_plugin("vmlab-run")
            assert template and lab is vm_module_lab and lab is not run.lab
            vm_factory.machines.clear()

        @pytest.mark.vm(scope="function")
        def test_function(monkeypatch, vm_factory):
            assert not asked(monkeypatch, vm_factory)[0]
            vm_factory.machines.clear()
    """)
    project.run().assert_outcomes(passed=3)


def test_a_fixture_may_ask_for_a_machine_on_the_way(written: Written) -> None:
    project = written("""
        def test_it(request):
            vm = request.getfixturevalue("vm")
            assert vm.hypervisor == "simulated"
    """)
    project.run().assert_outcomes(passed=1)
    (machine,) = project.tests()["test_it"].attempts[-1].machines
    assert machine.hypervisor == "simulated"


def test_machines_that_are_kept_have_names_of_their_own(written: Written, tmp_path: Path) -> None:
    project = written("""
        def test_passes(vm): pass
        def test_fails(vm, vms):
            one, two = vms(2)
            assert len({vm.name, one.name, two.name}) == 1
    """)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMLAB_HOME", str(tmp_path))
        said = project.run("--vm-keep", "failed").outlines
        kept = {line.split()[1] for line in said if line.startswith("kept: ")}
        assert len(kept) == 3 and "vm" not in kept
        (machines,) = [machine.machines for machine in project.tests()["test_fails"].attempts]
        assert {machine.name for machine in machines} == kept

"""What pytest loads in every project: options, fixtures, and hooks that wake the rest when needed.

Nothing of vmlab is imported here before a test asks for a machine (or an option of ours is given):
a project that has no such test pays for this file alone. The hooks of a run with machines are
`MachineRun`'s, in `machine_run`; fixtures are thin, what they hand out is made in `factories`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmlab.lab.laboratory import Lab
    from vmlab.lab.networks import LabNetwork
    from vmlab.lab.vm import VM, LabDisk
    from vmlab.pytest_plugin.factories import VmFactory
    from vmlab.pytest_plugin.machine_run import MachineRun

MARK = (
    "vm(image=, memory=, cpus=, hypervisors=[...], share=, scope=, fault=, timeout=): what the "
    "machine of a test is like, for the fixtures vm, vm_off, vm_factory and vms"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options; most are settings of the ini file too, under the same name."""
    from vmlab.pytest_plugin import options

    options.add_to(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known, and refuse options that cannot be meant."""
    from vmlab.pytest_plugin import options

    config.addinivalue_line("markers", MARK)
    if options.any_given(config):
        options.settings_of(config)
    option = config.option
    if getattr(option, "dist", "no") != "no" and not option.collectonly:
        from vmlab.pytest_plugin.workers import Controller

        config.pluginmanager.register(Controller(config), "vmlab-controller")


def run_with_machines(config: pytest.Config) -> MachineRun:
    """This process's run with machines; the first call begins it, and imports what it takes."""
    from vmlab.pytest_plugin.machine_run import MachineRun

    return MachineRun.of(config)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a machine runs on each hypervisor that it is meant for."""
    if "vm_hypervisor" not in metafunc.fixturenames:
        return
    run = run_with_machines(metafunc.config)
    names = run.hypervisors_for(metafunc.definition)
    metafunc.parametrize("vm_hypervisor", names, indirect=True, scope="session")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Plan files are tests too (`plans`)."""
    if not file_path.name.endswith(".vmlab.toml"):
        return None
    from vmlab.pytest_plugin import plans

    return plans.pytest_collect_file(file_path, parent)


# ------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def vm_hypervisor(request: pytest.FixtureRequest) -> str:
    """The name of the hypervisor that this test's machines run on."""
    name = getattr(request, "param", None)
    return name if name is not None else run_with_machines(request.config).default_hypervisor


@pytest.fixture
def vm_seed(request: pytest.FixtureRequest) -> int:
    """This test's seed: of the run's seed and the test's name, the same in every run of both."""
    return run_with_machines(request.config).seed_of(request.node)


@pytest.fixture(scope="module")
def vm_module_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The laboratory of a module whose templates live no longer than it does."""
    with run_with_machines(request.config).own_lab() as lab:
        yield lab


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, vm_hypervisor: str) -> Iterator[VmFactory]:
    """Makes machines for this test: `vm_factory(memory="1G")`; they go when it ends.

    What a call leaves out is as the test's mark says, then as the options do.
    """
    with run_with_machines(request.config).factory(request, vm_hypervisor) as factory:
        yield factory


@pytest.fixture(scope="module")
def module_vm_factory(request: pytest.FixtureRequest, vm_hypervisor: str) -> Iterator[VmFactory]:
    """The same for machines that live as long as the module: templates to fork, services to use."""
    with run_with_machines(request.config).factory(request, vm_hypervisor) as factory:
        yield factory


@pytest.fixture(scope="session")
def session_vm_factory(request: pytest.FixtureRequest, vm_hypervisor: str) -> Iterator[VmFactory]:
    """The same for machines that live until the last test has run."""
    with run_with_machines(request.config).factory(request, vm_hypervisor) as factory:
        yield factory


@pytest.fixture
def vm(vm_factory: VmFactory) -> VM:
    """A machine of this test's own: booted, and as if nobody had ever used it."""
    return vm_factory.first()


@pytest.fixture
def vm_off(vm_factory: VmFactory) -> VM:
    """The same before its first boot: `vm_off.start()`."""
    return vm_factory.first(boot=False)


@pytest.fixture
def vms(vm_factory: VmFactory) -> Callable[..., list[VM]]:
    """Makes several machines on a private network, which find each other by name.

    `client, server = vms("client", "server")`, or `vms(3)`.
    """
    return vm_factory.several


@pytest.fixture
def disk_factory(vm_factory: VmFactory) -> Callable[..., LabDisk]:
    """Makes disks for this test's machines: `disk_factory("1G")`."""
    return vm_factory.disk


@pytest.fixture
def network_factory(vm_factory: VmFactory) -> Callable[..., LabNetwork]:
    """Makes private networks for this test's machines: `network_factory("backbone")`."""
    return vm_factory.network


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """A test whose machine died is an error, not a failure: it could not do its work."""
    if getattr(report, "vm_died", False) and report.failed and report.when == "call":
        return "error", "E", "ERROR"
    return None

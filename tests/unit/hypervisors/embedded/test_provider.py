"""What the engine says of a host, and who may open it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.engine.code import arena, cache
from vmlab.engine.compile import client
from vmlab.hypervisors import registry
from vmlab.hypervisors.embedded import hypervisor
from vmlab.hypervisors.embedded.hypervisor import CAPABILITIES, _compile, provider
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import HypervisorUnavailable, InvalidSpec

OWNER = Owner("run", "r1", Path("/nowhere"))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "default_folder", lambda: tmp_path / "cache" / "engine")
    monkeypatch.setattr(hypervisor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hypervisor.shutil, "which", lambda program: None)


def item(name: str) -> tuple[bool, str]:
    (found,) = [each for each in provider.probe().items if each.name == name]
    return found.works, found.detail


def test_the_registry_knows_it() -> None:
    assert registry.provider("embedded") is provider
    assert registry.names()[0] == "embedded"


def test_what_it_lacks_it_gives_a_reason_for() -> None:
    lacking = set(Capability) - CAPABILITIES.supported
    without = {Capability.SHARE_VIRTIOFS, Capability.SHARE_COPY}
    without |= {Capability.GPU_PASSTHROUGH, Capability.SRIOV_PASSTHROUGH}
    assert lacking - without == set(CAPABILITIES.unsupported)


def test_a_host_with_everything_missing_but_the_compiler_can_run_it() -> None:
    found = provider.probe()
    assert found.available and found.reason == ""
    assert item("interpreter") == (True, "compiled at the first start")
    assert item("executable memory")[0]
    assert item("user network") == (False, "passt is not installed")


def test_a_compiled_interpreter_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypervisor, "find_spec", lambda name: None)
    missing = provider.probe()
    assert not missing.available and "llvmlite is not installed" in missing.reason
    monkeypatch.setattr("vmlab.engine.accel.interpreter.is_prepared", lambda: True)
    assert provider.probe().available
    assert item("interpreter")[1].startswith("compiled, in ")


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypervisor.os, "access", lambda path, mode: False)
    works, detail = item("interpreter")
    assert works and "compiled anew" in detail


def test_a_processor_without_code_is_told_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypervisor.platform, "machine", lambda: "s390x")
    assert not provider.probe().available
    with pytest.raises(HypervisorUnavailable, match="s390x"):
        provider.open(OWNER)


def test_memory_that_may_not_be_executed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(arena, "Arena", refuse)
    found = provider.probe()
    assert (found.available, found.reason) == (
        False,
        "executable memory: refused: Permission denied",
    )


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="colour"):
        provider.open(OWNER, {"colour": "red"})


def test_a_debugger_s_socket_is_the_machine_s() -> None:
    assert provider.open(OWNER, {"gdb": "/run/gdb.sock"}).debugger == Path("/run/gdb.sock")
    assert provider.open(OWNER).debugger is None
    with pytest.raises(InvalidSpec, match="absolute path"):
        provider.open(OWNER, {"gdb": "gdb.sock"})


def test_a_compiler_that_fails_makes_it_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise client.CompileFailed("no LLVM")

    monkeypatch.setattr("vmlab.engine.accel.interpreter.prepare", fail)
    with pytest.raises(HypervisorUnavailable, match="no LLVM"):
        _compile()


def test_a_cache_that_cannot_be_written_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("it would not be kept")

    monkeypatch.setattr("vmlab.engine.accel.interpreter.prepare", fail)
    monkeypatch.setattr(hypervisor.os, "access", lambda path, mode: False)
    _compile()

"""What QEMU says of itself on a host: programs, versions, capabilities, options."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.qemu import provider
from vmlab.hypervisors.qemu.hypervisor import find_program
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import HypervisorUnavailable, InvalidSpec


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner("run", "r", tmp_path)


def fake_program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_probe_tells_programs_and_accelerators() -> None:
    probe = provider.probe()
    assert probe.available
    assert probe.version >= "7.2"
    works = {item.name: item.works for item in probe.items}
    assert works["qemu-system-x86_64"]
    assert works["tcg"]
    assert {"kvm", "hvf", "whpx", "qemu-img"} <= set(works)


def test_capabilities_are_those_of_the_architectures_that_are_offered(owner: Owner) -> None:
    everything = asyncio.run(provider.open(owner).capabilities())
    assert Capability.HOTPLUG_NIC in everything
    assert everything.accelerators[-1] == "tcg"
    riscv = asyncio.run(provider.open(owner, {"architecture": "riscv64"}).capabilities())
    assert riscv.architectures == {Architecture.RISCV64}
    assert Capability.HOTPLUG_NIC not in riscv
    assert "PCI hot-plug" in riscv.unsupported[Capability.HOTPLUG_NIC]
    assert "for each node" in riscv.unsupported[Capability.NUMA]
    assert Capability.NUMA in everything
    assert asyncio.run(provider.open(owner).probe()).available


@pytest.mark.parametrize(("version", "loads"), [("7.2.0", False), ("8.2.0", True)])
def test_pseries_guest_is_loaded_by_a_qemu_that_saves_its_decrementer(
    owner: Owner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    loads: bool,
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    fake_program(tmp_path, "qemu-system-ppc64", f"echo QEMU emulator version {version}")
    qemu = provider.open(owner, {"architecture": "ppc64le"})
    found = asyncio.run(qemu.capabilities())
    assert qemu.loads(Architecture.PPC64LE, "tcg") is loads
    assert qemu.loads(Architecture.PPC64LE, "kvm")
    for capability in (
        Capability.MEMORY_SNAPSHOT,
        Capability.FORK,
        Capability.LIVE_MIGRATION,
    ):
        assert (capability in found) is loads
        assert ("decrementer" in found.unsupported.get(capability, "")) is not loads
    assert {Capability.SNAPSHOT, Capability.RESTORE, Capability.PAUSE} <= found.supported


def test_options_that_are_wrong_are_refused(owner: Owner) -> None:
    with pytest.raises(InvalidSpec, match="no such option"):
        provider.open(owner, {"speed": "high"})
    with pytest.raises(InvalidSpec, match="architecture"):
        provider.open(owner, {"architecture": "z80"})


def test_host_without_qemu_is_told_what_to_install(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    probe = provider.probe()
    assert not probe.available
    assert "no QEMU of version 7.2" in probe.reason
    assert "qemu-system-x86" in str(probe.hint)
    with pytest.raises(HypervisorUnavailable, match="QEMU is not installed"):
        provider.open(owner)


def test_programs_that_are_too_old_or_broken_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    fake_program(tmp_path, "qemu-system-x86_64", "echo QEMU emulator version 6.1.0")
    fake_program(tmp_path, "qemu-system-riscv64", "echo nothing")
    (tmp_path / "qemu-system-aarch64").write_text("#!/no/such/interpreter\n")
    (tmp_path / "qemu-system-aarch64").chmod(0o755)
    assert find_program(Architecture.RISCV64) is None
    assert find_program(Architecture.AARCH64) is None
    (tmp_path / "qemu-system-aarch64").unlink()
    items = {item.name: item for item in provider.probe().items}
    assert not items["qemu-system-x86_64"].works
    assert items["qemu-system-x86_64"].hint == "needs 7.2"

"""The host's counter, which x86_64 guests under TCG have for a clock."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.qemu import host_ticks
from vmlab.machine.architecture import Architecture


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86_64 host, for its counter")
def test_the_counter_is_as_fast_each_time_it_is_measured() -> None:
    found = [host_ticks.measured_khz() for _ in range(3)]
    assert min(found) > 100_000, "a hundred million ticks a second"
    assert max(found) - min(found) < max(found) / 1000


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    answers = iter([2_000_000, 3_000_000])
    monkeypatch.setattr(host_ticks, "measured_khz", lambda: next(answers))
    assert [host_ticks.host_ticks_khz() for _ in range(2)] == [2_000_000] * 2
    # After a restart of the host it may be another one.
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(host_ticks, "_BOOT_ID", tmp_path / "boot")
    assert host_ticks.host_ticks_khz() == 3_000_000


def test_where_it_cannot_be_had_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*arguments: object, **options: object) -> Any:
        raise OSError("not permitted")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert host_ticks.measured_khz() is None
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(host_ticks, "_BOOT_ID", tmp_path / "none")
    assert host_ticks.host_ticks_khz() is None
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert host_ticks.host_ticks_khz() is None


def test_only_kernels_that_would_measure_it_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmlab.hypervisors.qemu import hypervisor

    monkeypatch.setattr(hypervisor, "host_ticks_khz", lambda: 2_000_000)
    told = hypervisor.QemuHypervisor.ticks_khz
    asked: Any = object()
    assert told(asked, Architecture.X86_64, "tcg") == 2_000_000
    assert told(asked, Architecture.X86_64, "kvm") is None
    assert told(asked, Architecture.RISCV64, "tcg") is None

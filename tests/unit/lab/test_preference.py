"""Who runs a machine when nobody was named, and where one that was kept is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import Home, Store
from vmlab.hypervisors.records import MachineRecords
from vmlab.images.image import Image
from vmlab.lab import preference as preferences
from vmlab.lab.boot import Wish
from vmlab.lab.preference import TINY, Preference, holder, preference
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import MachineNotFound


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(preferences.shutil, "which", lambda program: None)


def test_the_embedded_engine_runs_what_nobody_else_was_named_for() -> None:
    chosen = preference(Wish(), None)
    assert chosen == Preference("embedded")
    assert chosen.tiny_image == TINY[Architecture.RISCV64]


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wish(image="debian-12-amd64-tiny"), "runs riscv64 guests, and debian-12-amd64-tiny is"),
        (Wish(image="debian-12-amd64"), "runs riscv64 guests, and debian-12-amd64 is x86_64"),
        (Wish(shares=("/tmp:/src:rw",)), "mounts no directories"),
        (Wish(shares=("/tmp:/src:9p",)), "mounts no directories"),
        (Wish(network=True), "needs passt"),
    ],
)
def test_what_the_engine_cannot_do_is_qemus_and_is_told(wish: Wish, reason: str) -> None:
    chosen = preference(wish, None)
    assert chosen.hypervisor == "qemu"
    assert reason in chosen.reason


def test_a_machine_that_waits_for_gdb_is_the_engines() -> None:
    assert preference(Wish(gdb=True), None).hypervisor == "embedded"


def test_a_copied_share_and_a_network_with_passt_are_the_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert preference(Wish(shares=("/tmp:/src:rw:copy",)), None).hypervisor == "embedded"
    monkeypatch.setattr(preferences.shutil, "which", lambda program: f"/usr/bin/{program}")
    assert preference(Wish(network=True), None).hypervisor == "embedded"


def test_a_share_that_is_only_read_is_mounted_where_it_can_be_and_else_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = Wish(shares=("/tmp:/src",))
    assert preference(shared, None).hypervisor == "embedded"
    monkeypatch.setattr(preferences.shutil, "which", lambda program: f"/usr/bin/{program}")
    assert preference(shared, None).hypervisor == "qemu"


def test_a_host_that_the_engine_has_no_code_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences.platform, "machine", lambda: "s390x")
    assert "no code for s390x" in preference(Wish(), None).reason


def test_whoever_was_named_runs_it_whatever_it_can_do() -> None:
    shared = Wish(shares=("/tmp:/src",))
    assert preference(shared, "embedded") == Preference("embedded")
    qemu = preference(Wish(), "qemu")
    assert qemu == Preference("qemu")
    assert qemu.tiny_image in TINY.values()


def test_an_image_of_another_architecture_is_seen_when_it_is_known(tmp_path: Path) -> None:
    riscv = Image("0" * 64, "mine", Architecture.RISCV64, tmp_path, {})
    other = replace(riscv, architecture=Architecture.AARCH64)
    chosen = preference(Wish(image="mine"), None)
    assert chosen.for_image(riscv, None) is chosen
    assert "mine is aarch64" in chosen.for_image(other, None).reason
    assert chosen.for_image(other, "embedded") is chosen
    assert Preference("qemu").for_image(other, None) == Preference("qemu")


def test_a_kept_machine_is_found_where_it_is(tmp_path: Path) -> None:
    owner = Store.open(Home.open(tmp_path)).owner
    for hypervisor, name in (("embedded", "one"), ("qemu", "two")):
        records = MachineRecords(owner, hypervisor)
        records.create(f"id-{name}")
        records.save(f"id-{name}", {"spec": {"name": name}})
    damaged = MachineRecords(owner, "embedded").create("id-three")
    (damaged / "machine.json").write_text("{")
    assert holder("one", owner, None) == "embedded"
    assert holder("two", owner, None) == "qemu"
    assert holder("id-two", owner, None) == "qemu"
    assert holder("two", owner, "simulated") == "simulated"
    with pytest.raises(MachineNotFound, match="'three'"):
        holder("three", owner, None)

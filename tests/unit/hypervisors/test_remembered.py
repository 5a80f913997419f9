"""Answers of probes are kept while what they are about is unchanged, and no longer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmlab.hypervisors import accelerators
from vmlab.hypervisors.accelerators import QEMU_BINARIES
from vmlab.hypervisors.base import ProbeItem
from vmlab.hypervisors.qemu.hypervisor import find_program
from vmlab.hypervisors.remembered import facts_of, remembered
from vmlab.machine.architecture import Architecture

BROKEN = ProbeItem(name="kvm", works=False, detail="/dev/kvm opens but does not run a guest's "
                   "instructions (internal error)", hint="tcg")  # fmt: skip
BUSY = ProbeItem(name="kvm", works=False, detail="/dev/kvm opens but cannot make a machine: busy")
WORKS = ProbeItem(name="kvm", works=True, detail="ran a guest in 1.0 ms")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Asked:
    """Counts how often it is asked."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.times = 0

    def __call__(self) -> object:
        self.times += 1
        return self.answer


def test_an_answer_is_kept_for_the_next_who_asks_about_the_same() -> None:
    ask = Asked([7, 2])
    assert remembered("q", (1, "a"), ask) == [7, 2]
    assert remembered("q", (1, "a"), ask) == [7, 2]
    assert ask.times == 1


@pytest.mark.parametrize(("question", "about"), [("q", (2, "a")), ("r", (1, "a"))])
def test_what_has_changed_is_asked_anew(question: str, about: tuple[int, str]) -> None:
    remembered("q", (1, "a"), Asked("old"))
    assert remembered(question, about, Asked("new")) == "new"
    assert remembered(question, about, Asked("newer")) == "new"


def test_no_answer_is_not_kept() -> None:
    assert remembered("q", (1,), Asked(None)) is None
    assert remembered("q", (1,), Asked("now")) == "now"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"question": "q"}', b"\xff\xfe"])
def test_a_damaged_file_is_as_good_as_none(cache: Path, damage: bytes) -> None:
    remembered("q", (1,), Asked("old"))
    (kept,) = (cache / "vmlab" / "probes").iterdir()
    kept.write_bytes(damage)
    assert remembered("q", (1,), Asked("new")) == "new"
    assert json.loads(kept.read_bytes())["answer"] == "new"


def test_a_cache_that_cannot_be_written_harms_nobody(cache: Path) -> None:
    cache.write_text("a file where a directory should be")
    assert remembered("q", (1,), Asked("answer")) == "answer"


def test_nothing_is_left_of_a_file_that_cannot_be_put_in_its_place(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", refuse)
    assert remembered("q", (1,), Asked("answer")) == "answer"
    assert list((cache / "vmlab" / "probes").iterdir()) == []


def test_a_qemu_that_was_replaced_is_asked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program = tmp_path / QEMU_BINARIES[Architecture.PPC64LE]

    def install(version: str) -> None:
        program.write_text(f"#!/bin/sh\necho . >>{tmp_path}/asked\necho version {version}\n")
        program.chmod(0o755)

    def version() -> str:
        found = find_program(Architecture.PPC64LE)
        assert found is not None
        return found.text

    install("8.2.0")
    assert [version(), version()] == ["8.2.0", "8.2.0"]
    assert (tmp_path / "asked").read_text() == ".\n"
    install("10.0.0")
    assert version() == "10.0.0"


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Asked]]:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accelerators, "KVM_DEVICE", str(device))

    def install(answer: ProbeItem) -> Asked:
        asked = Asked(answer)
        monkeypatch.setattr(accelerators, "probe_kvm", asked)
        accelerators.kvm.cache_clear()
        return asked

    yield install
    accelerators.kvm.cache_clear()


@pytest.mark.parametrize("item", [WORKS, BROKEN])
def test_what_kvm_can_do_here_is_found_out_once(
    probe: Callable[..., Asked], item: ProbeItem
) -> None:
    probe(item)
    assert accelerators.kvm() == item
    again = probe(item)
    assert accelerators.kvm() == item
    assert again.times == 0


def test_a_device_that_was_busy_is_asked_again(probe: Callable[..., Asked]) -> None:
    probe(BUSY)
    assert accelerators.kvm() == BUSY
    probe(WORKS)
    assert accelerators.kvm() == WORKS


def test_a_device_whose_mode_has_changed_is_asked_again(
    probe: Callable[..., Asked], tmp_path: Path
) -> None:
    probe(BROKEN)
    accelerators.kvm()
    (tmp_path / "kvm").chmod(0o600)
    probe(WORKS)
    assert accelerators.kvm() == WORKS


def test_an_answer_of_another_form_is_asked_for_again(
    probe: Callable[..., Asked], cache: Path
) -> None:
    probe(WORKS)
    accelerators.kvm()
    (kept,) = (cache / "vmlab" / "probes").iterdir()
    data = json.loads(kept.read_bytes())
    kept.write_text(json.dumps(data | {"answer": {"works": "perhaps"}}))
    again = probe(BROKEN)
    assert accelerators.kvm() == BROKEN
    assert again.times == 1


def test_without_a_device_the_probe_is_asked(
    probe: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerators, "KVM_DEVICE", "/nonexistent")
    for _ in range(2):
        assert probe(BUSY).times == 0
        assert accelerators.kvm() == BUSY


def test_the_facts_of_a_file_are_those_that_change_with_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    before = facts_of(str(path))
    assert facts_of(str(path)) == before
    path.write_text("other")
    assert facts_of(str(path)) != before
    with pytest.raises(OSError, match="No such file"):
        facts_of(os.fspath(tmp_path / "nothing"))

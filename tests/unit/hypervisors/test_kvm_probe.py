"""The KVM probe against a KVM that is played: whatever hosts the tests have, each answer is met."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import platform
import runpy
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmlab.hypervisors import kvm_probe
from vmlab.hypervisors.kvm_probe import probe

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, for KVM")


class PlayedKvm:
    """A KVM whose guest does what `exits` say: (reason, port, value), or an exception."""

    def __init__(self) -> None:
        self.version = 12
        self.exits: Iterator[tuple[int, int, int] | Exception] = iter(())
        self.failing: dict[int, int] = {}
        self.shared = tempfile.TemporaryFile()  # noqa: SIM115 (the fixture closes it)
        self.shared.truncate(4096)
        self.asked: list[int] = []

    def ioctl(self, fd: int, request: int, argument: object = 0, mutate: bool = False) -> int:
        self.asked.append(request)
        if request in self.failing:
            raise OSError(self.failing[request], os.strerror(self.failing[request]))
        match request:
            case kvm_probe.GET_API_VERSION:
                return self.version
            case kvm_probe.CREATE_VM:
                return os.open(os.devnull, os.O_RDWR)
            case kvm_probe.CREATE_VCPU:
                return os.dup(self.shared.fileno())
            case kvm_probe.GET_VCPU_MMAP_SIZE:
                return 4096
            case kvm_probe.RUN:
                self.run()
        return 0

    def run(self) -> None:
        found = next(self.exits)
        if isinstance(found, Exception):
            raise found
        reason, port, value = found
        data = 64
        with mmap.mmap(self.shared.fileno(), 4096) as page:
            struct.pack_into("<I", page, 8, reason)
            struct.pack_into("<BBHIQ", page, 32, 1, 1, port, 1, data)
            page[data] = value


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedKvm]:
    played = PlayedKvm()
    monkeypatch.setattr(kvm_probe.fcntl, "ioctl", played.ioctl)
    yield played
    played.shared.close()


def ask(architecture: str = "x86_64", seconds: float = 5.0) -> dict[str, object]:
    before = len(list(Path("/dev/fd").iterdir()))
    answer = probe(os.devnull, architecture, seconds)
    assert len(list(Path("/dev/fd").iterdir())) == before, "a descriptor was left open"
    answer.pop("ms", None)
    return answer


def test_a_guest_that_does_all_it_should(kvm: PlayedKvm) -> None:
    kvm.exits = iter([(2, 0xF1, 0x33), (10, 0, 0), InterruptedError(), (2, 0xF4, 0x4F)])
    assert ask() == {
        "step": "run",
        "writes": [kvm_probe.TRAPPED, kvm_probe.FINISHED],
        "exit": "",
    }


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (5, "halt"),
        (8, "shutdown (triple fault)"),
        (9, "failed entry"),
        (17, "internal error"),
        (99, "exit 99"),
    ],
)
def test_a_guest_that_stops_says_how(kvm: PlayedKvm, reason: int, name: str) -> None:
    kvm.exits = iter([(2, 0xF1, 0x33), (reason, 0, 0)])
    assert ask() == {"step": "run", "writes": [kvm_probe.TRAPPED], "exit": name}


def test_a_guest_that_does_not_end_runs_out_of_time(kvm: PlayedKvm) -> None:
    kvm.exits = itertools.repeat(InterruptedError())
    assert ask(seconds=0.05) == {"step": "run", "writes": [], "exit": "time ran out"}


@pytest.mark.parametrize(
    ("request_", "step"),
    [
        (kvm_probe.GET_API_VERSION, "version"),
        (kvm_probe.CREATE_VM, "create-vm"),
        (kvm_probe.CREATE_VCPU, "create-vcpu"),
        (kvm_probe.SET_CPUID2, "create-vcpu"),
        (kvm_probe.RUN, "run"),
    ],
)
def test_the_step_that_fails_is_told(kvm: PlayedKvm, request_: int, step: str) -> None:
    kvm.failing = {request_: errno.ENOSPC}
    assert ask() == {"step": step, "errno": errno.ENOSPC}


def test_another_version_is_told(kvm: PlayedKvm) -> None:
    kvm.version = 11
    assert ask() == {"step": "version", "version": 11}


def test_on_other_processors_nothing_is_run(kvm: PlayedKvm) -> None:
    assert ask("aarch64") == {"step": "create-vcpu"}
    assert kvm_probe.RUN not in kvm.asked


def test_there_is_no_device() -> None:
    assert probe("/nonexistent", "x86_64", 1) == {"step": "open", "errno": errno.ENOENT}


def test_the_guest_s_memory_holds_what_the_processor_looks_for() -> None:
    with mmap.mmap(-1, kvm_probe.MEMORY) as memory:
        kvm_probe.build_memory(memory)

        def quad(at: int) -> int:
            return int(struct.unpack_from("<Q", memory, at)[0])

        # Walk the page tables for CODE and for DATA_ADDRESS.
        tables = [quad(kvm_probe.PML4) & ~0xFFF]
        tables.append(quad(tables[0]) & ~0xFFF)
        assert quad(tables[1]) & 0x80, "a page of 2 MiB at 0"
        table = quad(tables[1] + 8 * (kvm_probe.DATA_ADDRESS >> 21)) & ~0xFFF
        assert quad(table) & ~0xFFF == kvm_probe.DATA
        # The gate of vector 3 leads to the trap's handler, the others to the fault's.
        low, selector, _, kind, middle, high, _ = struct.unpack_from(
            "<HHBBHII", memory, kvm_probe.IDT + 16 * 3
        )
        assert (selector, kind) == (8, 0x8E)
        assert low | middle << 16 | high << 32 == kvm_probe.TRAP_HANDLER
        assert memory[kvm_probe.CODE : kvm_probe.CODE + len(kvm_probe.GUEST)] == kvm_probe.GUEST


def test_it_is_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvm_probe", "/nonexistent", "0.1"])
    runpy.run_path(kvm_probe.__file__, run_name="__main__")
    assert json.loads(capsys.readouterr().out) == {"step": "open", "errno": errno.ENOENT}


@pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK) or platform.machine() != "x86_64",
    reason="needs an x86_64 host with KVM, and the right to use /dev/kvm",
)
@pytest.mark.parametrize(
    ("guest", "writes", "exit_"),
    [
        (b"\xb0\x4f\xe6\xf4", [kvm_probe.FINISHED], ""),
        (b"\x0f\x0b", [[0xF4, 0xEE]], ""),  # ud2, to FAULT_HANDLER
        (b"\xf4", [], "halt"),
        (b"\xeb\xfe", [], "time ran out"),
        # Reads what it wrote through the second page.
        (
            b"\xbe\x00\x00\x20\x00\x48\x89\x36\x48\x8b\x06\xe6\xf1\xb0\x4f\xe6\xf4",
            [[0xF1, 0], kvm_probe.FINISHED],
            "",
        ),
    ],
)
def test_a_real_kvm_runs_simple_guests(
    monkeypatch: pytest.MonkeyPatch,
    guest: bytes,
    writes: list[list[int]],
    exit_: str,
) -> None:
    monkeypatch.setattr(kvm_probe, "GUEST", guest)
    answer = probe("/dev/kvm", "x86_64", 0.1 if exit_ == "time ran out" else 60)
    if "errno" in answer:
        pytest.skip(f"needs a KVM that makes vCPUs: {answer}")
    assert (answer["writes"], answer["exit"]) == (writes, exit_)


def test_it_imports_nothing_of_ours() -> None:
    source = Path(kvm_probe.__file__).read_text()
    assert "import vmlab" not in source
    assert "from vmlab" not in source

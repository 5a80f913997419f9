from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmlab.hypervisors import accelerators
from vmlab.hypervisors.accelerators import (
    QEMU_BINARIES,
    accelerators_for,
    explain_kvm,
    probe_accelerators,
    probe_hvf,
    probe_kvm,
    probe_tcg,
    probe_whpx,
)
from vmlab.hypervisors.base import ProbeItem
from vmlab.machine.architecture import Architecture

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, for KVM")


# ------------------------------------------------------------------- KVM

# What the probe printed on a host whose KVM is nested in another hypervisor without hardware
# (Linux 6.18, recorded 2026-11-21); the others have the same form.
NESTED = {"step": "run", "writes": [], "exit": "internal error", "ms": 1.04}
WORKS = {"step": "run", "writes": [[0xF1, 0x33], [0xF4, 0x4F]], "exit": "", "ms": 0.9}


def test_a_kvm_that_runs_the_guest_works() -> None:
    item = explain_kvm(WORKS)
    assert item.works
    assert item.detail == "ran a guest in 0.9 ms through /dev/kvm"
    assert item.hint is None


@pytest.mark.parametrize(
    ("answer", "detail", "hint"),
    [
        (NESTED, "does not run a guest's instructions (internal error)", "virtual machine"),
        (WORKS | {"writes": [[0xF4, 0xEE]]}, "(it wrote [[244, 238]])", "virtual machine"),
        (WORKS | {"ms": 180.4}, "emulates them: 180 ms", "tcg"),
        ({"step": "version", "version": 11}, "speaks version 11", "tcg"),
        ({"step": "version", "errno": errno.ENOTTY}, "cannot say its version", "tcg"),
        ({"step": "create-vm", "errno": errno.EBUSY}, "cannot make a machine", "VirtualBox"),
        ({"step": "create-vm", "errno": errno.ENOMEM}, "Cannot allocate memory", "tcg"),
        ({"step": "create-vcpu", "errno": errno.EINVAL}, "cannot make a vCPU", "tcg"),
        ({"step": "run", "errno": errno.EFAULT}, "cannot run a guest: Bad address", "tcg"),
        ({"step": "open", "errno": errno.EMFILE}, "does not open: Too many open files", "tcg"),
        ({"step": "open", "errno": errno.ENODEV}, "/dev/kvm has no driver", ""),
        ({"step": "open", "errno": errno.ENOENT}, "there is no /dev/kvm", ""),
        ({"step": "open", "errno": errno.EACCES}, "may not be opened by user", ""),
    ],
)
def test_every_failure_of_kvm_has_its_reason_and_a_hint(
    answer: dict[str, object], detail: str, hint: str
) -> None:
    item = explain_kvm(answer)
    assert not item.works
    assert detail in item.detail
    assert item.hint is not None
    assert hint in item.hint


def test_on_other_processors_a_vcpu_is_enough() -> None:
    item = explain_kvm({"step": "create-vcpu"})
    assert item.works
    assert "running one is tried on x86_64 only" in item.detail


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("fpu vmx", "modprobe kvm_intel"),
        ("fpu svm", "modprobe kvm_amd"),
        ("fpu hypervisor", "without nested virtualisation"),
        ("fpu", "firmware has it off"),
    ],
)
def test_what_loads_kvm_depends_on_the_processor(tmp_path: Path, flags: str, hint: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\nflags : other\n")
    assert hint in accelerators._module_hint(accelerators._cpu_flags(tmp_path / "cpuinfo"))


def test_a_processor_that_tells_nothing_has_no_features(tmp_path: Path) -> None:
    assert accelerators._cpu_flags(tmp_path / "missing") == frozenset()
    (tmp_path / "cpuinfo").write_text("Features : fp asimd\n")
    assert accelerators._cpu_flags(tmp_path / "cpuinfo") == frozenset()


def test_the_group_to_join_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators.Path, "group", lambda path: "libvirt")
    assert "sudo usermod -aG libvirt $USER" in accelerators._permission_hint("/dev/kvm")
    monkeypatch.setattr(accelerators.Path, "group", lambda path: "root")
    assert "sudo setfacl -m u:$USER:rw /dev/kvm" in accelerators._permission_hint("/dev/kvm")

    def unknown(path: Path) -> str:
        raise KeyError("getgrgid(): gid not found")

    monkeypatch.setattr(accelerators.Path, "group", unknown)
    assert "usermod -aG kvm" in accelerators._permission_hint("/dev/kvm")


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(accelerators.getpass, "getuser", unknown)
    assert accelerators._user() == f"user {os.geteuid()}"


@linux_only
def test_kvm_is_tried_here() -> None:
    item = probe_kvm()
    assert item.name == "kvm"
    assert item.works or (item.detail and item.hint)


@linux_only
def test_a_device_that_is_not_kvm() -> None:
    assert probe_kvm(device="/dev/null").detail == (
        "/dev/null opens but cannot say its version: Inappropriate ioctl for device"
    )
    assert probe_kvm(device="/nonexistent").detail == "there is no /nonexistent"


@linux_only
def test_a_kvm_that_hangs_does_not_hang_us() -> None:
    # A test that takes as long as the sleep is ended by its own limit.
    item = probe_kvm(command=["sleep", "1000"], timeout=0.2)
    assert not item.works
    assert item.detail == "/dev/kvm: the probe did not end within 0.2 s"


@linux_only
def test_a_process_that_not_even_a_kill_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: None)
    monkeypatch.setattr(accelerators, "_KILL_SECONDS", 0.05)
    assert not probe_kvm(command=["sleep", "1000"], timeout=0.1).works
    monkeypatch.undo()
    process = accelerators._undead.pop()
    process.kill()
    process.wait()


@linux_only
@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("kill -9 $$", "the probe was killed by signal 9"),
        ("echo one >&2; echo two >&2; exit 3", "the probe ended with status 3: two"),
        ("exit 0", "the probe ended with status 0: it printed nothing"),
        ("echo 3", "the probe printed '3'"),
    ],
)
def test_a_probe_that_does_not_answer_says_what_it_did(script: str, detail: str) -> None:
    item = probe_kvm(command=["sh", "-c", script])
    assert not item.works
    assert item.detail == f"/dev/kvm: {detail}"


@linux_only
def test_the_answer_of_the_probe_is_used() -> None:
    assert probe_kvm(command=["echo", json.dumps(WORKS)]).works


def test_kvm_is_linux_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert probe_kvm().detail == "KVM is Linux's; this is not Linux"


# ------------------------------------------------------------------- hvf

# `sysctl -n kern.hv_support`, recorded: Macs with and without, a Linux that knows no such name.


@pytest.mark.parametrize(
    ("said", "works"),
    [("1", True), ("0", False), ("sysctl: unknown oid 'kern.hv_support'", False), ("", False)],
)
def test_hvf_by_recorded_answers(said: str, works: bool) -> None:
    item = probe_hvf(system="darwin", read=lambda: said)
    assert item.works == works
    assert works or repr(said) in item.detail


@pytest.mark.parametrize("error", [OSError("no sysctl"), subprocess.TimeoutExpired("sysctl", 5)])
def test_hvf_without_an_answer(error: Exception) -> None:
    def fail() -> str:
        raise error

    item = probe_hvf(system="darwin", read=fail)
    assert not item.works
    assert str(error) in item.detail


def test_sysctl_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text('#!/bin/sh\n[ "$*" = "-n kern.hv_support" ] && echo 1\n')
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert probe_hvf(system="darwin").works
    sysctl.write_text("#!/bin/sh\necho oops >&2; exit 1\n")
    assert "'oops'" in probe_hvf(system="darwin").detail


@pytest.mark.skipif(sys.platform == "darwin", reason="needs a host that is not macOS")
def test_hvf_is_macos_s() -> None:
    assert probe_hvf() == ProbeItem(
        name="hvf", works=False, detail="hvf is macOS's; this is not macOS"
    )


# ------------------------------------------------------------------- whpx

# WHvGetCapability(WHvCapabilityCodeHypervisorPresent): HRESULT and the BOOL it writes, after
# Microsoft's documentation of the function; 0x80370102 is HV's "not supported".


@pytest.mark.parametrize(
    ("answer", "works", "detail"),
    [
        ((0, b"\x01\x00\x00\x00"), True, "the Windows hypervisor is present"),
        ((0, b"\x00\x00\x00\x00"), False, "no hypervisor runs"),
        ((0, b""), False, "no hypervisor runs"),
        ((0x80370102 - (1 << 32), b""), False, "HRESULT 0x80370102"),
    ],
)
def test_whpx_by_documented_answers(answer: tuple[int, bytes], works: bool, detail: str) -> None:
    codes: list[int] = []

    def get_capability(code: int) -> tuple[int, bytes]:
        codes.append(code)
        return answer

    item = probe_whpx(system="win32", get_capability=get_capability)
    assert codes == [0]
    assert item.works == works
    assert detail in item.detail
    assert works or item.hint


@pytest.mark.skipif(sys.platform == "win32", reason="needs a host that is not Windows")
def test_whpx_is_windows_s() -> None:
    assert probe_whpx().detail == "whpx is Windows's; this is not Windows"
    assert "WinHvPlatform.dll cannot be used" in probe_whpx(system="win32").detail


def test_the_library_is_asked_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def WHvGetCapability(code: int, buffer: object, size: int, written: object) -> int:
            assert (code, size) == (0, 8)
            buffer.raw = b"\x01" + bytes(7)  # ctypes' char array
            written._obj.value = 4  # ctypes' reference
            return 0

    monkeypatch.setattr(accelerators.ctypes, "CDLL", lambda name: Library)
    assert accelerators._ask_windows(0) == (0, b"\x01\0\0\0")


# ------------------------------------------------------------------- TCG


def programs(folder: Path, **scripts: str) -> Callable[[str], str | None]:
    """Programs of those names that do what their scripts say."""
    for name, script in scripts.items():
        path = folder / name.replace("_", "-").replace("x86-64", "x86_64")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return lambda name: str(folder / name) if (folder / name).exists() else None


def test_tcg_is_tried_for_each_architecture(tmp_path: Path) -> None:
    find = programs(
        tmp_path,
        qemu_system_riscv64='read a; read b; [ "$b" = \'{"execute": "quit"}\' ]',
        qemu_system_x86_64="echo first >&2; echo invalid accelerator tcg >&2; exit 1",
        qemu_system_aarch64="exit 2",
    )
    item = probe_tcg(find=find)
    assert item.works
    assert item.detail == ("translates riscv64; aarch64: status 2; x86_64: invalid accelerator tcg")


def test_tcg_that_works_for_none_does_not_work(tmp_path: Path) -> None:
    find = programs(tmp_path, qemu_system_riscv64="exec sleep 60")
    item = probe_tcg(find=find, timeout=0.2)
    assert not item.works
    assert item.detail == "riscv64: did not quit within 0.2 s"


def test_program_that_cannot_be_started_is_reported_beside_those_that_can(tmp_path: Path) -> None:
    find = programs(tmp_path, qemu_system_riscv64="cat > /dev/null", qemu_system_ppc64="exit 0")
    broken, format_ = tmp_path / "qemu-system-ppc64", tmp_path / "qemu-system-x86_64"
    broken.write_text("#!/none/such-an-interpreter\n")
    format_.write_bytes(b"\0no program\n")
    format_.chmod(0o755)
    item = probe_tcg(find=find)
    assert item.works
    assert item.detail == (
        f"translates riscv64; x86_64: {format_} cannot be started: Exec format error; "
        f"ppc64le: {broken} cannot be started: No such file or directory"
    )


def test_without_qemu_there_is_no_tcg() -> None:
    item = probe_tcg(find=lambda name: None)
    assert not item.works
    assert item.detail == "no QEMU is installed"


def test_every_architecture_has_its_program() -> None:
    assert set(QEMU_BINARIES) == set(Architecture)


# ------------------------------------------------------------------- all of them


def test_all_accelerators_are_probed() -> None:
    items = probe_accelerators()
    assert [item.name for item in items] == ["kvm", "hvf", "whpx", "tcg"]
    assert all(item.detail for item in items)


def test_hardware_runs_guests_of_the_host_s_own_kind_only() -> None:
    def probe() -> ProbeItem:
        return ProbeItem(name="kvm", works=True)

    def broken() -> ProbeItem:
        return ProbeItem(name="kvm", works=False)

    x86, riscv = Architecture.X86_64, Architecture.RISCV64
    assert accelerators_for(x86, probe=probe, host=x86) == ("kvm", "tcg")
    assert accelerators_for(riscv, probe=probe, host=x86) == ("tcg",)
    assert accelerators_for(x86, probe=broken, host=x86) == ("tcg",)


def test_kvm_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What is found here must not be found by tests that start machines.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def probe() -> ProbeItem:
        asked.append(1)
        return ProbeItem(name="kvm", works=True)

    monkeypatch.setattr(accelerators, "probe_kvm", probe)
    accelerators.kvm.cache_clear()
    assert accelerators.kvm().works
    assert accelerators.kvm().works
    accelerators.kvm.cache_clear()
    assert asked == [1]

"""Which accelerators run guests on this host: kvm, hvf, whpx and tcg, tried and not assumed.

Each probe answers with what it found and, where that does not work, why not and what to do. No
probe hangs: whatever could is done in a process of its own, with a time limit.
"""

from __future__ import annotations

import ctypes
import errno
import getpass
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final

from vmlab.hypervisors import kvm_probe
from vmlab.hypervisors.base import ProbeItem
from vmlab.hypervisors.process_identity import boot_id
from vmlab.hypervisors.remembered import facts_of, remembered
from vmlab.machine.architecture import Architecture, host_architecture

__all__ = [
    "QEMU_BINARIES",
    "accelerators_for",
    "kvm",
    "probe_accelerators",
    "probe_hvf",
    "probe_kvm",
    "probe_tcg",
    "probe_whpx",
]

QEMU_BINARIES: Final[dict[Architecture, str]] = {
    Architecture.RISCV64: "qemu-system-riscv64",
    Architecture.AARCH64: "qemu-system-aarch64",
    Architecture.X86_64: "qemu-system-x86_64",
    Architecture.PPC64LE: "qemu-system-ppc64",
}
"""QEMU's program for each architecture."""

KVM_DEVICE: Final = "/dev/kvm"
KVM_GUEST_SECONDS: Final = 0.2
"""What the probe's guest is given; a KVM on real hardware needs a thousandth of it."""
_KILL_SECONDS = 1.0
"""What a killed process is given to end."""

KVM_QUICK_MS: Final = 50.0
"""A KVM that takes longer for the probe's guest emulates it."""

_NO_INSTRUCTIONS: Final = "does not run a guest's instructions"

_FALL_BACK = "guests run without it, several times slower (tcg)"


# ------------------------------------------------------------------- KVM


def probe_kvm(
    *, device: str = KVM_DEVICE, timeout: float = 2.0, command: Sequence[str] | None = None
) -> ProbeItem:
    """Whether KVM runs a guest here; answers within `timeout` seconds, usually in 0.03.

    Args:
        device: KVM's device.
        timeout: Seconds for all of it.
        command: The program that tries it, instead of our own.
    """
    if not sys.platform.startswith("linux"):
        return ProbeItem(name="kvm", works=False, detail="KVM is Linux's; this is not Linux")
    argv = command or [
        # -I and -S: quick, and nothing of the user's environment is imported.
        sys.executable,
        "-I",
        "-S",
        str(Path(kvm_probe.__file__)),
        device,
        str(KVM_GUEST_SECONDS),
    ]
    answer = _ask(argv, timeout)
    if isinstance(answer, str):
        return ProbeItem(
            name="kvm", works=False, detail=f"{device}: the probe {answer}", hint=_FALL_BACK
        )
    return explain_kvm(answer, device)


def _ask(argv: Sequence[str], timeout: float) -> dict[str, Any] | str:
    """The JSON object that a program prints, or what it did instead."""
    done = _run(argv, "", timeout)
    if done is None:
        return f"did not end within {timeout:g} s"
    if done.returncode < 0:
        return f"was killed by signal {-done.returncode}"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2]
        return f"ended with status {done.returncode}: {last or 'it printed nothing'}"
    return answer if isinstance(answer, dict) else f"printed {done.stdout.strip()!r}"


_undead: list[subprocess.Popen[str]] = []
"""Processes that outlived SIGKILL; kept, since nobody will ever have waited for them."""


def _run(
    argv: Sequence[str], words: str, timeout: float
) -> subprocess.CompletedProcess[str] | None:
    """Run a program to its end with `words` as input; None if it was killed for taking too long.

    Unlike `subprocess.run` this does not wait for one that not even SIGKILL ends: a process that
    hangs in the kernel, as in a driver's ioctl.
    """
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, complaints = process.communicate(words, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            _undead.append(process)
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            stream.close()
        return None
    return subprocess.CompletedProcess(argv, process.returncode, out, complaints)


def explain_kvm(answer: dict[str, Any], device: str = KVM_DEVICE) -> ProbeItem:
    """What the answer of `vmlab.hypervisors.kvm_probe` means."""

    def broken(detail: str, hint: str | None = _FALL_BACK) -> ProbeItem:
        return ProbeItem(name="kvm", works=False, detail=detail, hint=hint)

    number, step = answer.get("errno"), answer["step"]
    if number is not None:
        reason = os.strerror(number)
        if step == "open":
            return broken(*_explain_open(number, device))
        if number == errno.EBUSY:
            return broken(
                f"{device} opens but cannot {_STEPS[step]}: {reason}",
                "another hypervisor (VirtualBox, VMware) holds the processor's virtualisation",
            )
        return broken(f"{device} opens but cannot {_STEPS[step]}: {reason}")
    if step == "version":
        return broken(
            f"{device} speaks version {answer['version']} of KVM's interface, "
            f"not {kvm_probe.API_VERSION}"
        )
    if step == "create-vcpu":
        return ProbeItem(
            name="kvm",
            works=True,
            detail=f"{device} makes machines and vCPUs; running one is tried on x86_64 only",
        )
    if answer["exit"] or answer["writes"] != [kvm_probe.TRAPPED, kvm_probe.FINISHED]:
        came = answer["exit"] or f"it wrote {answer['writes']}"
        return broken(
            f"{device} opens but {_NO_INSTRUCTIONS} ({came})",
            "this host is itself a virtual machine without hardware virtualisation; " + _FALL_BACK,
        )
    if answer["ms"] > KVM_QUICK_MS:
        return broken(
            f"{device} runs guests, but emulates them: {answer['ms']:.0f} ms for what takes 1 ms"
        )
    return ProbeItem(
        name="kvm", works=True, detail=f"ran a guest in {answer['ms']:.1f} ms through {device}"
    )


_STEPS = {
    "version": "say its version",
    "create-vm": "make a machine",
    "create-vcpu": "make a vCPU",
    "run": "run a guest",
}


def _explain_open(number: int, device: str) -> tuple[str, str]:
    """Why the device does not open, and what to do."""
    if number in {errno.EACCES, errno.EPERM}:
        return f"{device} may not be opened by {_user()}", _permission_hint(device)
    if number in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        what = f"there is no {device}" if number == errno.ENOENT else f"{device} has no driver"
        return what, _module_hint(_cpu_flags())
    return f"{device} does not open: {os.strerror(number)}", _FALL_BACK


def _user() -> str:
    try:
        return f"user {getpass.getuser()}"
    except (OSError, KeyError):
        return f"user {os.geteuid()}"


def _permission_hint(device: str) -> str:
    try:
        group = Path(device).group()
    except (OSError, KeyError):
        group = "kvm"
    if group == "root":
        return f"give yourself access: sudo setfacl -m u:$USER:rw {device}"
    return f"join the group {group}: sudo usermod -aG {group} $USER, then log in again"


def _module_hint(flags: frozenset[str]) -> str:
    if "vmx" in flags:
        return "load KVM: sudo modprobe kvm_intel"
    if "svm" in flags:
        return "load KVM: sudo modprobe kvm_amd"
    if "hypervisor" in flags:
        return f"this host is a virtual machine without nested virtualisation; {_FALL_BACK}"
    return f"the processor has no virtualisation, or the firmware has it off; {_FALL_BACK}"


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's features, as Linux names them; empty where it does not tell."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


@cache
def kvm() -> ProbeItem:
    """The answer of `probe_kvm`, asked once per process, and once for each boot of the host.

    Whether KVM works depends on the kernel, the device and who asks; an answer that depends on
    more, such as a device that is busy or a probe that was late, is asked for again.
    """
    try:
        about: list[int | str] = [boot_id(), os.uname().release, os.geteuid(), *os.getgroups()]
        about += facts_of(KVM_DEVICE)
    except (OSError, AttributeError):
        return probe_kvm()  # quickly told: there is no device
    fresh: list[ProbeItem] = []

    def ask() -> dict[str, Any] | None:
        fresh.append(probe_kvm())
        return fresh[0].model_dump() if _lasts(fresh[0]) else None

    answer = remembered(f"KVM by {sys.executable}", about, ask)
    if fresh:
        return fresh[0]
    try:
        return ProbeItem.model_validate(answer)
    except ValueError:
        return probe_kvm()


def _lasts(item: ProbeItem) -> bool:
    """Whether another process would find the same."""
    return item.works or _NO_INSTRUCTIONS in item.detail


# ------------------------------------------------------------------- hvf


def _read_sysctl() -> str:
    done = subprocess.run(
        ["sysctl", "-n", "kern.hv_support"],
        capture_output=True,
        text=True,
        check=False,
        timeout=5,
    )
    return done.stdout.strip() or done.stderr.strip()


def probe_hvf(*, system: str = sys.platform, read: Callable[[], str] = _read_sysctl) -> ProbeItem:
    """Whether macOS's Hypervisor.framework is to be had.

    Args:
        system: The platform, as `sys.platform` names it.
        read: What `sysctl -n kern.hv_support` prints ("determine the availability of Hypervisor
            APIs ... with the sysctl(8) command", Apple's documentation of the framework).
    """
    if system != "darwin":
        return ProbeItem(name="hvf", works=False, detail="hvf is macOS's; this is not macOS")
    try:
        said = read()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said == "1":
        return ProbeItem(name="hvf", works=True, detail="kern.hv_support is 1")
    return ProbeItem(
        name="hvf",
        works=False,
        detail=f"kern.hv_support is {said!r}, not 1",
        hint=f"inside a virtual machine, nested virtualisation has to be on; {_FALL_BACK}",
    )


# ------------------------------------------------------------------- whpx

_HYPERVISOR_PRESENT = 0  # WHvCapabilityCodeHypervisorPresent


def _ask_windows(code: int) -> tuple[int, bytes]:
    """WHvGetCapability(code): the HRESULT and what it wrote."""
    library = ctypes.CDLL("WinHvPlatform.dll")
    buffer = ctypes.create_string_buffer(8)
    written = ctypes.c_uint32()
    result = library.WHvGetCapability(code, buffer, len(buffer), ctypes.byref(written))
    return int(result), buffer.raw[: written.value]


def probe_whpx(
    *,
    system: str = sys.platform,
    get_capability: Callable[[int], tuple[int, bytes]] = _ask_windows,
) -> ProbeItem:
    """Whether the Windows Hypervisor Platform is to be had.

    Args:
        system: The platform, as `sys.platform` names it.
        get_capability: WHvGetCapability: from a capability's code to HRESULT and contents.
    """
    if system != "win32":
        return ProbeItem(name="whpx", works=False, detail="whpx is Windows's; this is not Windows")
    hint = "turn it on, then restart: dism /online /enable-feature /featurename:HypervisorPlatform"
    try:
        result, contents = get_capability(_HYPERVISOR_PRESENT)
    except OSError as error:
        return ProbeItem(
            name="whpx", works=False, detail=f"WinHvPlatform.dll cannot be used: {error}", hint=hint
        )
    if result != 0:
        detail = f"WHvGetCapability failed with HRESULT 0x{result & 0xFFFFFFFF:08X}"
        return ProbeItem(name="whpx", works=False, detail=detail, hint=hint)
    if not any(contents):
        return ProbeItem(
            name="whpx",
            works=False,
            detail="the Windows Hypervisor Platform is installed, but no hypervisor runs",
            hint="bcdedit /set hypervisorlaunchtype auto, then restart; "
            "the firmware's virtualisation has to be on",
        )
    return ProbeItem(name="whpx", works=True, detail="the Windows hypervisor is present")


# ------------------------------------------------------------------- TCG


def probe_tcg(
    *, timeout: float = 60.0, find: Callable[[str], str | None] = shutil.which
) -> ProbeItem:
    """Which of QEMU's programs translate guests' code: each starts an empty machine and quits.

    Args:
        timeout: Seconds for each.
        find: From a program's name to its path.
    """
    programs = {
        architecture: path
        for architecture, name in QEMU_BINARIES.items()
        if (path := find(name)) is not None
    }
    if not programs:
        return ProbeItem(
            name="tcg",
            works=False,
            detail="no QEMU is installed",
            hint="`vmlab doctor` tells how to install it",
        )
    with ThreadPoolExecutor(len(programs)) as pool:
        found = dict(
            zip(
                programs,
                pool.map(lambda path: _try_tcg(path, timeout), programs.values()),
                strict=True,
            )
        )
    working = [architecture.value for architecture, failure in found.items() if failure is None]
    failing = [
        f"{architecture.value}: {failure}"
        for architecture, failure in found.items()
        if failure is not None
    ]
    detail = "; ".join([f"translates {', '.join(working)}"] * bool(working) + failing)
    return ProbeItem(name="tcg", works=bool(working), detail=detail)


def _try_tcg(program: str, timeout: float) -> str | None:
    """Why that QEMU's TCG does not start; None if it does."""
    options = "-machine none -accel tcg -nodefaults -no-user-config -display none -qmp stdio"
    words = '{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
    try:
        done = _run([program, *options.split()], words, timeout)
    except OSError as error:
        # A program that is there is not found if the interpreter that its first line names is not.
        return f"{program} cannot be started: {error.strerror}"
    if done is None:
        return f"did not quit within {timeout:g} s"
    if done.returncode == 0:
        return None
    return done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"


# ------------------------------------------------------------------- all of them


def probe_accelerators() -> tuple[ProbeItem, ...]:
    """What works of kvm, hvf, whpx and tcg on this host, and why not the rest."""
    probes = (probe_kvm, probe_hvf, probe_whpx, probe_tcg)
    with ThreadPoolExecutor(len(probes)) as pool:
        return tuple(pool.map(lambda probe: probe(), probes))


def accelerators_for(
    architecture: Architecture,
    *,
    probe: Callable[[], ProbeItem] = kvm,
    host: Architecture | None = None,
) -> tuple[str, ...]:
    """QEMU's accelerators that run a guest of that architecture here, the fastest first.

    Hardware runs guests of the host's own architecture only; tcg, the last, runs all.

    Args:
        architecture: The guest's.
        probe: Whether KVM works.
        host: The host's; None is this one's.
    """
    native = architecture == (host or host_architecture())
    names = [("kvm", probe), ("hvf", probe_hvf), ("whpx", probe_whpx)] if native else []
    return (*(name for name, works in names if works().works), "tcg")

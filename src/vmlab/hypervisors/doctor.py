"""Explains a host: what machines can use here, what is missing, and what to do about it.

Looks and tries, changes nothing. Each finding is `ok`; `warn`, where machines run but not as they
could; or `missing`, where something cannot be done at all.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from vmlab.hypervisors.accelerators import (
    QEMU_BINARIES,
    probe_hvf,
    probe_kvm,
    probe_tcg,
    probe_whpx,
)
from vmlab.hypervisors.base import Probe, ProbeItem
from vmlab.hypervisors.host_memory import host_memory
from vmlab.hypervisors.ownership import Home
from vmlab.hypervisors.packages import OUT_OF_PATH, Distribution, distribution, install_command
from vmlab.hypervisors.reaper import reap_dead_runs
from vmlab.hypervisors.registry import probe_all
from vmlab.machine.errors import VmlabError
from vmlab.machine.sizes import GIB, MIB, format_size

__all__ = ["Diagnosis", "Finding", "Host", "Status", "diagnose"]

OLDEST_QEMU: Final = (7, 2)
"""The oldest QEMU that vmlab is tested with."""

_LITTLE_MEMORY = 1 * GIB
_LITTLE_DISK = 5 * GIB
_NO_DISK = 512 * MIB
_FEW_FILES = 4096
_LITTLE_LOCKED = 8 * MIB  # Linux's default since 5.16
_COMMAND_SECONDS = 10.0
_CAP_NET_ADMIN = 12  # linux/capability.h


class Status(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


class Finding(BaseModel):
    """One thing that was looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    topic: str = Field(description="what it is about: qemu, memory, permissions, ...")
    name: str
    status: Status
    detail: str = Field(description="what was found")
    hint: str | None = Field(None, description="what to do about it")


class Diagnosis(BaseModel):
    """All that was found on a host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str = Field(description="what the host runs")
    findings: tuple[Finding, ...]
    install: str | None = Field(None, description="the command that installs what is missing")
    usable: bool = Field(description="whether any hypervisor works here")

    def having(self, *statuses: Status) -> list[Finding]:
        """The findings of those statuses."""
        return [finding for finding in self.findings if finding.status in statuses]


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a short command; one that is not there or hangs is one that failed."""
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(list(argv), 127, "", str(error))


@dataclass(frozen=True)
class Host:
    """Where the doctor looks; each part can be another one's, as recorded.

    `root` holds /proc, /sys, /dev and /etc; `which` finds programs and `run` runs them; `limit`
    is the soft limit of a resource; `probes` are those of the accelerators.
    """

    root: Path = Path("/")
    system: str = sys.platform
    which: Callable[[str], str | None] = shutil.which
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]] = _run
    limit: Callable[[int], int] = lambda number: resource.getrlimit(number)[0]
    disk: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    accelerators: Mapping[str, Callable[[], ProbeItem]] = field(
        default_factory=lambda: {
            "kvm": probe_kvm,
            "hvf": probe_hvf,
            "whpx": probe_whpx,
            "tcg": probe_tcg,
        }
    )
    hypervisors: Callable[[], list[Probe]] = probe_all

    @property
    def linux(self) -> bool:
        """Whether there are Linux's files to look at."""
        return self.system.startswith("linux")

    def read(self, path: str) -> str | None:
        """The text of a file below `root`; None if it is not to be read."""
        try:
            return (self.root / path).read_text("utf-8", "replace").strip()
        except OSError:
            return None


def diagnose(host: Host | None = None, home: Path | None = None) -> Diagnosis:
    """Look at everything.

    Args:
        host: Where to look; None is this host.
        home: Where vmlab's home is or would be; None is where `Home.path` says.
    """
    host = host or Host()
    where = distribution(host.root, host.system)
    probes = host.hypervisors()
    missing: list[str] = []
    topics: list[Callable[[], Iterable[Finding]]] = [
        lambda: _kernel(host),
        lambda: _accelerators(host),
        lambda: _engine(probes),
        lambda: _qemu(host, where, missing),
        lambda: _programs(host, where, missing),
        lambda: _memory(host),
        lambda: _home(host, home or Home.path()),
        lambda: _permissions(host),
        lambda: _networks(host, where),
        lambda: _limits(host),
        lambda: map(_hypervisor, probes),
    ]
    with ThreadPoolExecutor(len(topics)) as pool:
        findings = [
            finding for found in pool.map(lambda ask: list(ask()), topics) for finding in found
        ]
    return Diagnosis(
        system=f"{where.name}, {platform.machine()}",
        findings=tuple(findings),
        install=install_command(sorted(missing, key=_importance), where),
        usable=any(probe.available for probe in probes),
    )


def _hypervisor(probe: Probe) -> Finding:
    return Finding(
        topic="hypervisors",
        name=probe.hypervisor,
        status=Status.OK if probe.available else Status.MISSING,
        detail=(probe.version or "works here") if probe.available else probe.reason,
        hint=probe.hint,
    )


def _engine(probes: Sequence[Probe]) -> Iterator[Finding]:
    """What the embedded engine needs of the host; its networks are among the programs."""
    for probe in probes:
        if probe.hypervisor != "embedded":
            continue
        for item in probe.items:
            if item.name != "user network":
                status = Status.OK if item.works else Status.MISSING
                yield Finding(
                    topic="engine", name=item.name, status=status, detail=item.detail,
                    hint=item.hint,
                )  # fmt: skip


# ------------------------------------------------------------------- kernel and processor


def _kernel(host: Host) -> Iterator[Finding]:
    release = host.read("proc/sys/kernel/osrelease") or platform.release()
    yield Finding(
        topic="kernel",
        name="kernel",
        status=Status.OK if host.linux else Status.WARN,
        detail=f"{host.system} {release}",
        hint=None if host.linux else "runs are cleared up less surely than on Linux",
    )
    if not host.linux:
        return
    flags = re.search(r"^flags\s*:(.*)", host.read("proc/cpuinfo") or "", re.MULTILINE)
    if flags is not None:  # an x86 processor
        yield _nested(host, inside="hypervisor" in flags[1].split())


def _nested(host: Host, *, inside: bool) -> Finding:
    """Whether guests can run KVM themselves."""
    here = "; this host is a virtual machine itself" if inside else ""
    for module in ("kvm_intel", "kvm_amd"):
        switch = host.read(f"sys/module/{module}/parameters/nested")
        if switch is None:
            continue
        if switch in {"Y", "1"}:
            detail = f"on ({module}): guests can run KVM themselves{here}"
            return Finding(
                topic="kernel", name="nested virtualisation", status=Status.OK, detail=detail
            )
        return Finding(
            topic="kernel",
            name="nested virtualisation",
            status=Status.WARN,
            detail=f"off ({module}){here}",
            hint=f"echo 'options {module} nested=1' | sudo tee /etc/modprobe.d/nested.conf, "
            "then restart",
        )
    return Finding(
        topic="kernel",
        name="nested virtualisation",
        status=Status.WARN,
        detail=f"the kernel has neither kvm_intel nor kvm_amd loaded{here}",
        hint="guests cannot run KVM themselves",
    )


def _accelerators(host: Host) -> Iterator[Finding]:
    native = {"darwin": "hvf", "win32": "whpx"}.get(host.system, "kvm")
    for name in (native, "tcg"):
        item = host.accelerators[name]()
        # Without hardware guests run, slowly; without TCG QEMU runs none.
        trouble = Status.MISSING if name == "tcg" else Status.WARN
        yield Finding(
            topic="accelerators",
            name=name,
            status=Status.OK if item.works else trouble,
            detail=item.detail,
            hint=item.hint,
        )


# ------------------------------------------------------------------- programs


def _qemu(host: Host, where: Distribution, missing: list[str]) -> Iterator[Finding]:
    programs = [*QEMU_BINARIES.values(), "qemu-img"]
    with ThreadPoolExecutor(len(programs)) as pool:
        yield from pool.map(lambda program: _qemu_program(host, where, missing, program), programs)


def _qemu_program(host: Host, where: Distribution, missing: list[str], program: str) -> Finding:
    def finding(status: Status, detail: str, hint: str | None = None) -> Finding:
        return Finding(topic="qemu", name=program, status=status, detail=detail, hint=hint)

    path = host.which(program)
    if path is None:
        missing.append(program)
        return finding(Status.MISSING, "not installed", _install_hint(program, where))
    done = host.run([path, "--version"])
    found = re.search(r"version (\d+)\.(\d+)(\.\d+)?", done.stdout)
    if done.returncode != 0 or found is None:
        said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        return finding(
            Status.MISSING, f"{path} does not say its version: {said}", "install it again"
        )
    version = f"{found[0].removeprefix('version ')} at {path}"
    if (int(found[1]), int(found[2])) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        return finding(Status.WARN, version, f"vmlab is tested with {oldest} and later")
    return finding(Status.OK, version)


_PROGRAMS: Final[Mapping[str, str]] = {
    "passt": "networks of machines without root",
    "virtiofsd": "virtiofs shares",
    "mmdebstrap": "building Debian images",
}
"""Programs beside QEMU, and what they are for."""


def _programs(host: Host, where: Distribution, missing: list[str]) -> Iterator[Finding]:
    if not host.linux:
        return  # these are Linux's
    for program, purpose in _PROGRAMS.items():
        path = _path_of(host, program)
        if path is None:
            missing.append(program)
        yield Finding(
            topic="programs",
            name=program,
            status=Status.MISSING if path is None else Status.OK,
            detail=f"not installed; for {purpose}" if path is None else path,
            hint=_install_hint(program, where) if path is None else None,
        )


def _path_of(host: Host, program: str) -> str | None:
    """Where a program is, in PATH or where distributions have it; None if it is not there."""
    places = (host.root / place[1:] for place in OUT_OF_PATH.get(program, ()))
    elsewhere = (str(place) for place in places if place.exists())
    return host.which(program) or next(elsewhere, None)


def _install_hint(program: str, where: Distribution) -> str:
    return install_command([program], where) or f"install {program}"


def _importance(program: str) -> tuple[int, str]:
    """QEMU for this host's own architecture first, then the others, then what is beside it."""
    own = program == f"qemu-system-{platform.machine()}"
    return (0 if own else 1 if program.startswith("qemu") else 2, program)


# ------------------------------------------------------------------- memory, disk, the home


def _memory(host: Host) -> Iterator[Finding]:
    memory = host_memory(host.root)
    little = memory.available < _LITTLE_MEMORY
    yield Finding(
        topic="memory",
        name="memory",
        status=Status.WARN if little else Status.OK,
        detail=f"{_rounded(memory.available)} available of {_rounded(memory.total)}",
        hint="give machines little memory, or run few at a time" if little else None,
    )
    if memory.limit is not None:
        yield Finding(
            topic="memory",
            name="cgroup limit",
            status=Status.WARN if memory.limit < _LITTLE_MEMORY else Status.OK,
            detail=f"{_rounded(memory.limit)}, by {memory.limited_by}",
            hint="machines that take more are killed with everything in the cgroup",
        )


def _rounded(size: int) -> str:
    """A size to a tenth, for people."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return format_size(size)


def _home(host: Host, directory: Path) -> Iterator[Finding]:
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    free = host.disk(place)
    status = (
        Status.MISSING if free < _NO_DISK else Status.WARN if free < _LITTLE_DISK else Status.OK
    )
    yield Finding(
        topic="disk",
        name="disk",
        status=status,
        detail=f"{_rounded(free)} free for {directory}",
        hint=None if status is Status.OK else "free some, or set VMLAB_HOME to another disk",
    )
    if place == directory:
        yield from _existing_home(directory)
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            topic="disk",
            name="home",
            status=Status.MISSING,
            detail=f"{directory} cannot be made: {place} is not writable",
            hint="set VMLAB_HOME to a directory that you can write to",
        )


def _existing_home(directory: Path) -> Iterator[Finding]:
    try:
        home = Home.open(directory)
    except VmlabError as error:
        yield Finding(
            topic="disk",
            name="home",
            status=Status.MISSING,
            detail=error.message,
            hint=error.hint,
        )
        return
    dead = reap_dead_runs(home, dry_run=True).dead
    yield Finding(
        topic="disk",
        name="dead runs",
        status=Status.WARN if dead else Status.OK,
        detail=f"{len(dead)} left something in {home.runs}" if dead else "none",
        hint="`vmlab clean` removes it" if dead else None,
    )


# ------------------------------------------------------------------- permissions and limits

_TRY_NAMESPACE = (
    "import ctypes, os, sys\n"
    "libc = ctypes.CDLL(None, use_errno=True)\n"
    "CLONE_NEWUSER = 0x10000000\n"
    "sys.exit(0 if libc.unshare(CLONE_NEWUSER) == 0 else os.strerror(ctypes.get_errno()))"
)


def _permissions(host: Host) -> Iterator[Finding]:
    if not host.linux:
        return
    yield _user_namespaces(host)
    yield _network_administration(host)
    for name, purpose in (("net/tun", "networks of machines"), ("vhost-net", "fast networks")):
        device = host.root / "dev" / name
        there, usable = device.exists(), os.access(device, os.R_OK | os.W_OK)
        yield Finding(
            topic="permissions",
            name=f"/dev/{name}",
            status=Status.OK if usable else Status.WARN,
            detail="may be opened"
            if usable
            else f"{'may not be opened' if there else 'is not there'}; for {purpose}",
            hint=None
            if usable
            else f"sudo setfacl -m u:$USER:rw /dev/{name}"
            if there
            else f"sudo modprobe {name.rpartition('/')[2].replace('-', '_')}",
        )


def _user_namespaces(host: Host) -> Finding:
    done = host.run([sys.executable, "-I", "-S", "-c", _TRY_NAMESPACE])
    works = done.returncode == 0
    hint = None
    if not works:
        if host.read("proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
            hint = "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        elif host.read("proc/sys/kernel/unprivileged_userns_clone") == "0":
            hint = "sudo sysctl kernel.unprivileged_userns_clone=1"
        elif host.read("proc/sys/user/max_user_namespaces") == "0":
            hint = "sudo sysctl user.max_user_namespaces=10000"
        else:
            hint = "in a container: its seccomp profile or its runtime has to allow unshare(2)"
    return Finding(
        topic="permissions",
        name="user namespaces",
        status=Status.OK if works else Status.WARN,
        detail="can be made"
        if works
        else f"cannot be made ({done.stderr.strip()}); for building images without root",
        hint=hint,
    )


def _administers_networks(host: Host) -> bool:
    status = host.read("proc/self/status") or ""
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_NET_ADMIN & 1)


def _networks(host: Host, where: Distribution) -> Iterator[Finding]:
    """Which networks the manager can make here, beside those that need no rights."""
    if not host.linux:
        return
    rights = [] if _administers_networks(host) else ["CAP_NET_ADMIN"]
    for name, programs, how in (
        ("bridged networks", ("nft", "dnsmasq"), "can be made"),
        (
            "VLANs",
            ("nft", "dnsmasq", "ovs-vswitchd"),
            "through Open vSwitch, with its datapath in user space",
        ),
    ):
        missing = [program for program in programs if _path_of(host, program) is None]
        hint = install_command(missing, where) if missing else None
        if rights and hint is None:
            hint = 'be root; networks of the modes "isolated" and "user" need no rights'
        lacking = [*rights, *missing]
        yield Finding(
            topic="networks",
            name=name,
            status=Status.WARN if lacking else Status.OK,
            detail=f"not without {', '.join(lacking)}" if lacking else how,
            hint=hint if lacking else None,
        )


def _network_administration(host: Host) -> Finding:
    allowed = _administers_networks(host)
    return Finding(
        topic="permissions",
        name="network administration",
        status=Status.OK if allowed else Status.WARN,
        detail="CAP_NET_ADMIN is there: bridges and TAP devices can be made"
        if allowed
        else "no CAP_NET_ADMIN: no bridges and TAP devices",
        hint=None if allowed else "machines have user-mode networks (QEMU's own, or passt)",
    )


def _limits(host: Host) -> Iterator[Finding]:
    for name, number, few, unit, hint in (
        ("open files", resource.RLIMIT_NOFILE, _FEW_FILES, "", f"ulimit -n {_FEW_FILES}"),
        (
            "locked memory",
            resource.RLIMIT_MEMLOCK,
            _LITTLE_LOCKED,
            "bytes",
            "devices of the host cannot be given to guests; raise memlock in "
            "/etc/security/limits.conf",
        ),
    ):
        limit = host.limit(number)
        unlimited = limit == resource.RLIM_INFINITY
        enough = unlimited or limit >= few
        shown = "no limit" if unlimited else _rounded(limit) if unit else str(limit)
        yield Finding(
            topic="limits",
            name=name,
            status=Status.OK if enough else Status.WARN,
            detail=shown,
            hint=None if enough else hint,
        )

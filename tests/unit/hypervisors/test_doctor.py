from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from vmlab.hypervisors import doctor
from vmlab.hypervisors.base import Probe, ProbeItem
from vmlab.hypervisors.doctor import Diagnosis, Finding, Host, Status, diagnose
from vmlab.hypervisors.ownership import Home

GIB = 1 << 30
DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\n'


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def accelerator(name: str, works: bool = True) -> Callable[[], ProbeItem]:
    return lambda: ProbeItem(
        name=name, works=works, detail=f"{name} is {works}", hint=None if works else "buy one"
    )


def qemu(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What QEMU's programs and the trial of user namespaces answer."""
    said = {"qemu-img": "qemu-img version 8.2.1\n"}.get(
        Path(argv[0]).name, "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright ...\n"
    )
    return subprocess.CompletedProcess(list(argv), 0, said, "")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host where everything is in order."""
    root = tmp_path / "root"
    write(root / "etc/os-release", DEBIAN)
    write(root / "proc/sys/kernel/osrelease", "6.1.0-18-amd64\n")
    write(root / "proc/cpuinfo", "flags : fpu vmx\n")
    write(root / "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    write(root / "proc/self/status", "Name: x\nCapEff:\t000001ffffffffff\n")
    write(root / "sys/module/kvm_intel/parameters/nested", "Y\n")
    write(root / "dev/net/tun", "")
    write(root / "dev/vhost-net", "")
    return Host(
        root=root,
        system="linux",
        which=lambda program: f"/usr/bin/{program}",
        run=qemu,
        limit=lambda number: resource.RLIM_INFINITY,
        disk=lambda path: 100 * GIB,
        accelerators={name: accelerator(name) for name in ("kvm", "hvf", "whpx", "tcg")},
        hypervisors=lambda: [Probe(hypervisor="qemu", available=True, version="7.2")],
    )


@pytest.fixture
def look(host: Host, tmp_path: Path) -> Callable[..., Diagnosis]:
    """Diagnose the host, with some things changed."""

    def diagnosis(home: Path | None = None, **changes: object) -> Diagnosis:
        changed = replace(host, **changes)  # fields by name
        return diagnose(changed, home or tmp_path / "home")

    return diagnosis


def named(diagnosis: Diagnosis, name: str) -> Finding:
    [finding] = [finding for finding in diagnosis.findings if finding.name == name]
    return finding


def test_a_host_in_order(look: Callable[..., Diagnosis]) -> None:
    found = look()
    assert found.having(Status.WARN, Status.MISSING) == []
    assert found.install is None
    assert found.usable
    assert found.system.startswith("Debian GNU/Linux 12 (bookworm), ")
    assert {finding.topic for finding in found.findings} == {
        "kernel",
        "accelerators",
        "qemu",
        "programs",
        "memory",
        "disk",
        "permissions",
        "networks",
        "limits",
        "hypervisors",
    }
    assert named(found, "kernel").detail == "linux 6.1.0-18-amd64"
    assert named(found, "qemu-system-riscv64").detail == "7.2.22 at /usr/bin/qemu-system-riscv64"
    assert named(found, "memory").detail == "8.0 GiB available of 16.0 GiB"
    assert named(found, "open files").detail == "no limit"
    assert json.loads(found.model_dump_json())["usable"] is True


def test_the_order_does_not_change(look: Callable[..., Diagnosis]) -> None:
    assert look().findings == look().findings


# ------------------------------------------------------------------- kernel and accelerators


@pytest.mark.parametrize(
    ("module", "switch", "flags", "status", "detail"),
    [
        ("kvm_intel", "Y", "vmx", Status.OK, "on (kvm_intel): guests can run KVM themselves"),
        ("kvm_amd", "1", "svm", Status.OK, "on (kvm_amd): guests can run KVM themselves"),
        (
            "kvm_amd",
            "0",
            "svm hypervisor",
            Status.WARN,
            "off (kvm_amd); this host is a virtual machine itself",
        ),
        (None, "", "x", Status.WARN, "the kernel has neither kvm_intel nor kvm_amd loaded"),
    ],
)
def test_nested_virtualisation(
    host: Host,
    look: Callable[..., Diagnosis],
    module: str | None,
    switch: str,
    flags: str,
    status: Status,
    detail: str,
) -> None:
    (host.root / "sys/module/kvm_intel/parameters/nested").unlink()
    write(host.root / "proc/cpuinfo", f"processor: 0\nflags : {flags} fpu\n")
    if module is not None:
        write(host.root / f"sys/module/{module}/parameters/nested", switch)
    found = named(look(), "nested virtualisation")
    assert (found.status, found.detail) == (status, detail)
    assert (found.hint is None) == (status is Status.OK)


def test_processors_without_flags_have_no_such_switch(
    host: Host, look: Callable[..., Diagnosis]
) -> None:
    write(host.root / "proc/cpuinfo", "Features : fp asimd\n")
    assert [one for one in look().findings if one.name == "nested virtualisation"] == []


def test_without_kvm_guests_are_slow_and_without_tcg_there_are_none(
    look: Callable[..., Diagnosis],
) -> None:
    found = look(accelerators={"kvm": accelerator("kvm", False), "tcg": accelerator("tcg", False)})
    assert named(found, "kvm").status is Status.WARN
    assert named(found, "kvm").hint == "buy one"
    assert named(found, "tcg").status is Status.MISSING


@pytest.mark.parametrize(("system", "native"), [("darwin", "hvf"), ("win32", "whpx")])
def test_elsewhere_than_on_linux(look: Callable[..., Diagnosis], system: str, native: str) -> None:
    found = look(system=system)
    assert [one.name for one in found.findings if one.topic == "accelerators"] == [native, "tcg"]
    assert {one.topic for one in found.findings}.isdisjoint({"programs", "permissions", "networks"})
    assert named(found, "kernel").status is Status.WARN


# ------------------------------------------------------------------- programs


def test_what_is_missing_is_told_with_one_command(
    look: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmlab.hypervisors.packages.os.geteuid", lambda: 1000)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "riscv64")
    found = look(which=lambda program: None)
    missing = found.having(Status.MISSING)
    assert {one.name for one in missing} == {
        "qemu-system-riscv64",
        "qemu-system-aarch64",
        "qemu-system-x86_64",
        "qemu-system-ppc64",
        "qemu-img",
        "passt",
        "virtiofsd",
        "mmdebstrap",
    }
    assert found.install == (
        "sudo apt-get install qemu-system-misc qemu-utils qemu-system-arm qemu-system-ppc"
        " qemu-system-x86 mmdebstrap passt qemu-system-common"
    )
    assert named(found, "qemu-img").hint == "sudo apt-get install qemu-utils"
    assert named(found, "passt").detail == "not installed; for networks of machines without root"


@pytest.mark.parametrize(
    ("absent", "capabilities", "bridged", "vlans", "hint"),
    [
        ((), "1000", "can be made", "through Open vSwitch, with its datapath in user space", None),
        (
            ("ovs-vswitchd",),
            "1000",
            "can be made",
            "not without ovs-vswitchd",
            "sudo apt-get install openvswitch-switch",
        ),
        (
            ("nft", "dnsmasq"),
            "1000",
            "not without nft, dnsmasq",
            "not without nft, dnsmasq",
            "sudo apt-get install nftables dnsmasq-base",
        ),
        (
            (),
            "0",
            "not without CAP_NET_ADMIN",
            "not without CAP_NET_ADMIN",
            'be root; networks of the modes "isolated" and "user" need no rights',
        ),
    ],
)
def test_networks_that_the_manager_can_make(
    host: Host,
    look: Callable[..., Diagnosis],
    monkeypatch: pytest.MonkeyPatch,
    absent: tuple[str, ...],
    capabilities: str,
    bridged: str,
    vlans: str,
    hint: str | None,
) -> None:
    monkeypatch.setattr("vmlab.hypervisors.packages.os.geteuid", lambda: 1000)
    write(host.root / "proc/self/status", f"CapEff:\t000000000000{capabilities}\n")
    found = look(which=lambda program: None if program in absent else f"/usr/bin/{program}")
    assert named(found, "bridged networks").detail == bridged
    assert named(found, "VLANs").detail == vlans
    assert named(found, "VLANs").hint == hint
    # They are a possibility more: nobody is told to install them who has not asked.
    assert found.install is None


def test_a_distribution_that_is_not_known(host: Host, look: Callable[..., Diagnosis]) -> None:
    (host.root / "etc/os-release").unlink()
    found = look(which=lambda program: None)
    assert found.install is None
    assert named(found, "qemu-img").hint == "install qemu-img"


def test_virtiofsd_is_not_in_path(host: Host, look: Callable[..., Diagnosis]) -> None:
    write(host.root / "usr/lib/qemu/virtiofsd", "")
    found = look(which=lambda program: None)
    assert named(found, "virtiofsd").detail == str(host.root / "usr/lib/qemu/virtiofsd")


@pytest.mark.parametrize(
    ("said", "status", "detail"),
    [
        ("QEMU emulator version 6.2.0 (x)", Status.WARN, "6.2.0 at /usr/bin/qemu-img"),
        ("QEMU emulator version 10.0", Status.OK, "10.0 at /usr/bin/qemu-img"),
        ("hello", Status.MISSING, "/usr/bin/qemu-img does not say its version: hello"),
    ],
)
def test_versions_of_qemu(
    look: Callable[..., Diagnosis], said: str, status: Status, detail: str
) -> None:
    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(list(argv), 0, said, "")

    found = named(look(run=run), "qemu-img")
    assert (found.status, found.detail) == (status, detail)


def test_a_qemu_that_does_not_start(look: Callable[..., Diagnosis]) -> None:
    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        failed = "qemu-system" in argv[0]
        complaint = "x\nerror while loading shared libraries: libslirp.so.0\n"
        return replace_status(qemu(argv), 127, complaint) if failed else qemu(argv)

    found = named(look(run=run), "qemu-system-x86_64")
    assert found.status is Status.MISSING
    assert found.detail.endswith("error while loading shared libraries: libslirp.so.0")


def replace_status(
    done: subprocess.CompletedProcess[str], status: int, complaint: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(done.args, status, done.stdout, complaint)


def test_commands_that_fail_are_answers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._run(["/nonexistent"]).returncode == 127
    monkeypatch.setattr(doctor, "_COMMAND_SECONDS", 0.05)
    done = doctor._run(["sleep", "60"])
    assert done.returncode == 127
    assert "timed out" in done.stderr
    assert doctor._run(["echo", "x"]).stdout == "x\n"


# ------------------------------------------------------------------- memory and disk


def test_little_memory(host: Host, look: Callable[..., Diagnosis]) -> None:
    write(host.root / "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 524288 kB\n")
    found = named(look(), "memory")
    assert found.status is Status.WARN
    assert found.detail == "512.0 MiB available of 16.0 GiB"


@pytest.mark.parametrize(
    ("limit", "status", "detail"),
    [(2 * GIB, Status.OK, "2.0 GiB, by "), (1000, Status.WARN, "1000, by ")],
)
def test_the_limit_of_a_cgroup(
    host: Host, look: Callable[..., Diagnosis], limit: int, status: Status, detail: str
) -> None:
    write(host.root / "proc/self/mountinfo", "1 2 0:3 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    write(host.root / "proc/self/cgroup", "0::/\n")
    write(host.root / "sys/fs/cgroup/memory.max", f"{limit}\n")
    found = named(look(), "cgroup limit")
    assert found.status is status
    assert found.detail == f"{detail}{host.root}/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("free", "status"),
    [(5 * GIB, Status.OK), (5 * GIB - 1, Status.WARN), ((1 << 29) - 1, Status.MISSING)],
)
def test_disk_where_the_home_is_or_would_be(
    look: Callable[..., Diagnosis], tmp_path: Path, free: int, status: Status
) -> None:
    asked: list[Path] = []

    def disk(path: Path) -> int:
        asked.append(path)
        return free

    found = named(look(disk=disk, home=tmp_path / "not" / "yet"), "disk")
    assert found.status is status
    assert asked == [tmp_path]
    assert not (tmp_path / "not").exists(), "the doctor made something"


def test_a_home_that_cannot_be_made(
    look: Callable[..., Diagnosis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(
        doctor.os, "access", lambda path, mode: path != tmp_path and access(path, mode)
    )
    found = named(look(home=tmp_path / "no" / "home"), "home")
    assert found.status is Status.MISSING
    assert found.detail == f"{tmp_path / 'no' / 'home'} cannot be made: {tmp_path} is not writable"


def test_a_home_that_others_can_write(look: Callable[..., Diagnosis], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    found = named(look(), "home")
    assert found.status is Status.MISSING
    assert "can be written by others" in found.detail
    assert found.hint is not None
    assert found.hint.startswith("chmod go-w")


def test_dead_runs_are_told_and_left(look: Callable[..., Diagnosis], tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    assert named(look(), "dead runs").status is Status.OK
    (home.runs / "dead").mkdir()
    found = named(look(), "dead runs")
    assert found.status is Status.WARN
    assert found.detail == f"1 left something in {home.runs}"
    assert found.hint == "`vmlab clean` removes it"
    assert (home.runs / "dead").exists()


def test_the_home_is_the_environment_s(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "here"))
    assert named(diagnose(host), "disk").detail.endswith(f"for {tmp_path / 'here'}")


# ------------------------------------------------------------------- permissions and limits


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (
            {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"},
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (
            {"proc/sys/kernel/unprivileged_userns_clone": "0"},
            "sudo sysctl kernel.unprivileged_userns_clone=1",
        ),
        ({"proc/sys/user/max_user_namespaces": "0"}, "sudo sysctl user.max_user_namespaces=10000"),
        ({}, "in a container: its seccomp profile or its runtime has to allow unshare(2)"),
    ],
)
def test_user_namespaces_are_tried(
    host: Host, look: Callable[..., Diagnosis], files: Mapping[str, str], hint: str
) -> None:
    for path, text in files.items():
        write(host.root / path, text)

    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if argv[0] == sys.executable:
            return subprocess.CompletedProcess(list(argv), 1, "", "Operation not permitted\n")
        return qemu(argv)

    found = named(look(run=run), "user namespaces")
    assert found.status is Status.WARN
    assert found.detail.startswith("cannot be made (Operation not permitted)")
    assert found.hint == hint


@pytest.mark.parametrize(
    "status", ["CapEff:\t0000000000000000\n", "CapEff:\t000001ffffffefff\n", "Name: x\n"]
)
def test_network_administration(host: Host, look: Callable[..., Diagnosis], status: str) -> None:
    write(host.root / "proc/self/status", status)
    found = named(look(), "network administration")
    assert found.status is Status.WARN
    assert found.detail == "no CAP_NET_ADMIN: no bridges and TAP devices"


def test_devices(
    host: Host, look: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    (host.root / "dev/vhost-net").unlink()
    access = os.access
    tun = host.root / "dev/net/tun"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != tun and access(path, mode))
    found = look()
    assert named(found, "/dev/vhost-net").detail == "is not there; for fast networks"
    assert named(found, "/dev/vhost-net").hint == "sudo modprobe vhost_net"
    assert named(found, "/dev/net/tun").detail == "may not be opened; for networks of machines"
    assert named(found, "/dev/net/tun").hint == "sudo setfacl -m u:$USER:rw /dev/net/tun"
    assert named(found, "/dev/net/tun").status is Status.WARN


def test_limits(look: Callable[..., Diagnosis]) -> None:
    limits = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: 64 << 10}
    found = look(limit=limits.__getitem__)
    assert named(found, "open files").status is Status.WARN
    assert named(found, "open files").detail == "1024"
    assert named(found, "open files").hint == "ulimit -n 4096"
    assert named(found, "locked memory").status is Status.WARN
    assert named(found, "locked memory").detail == "64K"
    limits = {resource.RLIMIT_NOFILE: 4096, resource.RLIMIT_MEMLOCK: 8 << 20}
    found = look(limit=limits.__getitem__)
    assert named(found, "open files").status is Status.OK
    assert named(found, "locked memory").detail == "8.0 MiB"


# ------------------------------------------------------------------- hypervisors


def test_a_host_where_nothing_works(look: Callable[..., Diagnosis]) -> None:
    found = look(
        hypervisors=lambda: [
            Probe(hypervisor="qemu", available=False, reason="no QEMU", hint="install it"),
            Probe(hypervisor="other", available=False, reason="broken"),
        ]
    )
    assert not found.usable
    assert named(found, "qemu") == Finding(
        topic="hypervisors",
        name="qemu",
        status=Status.MISSING,
        detail="no QEMU",
        hint="install it",
    )
    assert look(hypervisors=list).usable is False


def test_one_that_works_is_enough(look: Callable[..., Diagnosis]) -> None:
    found = look(
        hypervisors=lambda: [
            Probe(hypervisor="qemu", available=False, reason="no QEMU"),
            Probe(hypervisor="other", available=True),
        ]
    )
    assert found.usable
    assert named(found, "other").detail == "works here"


def test_this_host_is_explained(tmp_path: Path) -> None:
    found = diagnose(home=tmp_path)
    assert all(finding.detail for finding in found.findings)
    assert {"kernel", "memory", "open files"} <= {finding.name for finding in found.findings}
    assert found.having(*Status) == list(found.findings)


def test_what_the_engine_needs_is_told_part_by_part(look: Callable[..., Diagnosis]) -> None:
    items = (
        ProbeItem(name="processor", works=True, detail="x86_64"),
        ProbeItem(name="executable memory", works=False, detail="refused", hint="allow it"),
        ProbeItem(name="user network", works=False, detail="among the programs"),
    )
    engine = Probe(hypervisor="embedded", available=False, reason="refused", items=items)
    found = look(hypervisors=lambda: [engine])
    told = [finding for finding in found.findings if finding.topic == "engine"]
    assert [(each.name, each.status, each.hint) for each in told] == [
        ("processor", Status.OK, None),
        ("executable memory", Status.MISSING, "allow it"),
    ]

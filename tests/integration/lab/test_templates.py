"""Forks of a template: booted once, somebody of its own each, also for another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.needs import need

from vmlab.hypervisors.leftovers import marked
from vmlab.hypervisors.ownership import Home, Run
from vmlab.lab.laboratory import Lab
from vmlab.lab.vm import VM

pytestmark = [pytest.mark.boots, pytest.mark.timeout(900)]

IMAGE = "debian-12-amd64-tiny"
MEMORY = "256M"

# What a kernel prints first, with the microseconds at which it did: no two boots have the same.
_BOOT = "dmesg | head -n 60 | md5sum"

# Boots the template of a share directory, tells of its machine, and waits to be killed.
_FIRST = f"""
import json, sys
from pathlib import Path
from vmlab.lab.laboratory import Lab

lab = Lab(hypervisor="qemu", image={IMAGE!r}, shared=Path(sys.argv[1]))
vm = lab.vm(memory={MEMORY!r})
boot = vm.succeed({_BOOT!r}).stdout
print(json.dumps({{"run": lab.owner.id, "boot": boot, "pid": vm.info().pid}}), flush=True)
sys.stdin.read()
"""


def boot_of(vm: VM) -> str:
    """Which boot a guest remembers: its memory is a copy of one that did."""
    return vm.succeed(_BOOT).stdout


def steps(vm: VM) -> list[str]:
    return [step.name for step in vm.timeline.steps]


def test_an_image_is_booted_once_and_each_machine_is_somebody_of_its_own(lab: Lab) -> None:
    one, two = (lab.vm(memory=MEMORY, networks=["lan"]) for _ in range(2))
    assert one.forked and two.forked
    assert "template" not in steps(two) and "boot" not in steps(two)
    assert boot_of(one) == boot_of(two)

    for told in (
        lambda vm: vm.succeed("hostname").stdout.strip(),
        lambda vm: vm.read("/etc/machine-id").decode().strip(),
        lambda vm: vm.succeed("head -c 32 /dev/urandom | od -A n -t x1").stdout,
        lambda vm: vm.succeed("cat /sys/class/net/eth0/address").stdout.strip(),
        lambda vm: vm.succeed("ip -4 -o addr show dev eth0 | awk '{print $4}'").stdout.strip(),
        lambda vm: vm.info().nics[0].mac,
    ):
        assert told(one) != told(two)
    for vm in (one, two):
        assert vm.succeed("hostname").stdout.strip() == vm.name
        assert vm.read("/etc/machine-id").decode().strip() == vm.machine_id
        assert vm.succeed("cat /sys/class/net/eth0/address").stdout.strip() == (
            vm.info().nics[0].mac
        )
        # The time that it was told was right when the telling began.
        (late,) = [step.seconds for step in vm.timeline.steps if step.name == "refresh"]
        before = time.time()
        clock = int(vm.succeed("date -u +%s").stdout)
        assert before - late - 2 <= clock <= time.time() + 2
    # What one of them does, the other one does not see.
    one.write("/root/mine", "x")
    two.fail("test -e /root/mine")


def test_a_machine_that_is_different_for_its_guest_is_of_another_template(lab: Lab) -> None:
    plain = lab.vm(memory=MEMORY, networks=["lan"])
    other = lab.vm(memory=MEMORY, networks=["lan"], cpus=2)
    assert "template" in steps(other)
    assert boot_of(plain) != boot_of(other)
    assert other.succeed("nproc").stdout.strip() == "2"
    alone = lab.vm(memory=MEMORY, template=False)
    assert not alone.forked and "boot" in steps(alone)


def test_shares_and_disks_of_forks_are_each_ones_own(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("hello")
    wish: dict[str, Any] = {
        "memory": MEMORY, "shares": [f"{tmp_path}:/src:rw"], "disks": ["16M"]
    }  # fmt: skip
    one, two = (lab.vm(**wish) for _ in range(2))
    assert one.forked and two.forked
    for vm in (one, two):
        assert vm.succeed("cat /src/source").stdout == "hello"
        vm.succeed(f"echo {vm.name} >/src/{vm.name}; echo {vm.name} >/dev/vda; sync")
    assert {path.name for path in tmp_path.iterdir()} == {"source", one.name, two.name}
    assert [vm.succeed("head -n 1 /dev/vda").stdout.strip() for vm in (one, two)] == [
        one.name, two.name,
    ]  # fmt: skip
    # A share that is mounted is taken away while the machine is saved, and is back afterwards.
    one.snapshot("clean")
    one.write("/root/later", "x")
    one.restore("clean")
    one.fail("test -e /root/later")
    assert one.succeed("cat /src/source").stdout == "hello"
    child = one.fork("child")
    assert child.succeed("cat /src/source").stdout == "hello"
    assert one.succeed("cat /src/source").stdout == "hello"


@pytest.fixture
def first(image_store: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _FIRST, str(tmp_path / "shared")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def test_a_template_outlives_the_process_that_booted_it(
    lab: Lab, first: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert first.stdout is not None
    told = json.loads(first.stdout.readline())
    shared = tmp_path / "shared"
    with Lab(hypervisor="qemu", image=IMAGE, shared=shared) as second:
        beside = second.vm(memory=MEMORY)
        assert boot_of(beside) == told["boot"]
        assert second.owner.id != told["run"]

    os.kill(first.pid, signal.SIGKILL)
    first.wait(60)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(told["pid"]).wait(60)
    with Lab(hypervisor="qemu", image=IMAGE, shared=shared) as third:
        # Its beginning has cleared what the dead one left.
        assert not (Home.open().runs / told["run"]).exists()
        assert boot_of(third.vm(memory=MEMORY)) == told["boot"]
    assert not [process for process, owner in marked() if told["run"] in owner.values()]


def test_a_template_that_is_damaged_is_made_anew(image_store: str, tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    boots = []
    for _ in range(2):
        with Lab(hypervisor="qemu", image=IMAGE, shared=tmp_path) as lab:
            boots.append(boot_of(lab.vm(memory="192M")))
        (memory,) = tmp_path.glob("*/snapshot/memory-0")
        with memory.open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"damage")
    assert boots[0] != boots[1]


def test_what_a_lab_leaves_goes_with_its_run(image_store: str) -> None:
    with Run.begin() as run:
        with Lab(hypervisor="qemu", image=IMAGE, owner=run.owner) as lab:
            lab.vm(memory=MEMORY, boot=False)
        assert not list(run.directory.glob("machines/qemu/*"))

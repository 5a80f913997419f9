"""Machines that are broken on purpose: real guests on QEMU and on the embedded engine.

One machine for each hypervisor, and one more that is booted twice.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.needs import need
from tests.store import IMAGE_STORE

from vmlab.engine.devices.occasions import Occasions, Trigger
from vmlab.lab.faulting import FaultEvent, FaultRun
from vmlab.lab.given import LabDisk
from vmlab.lab.laboratory import Lab
from vmlab.lab.vm import VM
from vmlab.machine.errors import VmlabError
from vmlab.machine.events import EventType
from vmlab.machine.faults import ClockJump, DiskCorrupt, DiskSlow, DiskTornWrite, FaultSchedule
from vmlab.machine.spec import Disk

pytestmark = [pytest.mark.boots, pytest.mark.timeout(900)]

IMAGES = {"qemu": "debian-12-amd64-tiny", "embedded": "debian-13-riscv64-tiny"}
BLOCK = 4096


@pytest.fixture(scope="module")
def file_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ext4 file system."""
    mkfs = need("mkfs.ext4")
    image = tmp_path_factory.mktemp("fs") / "fs.img"
    with image.open("xb") as file:
        file.truncate(32 << 20)
    subprocess.run([mkfs, "-q", "-F", image], check=True, timeout=60)
    return image


@contextmanager
def booted(hypervisor: str, file_system: Path) -> Iterator[VM]:
    """A machine with an empty disk and one with a file system, which every fault can strike."""
    if hypervisor == "qemu":
        need("qemu-system-x86_64")
    disks = [
        LabDisk(Disk(name="raw", size=16 << 20, serial="raw", breakable=True), named=True),
        LabDisk(Disk(name="fs", source=file_system, serial="fs", breakable=True), named=True),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMLAB_IMAGE_STORE", str(IMAGE_STORE))
        with Lab(hypervisor=hypervisor, image=IMAGES[hypervisor]) as lab:
            yield lab.vm(disks=disks, template=False)


@pytest.fixture(scope="module", params=list(IMAGES))
def vm(request: pytest.FixtureRequest, file_system: Path) -> Iterator[VM]:
    with booted(request.param, file_system) as vm:
        yield vm


def device(vm: VM, serial: str) -> str:
    """The guest's device of a disk."""
    return vm.succeed(
        "for d in /sys/block/vd*; do "
        f'[ "$(cat $d/serial)" = {serial} ] && echo /dev/${{d##*/}}; done; true'
    ).stdout.strip()


def write(vm: VM, place: str, byte: str, *, at: int = 0, synced: bool = False) -> bool:
    """Write a block of one byte, which reaches the disk; whether that succeeds."""
    vm.succeed(f"head -c {BLOCK} /dev/zero | tr '\\0' {byte} >/tmp/block")
    how = "conv=notrunc,fsync" if synced else "conv=notrunc oflag=direct"
    done = vm.execute(f"dd if=/tmp/block of={place} bs={BLOCK} seek={at} {how} 2>/dev/null")
    return done.ok


def block(vm: VM, place: str, at: int = 0) -> bytes:
    command = f"dd if={place} bs={BLOCK} skip={at} count=1 iflag=direct 2>/dev/null | xxd -p"
    return bytes.fromhex("".join(vm.succeed(command).stdout.split()))


def outcomes(vm: VM, text: str, work: Callable[[], bool], count: int) -> list[bool]:
    """What becomes of some work under a schedule of faults."""
    told: list[FaultEvent] = []
    run = FaultRun(vm.machine, FaultSchedule.parse(text), on_fault=told.append)
    vm.run(run.arm())
    try:
        return [work() for _ in range(count)]
    finally:
        vm.run(run.disarm())
        assert [event.action for event in told] == ["injected", "cleared"]


def test_the_third_write_fails_and_no_other(vm: VM) -> None:
    raw = device(vm, "raw")
    text = """
    [[faults]]
    kind = "disk-error"
    disk = "raw"
    operation = "write"
    when = { on = "nth", n = 3 }
    """
    found = outcomes(vm, text, lambda: write(vm, raw, "x", at=16), 5)
    assert found == [True, True, False, True, True]


def test_chances_are_the_same_on_every_hypervisor(vm: VM) -> None:
    raw = device(vm, "raw")
    text = """
    seed = 11
    [[faults]]
    id = "dice"
    kind = "disk-error"
    disk = "raw"
    operation = "write"
    when = { on = "chance", probability = 0.5 }
    """
    seed = FaultSchedule.parse(text).random("dice").getrandbits(63)
    dice = Occasions(Trigger(probability=0.5, seed=seed), lambda: 0)
    found = outcomes(vm, text, lambda: write(vm, raw, "x", at=16), 12)
    assert found == [not dice.strikes() for _ in range(12)]
    assert len(set(found)) == 2


def test_a_write_is_torn_a_byte_changes_and_a_read_is_slow(vm: VM) -> None:
    raw = device(vm, "raw")
    assert write(vm, raw, "o", at=24)
    fault = vm.inject(DiskTornWrite(disk="raw", keep=1024))
    assert write(vm, raw, "n", at=24)
    vm.clear_fault(fault)
    assert block(vm, raw, at=24) == b"n" * 1024 + b"o" * (BLOCK - 1024)
    vm.inject(DiskCorrupt(disk="raw", offset=24 * BLOCK + 7, length=2))
    assert block(vm, raw, at=24)[:10] == b"n" * 7 + bytes(byte ^ 0xFF for byte in b"nn") + b"n"
    fault = vm.inject(DiskSlow(disk="raw", delay=2.0))
    before = float(vm.succeed("cat /proc/uptime").stdout.split()[0])
    block(vm, raw, at=24)
    took = float(vm.succeed("cat /proc/uptime").stdout.split()[0]) - before
    vm.clear_fault(fault)
    assert took >= 2.0


def test_a_guest_s_clock_jumps_there_and_back(vm: VM) -> None:
    def clock() -> int:
        return int(vm.succeed("date +%s").stdout)

    before = clock()
    with vm.arm(FaultSchedule.parse('faults = [{ kind = "clock-jump", seconds = 86400 }]')):
        assert clock() >= before + 86400
    vm.inject(ClockJump(seconds=-86400))
    assert before <= clock() < before + 86400


def test_a_text_on_the_console_cuts_the_power_and_the_machine_starts_again(vm: VM) -> None:
    text = """
    [[faults]]
    id = "storm"
    kind = "power-cut"
    restart = true
    when = { on = "console", text = "here comes the storm" }
    """
    told, over = list[FaultEvent](), asyncio.Event()

    def tell(event: FaultEvent) -> None:
        told.append(event)
        over.set()

    run = FaultRun(vm.machine, FaultSchedule.parse(text), on_fault=tell)
    before = vm.run(vm.machine.hypervisor.events())[-1].sequence
    vm.run(run.arm())
    # On a busy host the guest's answer may come too late.
    with suppress(VmlabError):
        vm.succeed("(usleep 200000; echo here comes the storm >/dev/console) >/dev/null 2>&1 &")
    vm.run(over.wait())
    vm.run(run.disarm())
    vm.run(running_again(vm, before))
    assert [(event.id, event.action) for event in told] == [("storm", "injected")]
    # It belongs to this test now.
    vm.kill()


async def running_again(vm: VM, since: int) -> None:
    """Wait until it runs, after it has crashed."""
    crashed = False
    async for event in vm.machine.hypervisor.subscribe(since):
        crashed = crashed or event.type is EventType.CRASHED
        if crashed and event.type is EventType.STATE and event.data["to"] == "running":
            return


@pytest.mark.parametrize("hypervisor", list(IMAGES))
def test_what_was_fsynced_survives_a_power_cut_and_what_was_not_is_lost(
    hypervisor: str, file_system: Path
) -> None:
    with booted(hypervisor, file_system) as vm:
        lose_power(vm)


def lose_power(vm: VM) -> None:
    raw, fs = device(vm, "raw"), device(vm, "fs")
    # Nothing is committed by itself while a slow guest works.
    vm.succeed(f"mkdir -p /fs && mount -t ext4 -o commit=36000 {fs} /fs")
    vm.succeed("echo kept >/tmp/kept && dd if=/tmp/kept of=/fs/kept conv=fsync 2>/dev/null")
    vm.succeed("echo lost >/fs/lost && cat /fs/lost")
    assert write(vm, raw, "k", synced=True)
    # These have reached the disk, which has told so; a flush they had not.
    assert write(vm, raw, "l")
    assert write(vm, raw, "l", at=1)
    assert block(vm, raw) == b"l" * BLOCK
    vm.power_cut()
    assert vm.alive
    raw, fs = device(vm, "raw"), device(vm, "fs")
    assert block(vm, raw) == b"k" * BLOCK
    assert block(vm, raw, at=1) == bytes(BLOCK)
    vm.succeed(f"mkdir -p /fs && mount -t ext4 {fs} /fs")
    assert vm.succeed("cat /fs/kept").stdout == "kept\n"
    assert not vm.execute("cat /fs/lost").ok
    vm.succeed("umount /fs")

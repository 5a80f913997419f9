"""A guest that has booted: what it sees of pausing, plugging, saving, copying and moving it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.hypervisors.qemu import migration
from vmlab.machine.errors import (
    ChannelClosed,
    CorruptSnapshot,
    InvalidSpec,
    MigrationFailed,
    OperationFailed,
    ResourceNotFound,
    SnapshotNotFound,
    UnsupportedOperation,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import (
    At,
    Chance,
    DiskError,
    KillFault,
    MemoryPressure,
    NetPartition,
    PauseFault,
)
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(900)]

# What the pvpanic driver does when the kernel panics (docs/specs/pvpanic.txt: bit 0 of port 0x505).
PANIC = r"printf '\001' | dd of=/dev/port bs=1 count=1 seek=1285"
HEARTBEAT = "(while :; do read t _ < /proc/uptime; echo $t >> /tmp/beat; usleep 50000; done) &"


async def state_becomes(machine: Any, state: MachineState) -> None:
    await until(lambda: machine.state is state, lambda: machine.state)


async def until(is_so: Callable[[], bool], seen: Callable[[], Any]) -> None:
    deadline = asyncio.get_running_loop().time() + 100
    while not is_so():
        assert asyncio.get_running_loop().time() < deadline, seen()
        await asyncio.sleep(0.01)


async def balloon_becomes(machine: Any, size: int) -> None:
    deadline = asyncio.get_running_loop().time() + 100
    while (seen := (await machine.metrics()).memory.balloon_bytes) != size:
        assert asyncio.get_running_loop().time() < deadline, seen
        await asyncio.sleep(0.05)


class Heartbeat:
    """A guest that writes down its own clock again and again, beside a thread here that does so.

    A guest that nothing interrupts stands still for about as long as the host lets this process.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.first = 0.0
        self.began = 0.0
        self.stood = 0.0  # seconds, the longest that this process did
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.05):
            self.stood = max(self.stood, -last + (last := time.monotonic()))

    async def __aenter__(self) -> Self:
        self.began = time.monotonic()
        self._thread.start()
        await self.shell.run(HEARTBEAT)
        self.first = (await self.beats(1))[0]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    async def beats(self, number: int) -> list[float]:
        """All that were written down, once there are so many more."""
        count = "$(wc -l < /tmp/beat)"
        await self.shell.run(
            f"n={count}; until [ {count} -ge $((n + {number})) ]; do usleep 20000; done"
        )
        return [float(line) for line in (await self.shell.run("cat /tmp/beat")).split()]

    async def goes_on(self) -> None:
        """It has beaten all the time, and its clock has not run ahead of the host's."""
        beats = await self.beats(5)
        gaps = [later - earlier for earlier, later in pairwise(beats)]
        assert min(gaps) >= 0, beats
        assert max(gaps) < 2 + 3 * self.stood, (gaps, self.stood)
        assert beats[-1] - self.first <= 1.1 * (time.monotonic() - self.began) + 0.5


def test_info_is_read_back_and_agrees_with_the_guest(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        info = await machine.info()
        assert (info.name, info.architecture.value, info.vcpus) == (machine.name, "x86_64", 2)
        assert (await shell.run("nproc; uname -m")).split() == ["2", "x86_64"]
        assert info.memory == 192 * MIB
        assert [(disk.name, disk.size, disk.bus) for disk in info.disks] == [
            ("data", 16 * MIB, "virtio"),
            ("slow", 8 * MIB, "scsi"),
        ]
        assert [nic.name for nic in info.nics] == ["lan", "wan"]
        assert info.nics[1].forwards[0][::2] == ("tcp", 7)
        assert info.nics[1].forwards[0][1] > 1023
        assert (info.consoles, info.channels, info.accelerator) == (
            ("serial",),
            ("test.echo",),
            "tcg",
        )
        sizes = await shell.run("cat /sys/block/vda/size /sys/block/sda/size")
        assert [int(sectors) * 512 for sectors in sizes.split()] == [16 * MIB, 8 * MIB]
        metrics = await machine.metrics()
        assert metrics.cpu.seconds > 0
        assert len(metrics.cpu.per_vcpu_seconds) == 2
        assert metrics.memory.balloon_bytes == 192 * MIB
        assert {disk.name for disk in metrics.disks} == {"data", "slow"}
        await shell.run("dd if=/dev/zero of=/dev/vda bs=64k count=4 conv=fsync 2>/dev/null")
        later = await machine.metrics()
        wrote = later.disks[0].written_bytes - metrics.disks[0].written_bytes
        assert wrote == 4 * 65536
        assert later.disks[0].flushes > metrics.disks[0].flushes

    booted.run(test())


def test_paused_guest_stands_still_and_goes_on_where_it_was(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        began = time.monotonic()
        before = float((await shell.run("cut -d' ' -f1 /proc/uptime")).strip())
        await machine.pause()
        paused = time.monotonic()
        assert (await machine.status()).state is MachineState.PAUSED
        await asyncio.sleep(1)
        resumed = time.monotonic()
        await machine.resume()
        after = float((await shell.run("cut -d' ' -f1 /proc/uptime")).strip())
        # However long all of it took, of the pause nothing passed. Clocks differ a little.
        ran = time.monotonic() - began - (resumed - paused)
        assert after - before < 1.1 * ran + 0.1

    booted.run(test())


def test_graceful_stop_is_the_guests_own_and_its_log_goes_on(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        await shell.run("echo marker-one")
        console = await machine.console()
        await machine.stop(timeout=100)
        assert machine.state is MachineState.STOPPED
        kinds = [event.type for event in await booted.qemu.events() if event.machine == machine.id]
        assert EventType.GUEST_SHUTDOWN in kinds
        with pytest.raises(ChannelClosed):
            await console.write(b"x")
        await machine.start()
        while b"Linux" not in (read := await console.read()) and b"\n" not in read:
            assert read
        log = await console.log()
        assert b"marker-one" in log
        await machine.restart(graceful=False)
        assert machine.state is MachineState.RUNNING
        await console.close()

    booted.run(test())


def test_guest_that_ignores_the_power_button_is_killed_when_its_time_is_over(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        await shell.run("killall acpid; true")
        with pytest.raises(TimeoutError):
            await machine.stop(kill=False, timeout=2.5)
        assert (await machine.status()).state is MachineState.RUNNING
        await machine.stop(timeout=0.5)
        assert (await machine.status()).state is MachineState.STOPPED

    booted.run(test())


@pytest.mark.parametrize(
    ("command", "state", "event"),
    [
        ("poweroff -f", MachineState.STOPPED, EventType.GUEST_SHUTDOWN),
        (
            PANIC,
            MachineState.FAILED,
            EventType.GUEST_PANIC,
        ),
    ],
)
def test_what_a_guest_does_to_itself_is_noticed(
    booted: Any, command: str, state: MachineState, event: EventType
) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        await shell.run("true")
        console = await machine.console()
        await console.write(f"{command}\n".encode())
        await state_becomes(machine, state)
        kinds = [found.type for found in await booted.qemu.events() if found.machine == machine.id]
        assert event in kinds
        assert (await machine.info()).pid is None

    booted.run(test())


def test_guest_that_reboots_is_still_running_and_tells(booted: Any) -> None:
    async def test() -> None:
        machine, _ = await booted.machine()
        console = await machine.console()
        await console.write(b"reboot -f\n")
        async with asyncio.timeout(100):
            async for event in booted.qemu.subscribe(0):
                if event.type is EventType.GUEST_RESET and event.machine == machine.id:
                    break
        assert (await machine.status()).state is MachineState.RUNNING

    booted.run(test())


def test_killed_qemu_is_a_failed_machine_that_can_be_started_again(booted: Any) -> None:
    async def test() -> None:
        machine, _ = await booted.machine()
        channel = await machine.channel("test.echo")
        os.kill((await machine.info()).pid, signal.SIGKILL)
        assert await channel.read() == b""
        await state_becomes(machine, MachineState.FAILED)
        assert "signal 9" in machine.reason
        with pytest.raises(ChannelClosed):
            await channel.write(b"x")
        await channel.close()
        assert (await machine.status()).state is MachineState.FAILED
        await machine.start()
        assert machine.state is MachineState.RUNNING

    booted.run(test())


def test_channel_carries_any_bytes_both_ways(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        name = "/dev/virtio-ports/test.echo"
        await shell.run("head -c 300000 /dev/urandom > /tmp/sent")
        # A port can be opened once at a time.
        await shell.run(f"( exec 3<>{name}; cat /tmp/sent >&3; cat <&3 >/tmp/got ) & ")
        channel = await machine.channel("test.echo")
        with pytest.raises(OperationFailed, match="open already"):
            await machine.channel("test.echo")
        received = b""
        while len(received) < 300000:
            received += await channel.read()
        await channel.write(received)
        await shell.run("while ! cmp -s /tmp/sent /tmp/got; do usleep 50000; done")
        await channel.close()
        async with await machine.channel("test.echo"):
            pass
        for kind, there in ((machine.channel, "test.echo"), (machine.console, "serial")):
            with pytest.raises(ResourceNotFound) as missing:
                await kind("nope")
            assert missing.value.hint == f"it has {there}"

    booted.run(test())


# ------------------------------------------------------------------- devices


def test_disk_comes_and_goes_while_the_guest_runs_on(booted: Any, tmp_path: Path) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        async with Heartbeat(shell) as heartbeat:
            source = tmp_path / "source.raw"
            source.write_bytes(b"from the source".ljust(MIB, b"\0"))
            plugged = await machine.plug_disk(Disk(name="hot", source=source, serial="S1"))
            assert plugged.size == MIB
            await shell.run("while [ ! -b /dev/vdb ]; do usleep 20000; done")
            assert "from the source" in await shell.run(
                "head -c 15 /dev/vdb; cat /sys/block/vdb/serial"
            )
            await shell.run("echo changed | dd of=/dev/vdb conv=fsync 2>/dev/null")
            grown = await machine.resize_disk("hot", 4 * MIB)
            assert grown.size == 4 * MIB
            await shell.run("while [ $(cat /sys/block/vdb/size) != 8192 ]; do usleep 20000; done")
            await machine.plug_disk(Disk(name="ro", source=source, readonly=True, bus="scsi"))
            await shell.run(
                "while [ ! -b /dev/sdb ]; do usleep 20000; done; [ $(cat /sys/block/sdb/ro) = 1 ]"
            )
            with pytest.raises(OperationFailed, match="is an image that is only read"):
                await machine.resize_disk("ro", 2 * MIB)
            for name in ("hot", "ro"):
                await machine.unplug_disk(name)
            await shell.run("[ ! -b /dev/vdb ]")
            # QEMU does not wait for the guest to let go of a disk on a SCSI bus.
            await shell.run("while [ -b /dev/sdb ]; do usleep 20000; done")
            assert [disk.name for disk in (await machine.info()).disks] == ["data", "slow"]
            assert source.read_bytes().startswith(b"from the source")
            assert not plugged.path.exists()
            await heartbeat.goes_on()
        events = [event for event in await booted.qemu.events() if event.machine == machine.id]
        assert "paused" not in {event.data.get("to") for event in events}

    booted.run(test())


def test_disk_that_was_there_from_the_start_can_be_unplugged(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        await machine.unplug_disk("data")
        await machine.unplug_disk("slow")
        await shell.run("[ ! -b /dev/vda ]; while [ -b /dev/sda ]; do usleep 20000; done")

    booted.run(test())


def test_wrong_disk_is_refused_and_leaves_nothing(booted: Any, tmp_path: Path) -> None:
    async def test() -> None:
        machine, _ = await booted.machine()
        with pytest.raises(InvalidSpec, match="an image that can be read"):
            await machine.plug_disk(Disk(name="hot", source=tmp_path / "none.raw"))
        (tmp_path / "big.raw").write_bytes(bytes(2 * MIB))
        with pytest.raises(InvalidSpec, match="at least the 2097152 of its source"):
            await machine.plug_disk(Disk(name="hot", source=tmp_path / "big.raw", size=MIB))
        (tmp_path / "no.qcow2").write_bytes(b"nothing")
        with pytest.raises(OperationFailed, match="qemu-img info failed"):
            await machine.plug_disk(Disk(name="hot", source=tmp_path / "no.qcow2", format="qcow2"))
        assert [disk.name for disk in (await machine.info()).disks] == ["data", "slow"]
        assert sorted(path.name for path in machine.disk_directory.iterdir()) == [
            "data.0.qcow2",
            "slow.0.qcow2",
        ]

    booted.run(test())


def test_nic_comes_and_goes_and_segments_connect_machines(booted: Any) -> None:
    async def test() -> None:
        one, shell_one = await booted.machine()
        two, shell_two = await booted.machine()
        for machine, shell, number in ((one, shell_one, 1), (two, shell_two, 2)):
            plugged = await machine.plug_nic(Nic(name="hot", network="segment:other"))
            await shell.run("while [ ! -e /sys/class/net/eth2 ]; do usleep 20000; done")
            assert plugged.mac in await shell.run("cat /sys/class/net/eth2/address")
            await shell.run(f"ip addr add 10.9.0.{number}/24 dev eth2; ip link set eth2 up")
        before = (await one.metrics()).nics[-1]
        # A frame may be lost, as on a real segment.
        await shell_one.run(
            "n=0; until [ $n = 2 ]; do ping -c 1 -W 5 -s 1000 10.9.0.2 && n=$((n + 1)); done"
        )
        after = (await one.metrics()).nics[-1]
        assert after.name == "hot"
        assert after.sent_packets - before.sent_packets >= 2
        assert after.sent_bytes - before.sent_bytes >= 2 * 1000
        assert after.received_bytes - before.received_bytes >= 2 * 1000
        fault = await one.inject(NetPartition(nic="hot"))
        assert [nic.link for nic in (await one.info()).nics] == [True, True, False]
        await shell_one.run("! ping -c 1 -W 1 10.9.0.2")
        await one.clear_fault(fault)
        await one.clear_fault(fault)
        await shell_one.run("until ping -c 1 -W 5 10.9.0.2; do :; done")
        await one.unplug_nic("hot")
        await shell_one.run("[ ! -e /sys/class/net/eth2 ]")
        await one.plug_nic(Nic(name="dead", network="none"))
        assert not (await one.info()).nics[-1].link
        with pytest.raises(ResourceNotFound):
            await one.inject(NetPartition(nic="nope"))
        with pytest.raises(ResourceNotFound):
            await one.clear_fault("nope")

    booted.run(test())


def test_disk_errors_reach_the_guest_until_they_are_cleared(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        for disk, node in (("data", "/dev/vda"), ("slow", "/dev/sda")):
            write = f"dd if=/dev/zero of={node} bs=4k count=1 oflag=direct 2>/dev/null"
            await shell.run(write)
            fault = await machine.inject(DiskError(disk=disk, operation="write"))
            await shell.run(f"! {write}")
            await shell.run(f"dd if={node} of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null")
            await machine.clear_fault(fault)
            await shell.run(write)
        with pytest.raises(ResourceNotFound):
            await machine.inject(DiskError(disk="nope"))
        with pytest.raises(UnsupportedOperation, match="fault disk-error"):
            await machine.inject(DiskError(disk="data", when=Chance(probability=0.5)))

    booted.run(test())


def test_faults_in_time_begin_and_end_by_themselves(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        fault = await machine.inject(PauseFault(when=At(seconds=0.1), duration=0.3))
        await state_becomes(machine, MachineState.PAUSED)
        await state_becomes(machine, MachineState.RUNNING)
        async with asyncio.timeout(100):
            async for event in booted.qemu.subscribe(0):
                if event.type is EventType.FAULT_CLEARED and event.data == {"fault": fault}:
                    break
        never = await machine.inject(KillFault(when=At(seconds=600)))
        await machine.clear_fault(never)
        await shell.run("modprobe virtio_balloon; true")
        await machine.inject(MemoryPressure(leave=128 * MIB, id="squeeze"))
        await balloon_becomes(machine, 128 * MIB)
        await machine.clear_fault("squeeze")
        await balloon_becomes(machine, 192 * MIB)
        await machine.inject(KillFault(when=At(seconds=0.05)))
        await state_becomes(machine, MachineState.FAILED)

    booted.run(test())


def test_vcpus_are_bound_to_cpus_of_the_host(booted: Any) -> None:
    async def test() -> None:
        machine, _ = await booted.machine()
        allowed = sorted(os.sched_getaffinity(0))
        await machine.pin({1: (allowed[0],)})
        if len(allowed) > 1:
            assert (await machine.info()).pinning == {1: (allowed[0],)}
        with pytest.raises(OperationFailed, match="cannot be bound to the CPUs") as refused:
            await machine.pin({0: (1000,)})
        assert "this host lets us use" in refused.value.hint
        if len(allowed) > 1:
            assert (await machine.info()).pinning == {1: (allowed[0],)}
        await machine.pin({})
        assert (await machine.info()).pinning == {}

    booted.run(test())


# ------------------------------------------------------------------- saving and copying


def test_snapshot_brings_memory_and_disks_back_also_after_hot_plug(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        write = "echo {} > /tmp/f; echo {} | dd of=/dev/vda conv=fsync 2>/dev/null"
        await shell.run(write.format("first", "first"))
        taken = await machine.snapshot("one")
        assert (taken.memory, taken.state) == (True, MachineState.RUNNING)
        await shell.run(write.format("second", "second"))
        await machine.plug_disk(Disk(name="hot", size=MIB))
        await machine.snapshot("two")
        for name, content, disks in (
            ("one", "first", 2),
            ("two", "second", 3),
            ("one", "first", 2),
        ):
            await machine.restore(name)
            assert machine.state is MachineState.RUNNING
            assert (await shell.run("cat /tmp/f; head -c 20 /dev/vda | head -1")).split() == [
                content,
                content,
            ]
            assert len((await machine.info()).disks) == disks
        assert [kept.name for kept in await machine.snapshots()] == ["one", "two"]
        await machine.pause()
        await machine.snapshot("still")
        assert machine.state is MachineState.PAUSED
        await machine.kill()
        await machine.restore("still")
        assert (await machine.status()).state is MachineState.PAUSED
        await machine.resume()
        await shell.run("grep first /tmp/f")
        await machine.delete_snapshot("one")
        with pytest.raises(SnapshotNotFound):
            await machine.restore("one")

    booted.run(test())


def test_damaged_snapshot_is_refused_and_the_machine_runs_on(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        await shell.run("echo here > /tmp/f")
        taken = await machine.snapshot("one")
        directory = machine.snapshot_directory / "one"
        for path in sorted(directory.iterdir()):
            good = path.read_bytes()
            bad = bytearray(good)
            bad[len(bad) // 2] ^= 0x55
            path.write_bytes(bad)
            if path.name != "snapshot.json":
                with pytest.raises(CorruptSnapshot, match="is not what was written"):
                    await machine.restore("one")
                with pytest.raises(CorruptSnapshot):
                    await booted.qemu.create_from(taken, "copy")
            path.write_bytes(good)
        (directory / "state").unlink()
        with pytest.raises(CorruptSnapshot, match="cannot be read"):
            await machine.restore("one")
        await shell.run("grep here /tmp/f")
        other = taken.model_copy(update={"digest": "0" * 64})
        (directory / "state").write_bytes(b"")
        with pytest.raises(CorruptSnapshot):
            await booted.qemu.create_from(other, "copy")

    booted.run(test())


def test_forks_share_nothing_that_they_write(booted: Any) -> None:
    async def test() -> None:
        machine, shell = await booted.machine()
        write = "echo {0} > /tmp/f; echo {0} | dd of=/dev/vda conv=fsync 2>/dev/null"
        read = "cat /tmp/f; head -c 20 /dev/vda | head -1"
        await shell.run(write.format("parent"))
        child = await machine.fork("child")
        shell_of_child = type(shell)(child)
        assert (await shell_of_child.run(read)).split() == ["parent", "parent"]
        await shell_of_child.run(write.format("child"))
        await shell.run(write.format("later"))
        grandchild = await child.fork("grandchild")
        assert (await type(shell)(grandchild).run(read)).split() == ["child", "child"]
        assert (await shell.run(read)).split() == ["later", "later"]
        macs = [
            {nic.mac for nic in (await each.info()).nics} for each in (machine, child, grandchild)
        ]
        assert len(macs[0] | macs[1] | macs[2]) == 6
        assert (await child.info()).name == "child"

    booted.run(test())


# ------------------------------------------------------------------- moving


def test_live_migration_takes_everything_along_with_progress(booted: Any, new_bench: Any) -> None:
    there = new_bench()

    async def test() -> None:
        machine, shell = await booted.machine()
        await shell.run("echo moved > /tmp/f; echo moved | dd of=/dev/vda conv=fsync 2>/dev/null")
        async with Heartbeat(shell) as heartbeat:
            await machine.snapshot("one")
            told: list[tuple[int, int]] = []
            moved = await machine.migrate(
                there.qemu, progress=lambda *amounts: told.append(amounts)
            )
            assert machine.state is MachineState.DELETED
            assert not machine.directory.exists()
            assert (moved.id, moved.state) == (machine.id, MachineState.RUNNING)
            arrived = type(shell)(moved)
            assert (await arrived.run("cat /tmp/f; head -c 20 /dev/vda | head -1")).split() == [
                "moved"
            ] * 2
            heartbeat.shell = arrived
            await heartbeat.goes_on()
        assert told[-1][0] > MIB
        assert [kept.name for kept in await moved.snapshots()] == ["one"]
        assert len(await (await moved.console()).log()) > 0
        await moved.restore("one")
        await type(shell)(moved).run("grep moved /tmp/f")
        await there.qemu.close()

    booted.run(test())
    there.lease.close()


def test_live_migration_copies_disks_where_they_cannot_be_shared(
    booted: Any, new_bench: Any
) -> None:
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shared is None or shared.stat().st_dev == Path(booted.bench.lease.directory).stat().st_dev:
        pytest.skip("needs /dev/shm, on another file system than the temporary directory")
    elsewhere = Home.open(Path(tempfile.mkdtemp(prefix="vmlab-", dir=shared)))
    there = new_bench(elsewhere)

    async def test() -> None:
        machine, shell = await booted.machine()
        await shell.run("echo moved | dd of=/dev/vda conv=fsync 2>/dev/null")
        moved = await machine.migrate(there.qemu)
        arrived = type(shell)(moved)
        assert "moved" in await arrived.run(
            "dd if=/dev/vda bs=4k count=1 iflag=direct 2>/dev/null | head -1"
        )
        await arrived.run("echo again | dd of=/dev/vda conv=fsync 2>/dev/null")
        await moved.stop(graceful=False)
        moved_again = await moved.migrate(booted.qemu)
        assert moved_again.state is MachineState.STOPPED
        await there.qemu.close()

    try:
        booted.run(test())
    finally:
        there.lease.close()
        shutil.rmtree(elsewhere.directory)


def test_cancelled_and_failed_migrations_leave_the_machine_where_it_was(
    booted: Any, new_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = new_bench()
    # Slow enough for every cancellation to come in the middle, on any host.
    monkeypatch.setattr(migration, "BANDWIDTH", 1 << 20)

    async def test() -> None:
        machine, shell = await booted.machine()
        await shell.run("echo stays > /tmp/f")
        for delay in (0.0, 0.15, 0.4):
            moving = asyncio.create_task(machine.migrate(there.qemu))
            await asyncio.sleep(delay)
            moving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await moving
            assert machine.state is MachineState.RUNNING
            await shell.run("grep stays /tmp/f")
            assert await there.qemu.list() == []

        async def nowhere(target: Any) -> str:
            return "unix:/nowhere/at/all"

        monkeypatch.setattr(migration, "listen", nowhere)
        with pytest.raises(MigrationFailed):
            await machine.migrate(there.qemu)
        await shell.run("grep stays /tmp/f")
        assert (await machine.status()).state is MachineState.RUNNING
        # TCG loses what is written while memory is sent: the guest stands still until it is over.
        log = (machine.emulator.directory / "qmp.log").read_text()
        sent = re.findall(r'> \{"execute": "(stop|migrate|cont)"', log)
        assert sent[-3:] == ["stop", "migrate", "cont"]
        assert await there.qemu.list() == []
        assert there.qemu.records.ids() == []
        await there.qemu.close()

    booted.run(test())
    there.lease.close()

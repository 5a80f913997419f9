"""What a machine is made of and what it uses, read back from its process over QMP."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmlab.hypervisors.base import DiskInfo
from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.monitored.names import disk_device
from vmlab.machine.architecture import Architecture
from vmlab.machine.metrics import CpuMetrics, DiskMetrics, MachineMetrics, MemoryMetrics

_TARGETS: Final = {
    "x86_64": Architecture.X86_64,
    "riscv64": Architecture.RISCV64,
    "aarch64": Architecture.AARCH64,
    "ppc64": Architecture.PPC64LE,
}
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Vcpu:
    """A vCPU: its number, the host's thread that runs it, its NUMA node."""

    number: int
    thread: int
    node: int | None


async def vcpus(emulator: Emulator) -> list[Vcpu]:
    """The vCPUs, in their order."""
    found = await emulator.execute("query-cpus-fast")
    return [
        Vcpu(cpu["cpu-index"], cpu["thread-id"], cpu.get("props", {}).get("node-id"))
        for cpu in sorted(found, key=lambda cpu: int(cpu["cpu-index"]))
    ]


async def architecture(emulator: Emulator) -> Architecture:
    """The guest's architecture."""
    return _TARGETS[(await emulator.execute("query-target"))["arch"]]


async def memory_size(emulator: Emulator) -> int:
    """Bytes of the guest's memory, what was plugged in included."""
    found = await emulator.execute("query-memory-size-summary")
    return int(found["base-memory"]) + int(found.get("plugged-memory", 0))


async def name(emulator: Emulator) -> str:
    """The machine's name."""
    return str((await emulator.execute("query-name")).get("name", ""))


async def disks(emulator: Emulator) -> list[DiskInfo]:
    """The disks that have a device, by the device's id."""
    found = []
    for block in await emulator.execute("query-block"):
        device = _device_of(block.get("qdev", ""))
        inserted = block.get("inserted")
        if inserted is None or not device.startswith(disk_device("")):
            continue
        path = inserted.get("image", {}).get("filename") or inserted.get("file")
        found.append(
            DiskInfo(
                name=device.removeprefix(disk_device("")),
                size=inserted["image"]["virtual-size"],
                bus="virtio" if "virtio-backend" in block["qdev"] else "scsi",
                readonly=inserted["ro"],
                path=Path(path),
            )
        )
    return found


def _device_of(path: str) -> str:
    """The id of a device out of its path in QEMU's object tree, or the id as it stands."""
    return path.removeprefix("/machine/peripheral/").partition("/")[0]


async def labels(emulator: Emulator, kind: str) -> tuple[str, ...]:
    """Names of the consoles ("con") or channels ("chan"), in the order of their names."""
    found = [str(chardev["label"]) for chardev in await emulator.execute("query-chardev")]
    return tuple(
        sorted(label.removeprefix(f"{kind}-") for label in found if label.startswith(f"{kind}-"))
    )


# ------------------------------------------------------------------- metrics


async def metrics(emulator: Emulator, now: float) -> MachineMetrics:
    """What the machine uses."""
    cpus = await vcpus(emulator)
    # vCPUs that take turns have one thread; what each of them used of it nobody knows.
    threads = {cpu.thread for cpu in cpus}
    seconds = {thread: _thread_seconds(emulator.process.pid, thread) for thread in threads}
    each = tuple(seconds[cpu.thread] for cpu in cpus) if len(threads) == len(cpus) else ()
    return MachineMetrics(
        time=now,
        uptime_seconds=max(0.0, _uptime(emulator.process.pid)),
        cpu=CpuMetrics(seconds=sum(seconds.values()), per_vcpu_seconds=each),
        memory=MemoryMetrics(
            total_bytes=await memory_size(emulator),
            resident_bytes=_resident(emulator.process.pid),
            balloon_bytes=int((await emulator.execute("query-balloon"))["actual"]),
        ),
        disks=tuple(await disk_metrics(emulator)),
    )


async def disk_metrics(emulator: Emulator) -> list[DiskMetrics]:
    """The traffic of each disk."""
    found = []
    for block in await emulator.execute("query-blockstats"):
        device = _device_of(block.get("qdev", ""))
        if not device.startswith(disk_device("")):
            continue
        stats = block["stats"]
        found.append(
            DiskMetrics(
                name=device.removeprefix(disk_device("")),
                read_bytes=stats["rd_bytes"],
                written_bytes=stats["wr_bytes"],
                reads=stats["rd_operations"],
                writes=stats["wr_operations"],
                flushes=stats["flush_operations"],
                errors=stats["failed_rd_operations"]
                + stats["failed_wr_operations"]
                + stats["failed_flush_operations"],
            )
        )
    return found


def _stat(path: str) -> list[bytes]:
    """The fields of a proc(5) stat file from the third one (the state) on."""
    text = Path(path).read_bytes()
    return text[text.rindex(b")") + 2 :].split()


def _thread_seconds(pid: int, thread: int) -> float:
    """CPU seconds of a thread, in user mode and in the kernel (fields 14 and 15)."""
    fields = _stat(f"/proc/{pid}/task/{thread}/stat")
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _uptime(pid: int) -> float:
    """Seconds since a process began (field 22, in ticks since boot)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(f"/proc/{pid}/stat")[19]) / _TICKS


def _resident(pid: int) -> int:
    """Bytes of a process that are in memory (proc(5), statm)."""
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * _PAGE

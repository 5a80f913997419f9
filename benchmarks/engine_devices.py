"""Disk and network of the embedded engine beside QEMU's TCG: megabytes a CPU second.

Two machines of each, the same kernel and initramfs, virtio-mmio devices: a raw disk, and a NIC on a
stream between the two. In turn, each reads and writes its disk past the page cache in large and
small pieces, and sends TCP to its neighbour. What counts is CPU seconds of the processes that take
part; the medians of the ratios of interleaved rounds are printed. There is no limit.

    python benchmarks/engine_devices.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from boot import MACHINES
from engine_boot import MEMORY

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.command import Command
from vmlab.hypervisors.monitored.streams import SocketChannel
from vmlab.images.image import Image
from vmlab.images.store.store import ImageStore
from vmlab.machine.architecture import Architecture

Make = Callable[[Image, Path, int, Path], list[str]]
DISK = 64 << 20
MAC = "52:54:00:00:00:0"
ADDRESS = "192.168.7."
PATIENCE = 600.0


@dataclass(frozen=True)
class Kernel:
    """A measured transfer: what the first machine runs, and its neighbour before and after it."""

    name: str
    megabytes: float
    command: str
    neighbour: str = ""
    arrived: str = ""


KERNELS = (
    Kernel("disk: write, 1 MiB", 64, "dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct"),
    Kernel("disk: read, 1 MiB", 64, "dd if=/dev/vda of=/dev/null bs=1M iflag=direct"),
    Kernel("disk: read, 4 KiB", 8, "dd if=/dev/vda of=/dev/null bs=4k count=2048 iflag=direct"),
    Kernel(
        "net: TCP, two guests",
        16,
        f"until dd if=/dev/zero bs=64k count=256 | nc {ADDRESS}2 5000; do sleep 0.1; done",
        # Input that does not end: at its end nc does.
        "rm -f /run/n /run/f; mkfifo /run/f; "
        "(nc -l -p 5000 <>/run/f | wc -c >/run/n) >/dev/null 2>&1 </dev/null &",
        f"until [ -s /run/n ]; do sleep 0.1; done; [ $(cat /run/n) = {16 << 20} ]",
    ),
)


class Machine:
    """A guest in a process, reached by its agent."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(command, cwd=directory)
        self.agent = AgentChannel(self._open)

    async def _open(self, name: str) -> SocketChannel:
        path = self.directory / name
        while not path.exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"the process ended with status {self.process.returncode}")
            await asyncio.sleep(0.02)
        return await SocketChannel.open(name, "vm", path)

    async def run(self, command: str) -> None:
        """Run a command that has to succeed."""
        said = bytearray()

        async def take(data: bytes) -> None:
            said.extend(data)

        status = await asyncio.wait_for(
            self.agent.run(Command(command), stdout=take, stderr=take), PATIENCE
        )
        if status != 0:
            raise RuntimeError(f"{command}: status {status}: {said.decode(errors='replace')}")

    def seconds(self) -> float:
        """CPU seconds so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


def engine(image: Image, directory: Path, number: int, segment: Path) -> list[str]:
    """The engine's command line; the machine's file is written."""
    side = "stream-server" if number == 1 else "stream-client"
    lines = [f'name = "vm"\nmemory = {MEMORY}\nqmp = "qmp"']
    lines += [f'[boot]\nkernel = "{image.kernel}"\ninitrd = "{image.initrd}"']
    lines += [f'cmdline = "console=ttyS0 {image.cmdline}"']
    lines += ['[[disks]]\nname = "disk"\nfile = "disk.raw"']
    lines += [f'[[nics]]\nname = "net"\nmac = "{MAC}{number}"\nsegment = "{side}"']
    lines += [f'path = "{segment}"']
    lines += [f'[[channels]]\nname = "{port}"\nsocket = "{port}"' for port in CHANNELS]
    (directory / "machine.toml").write_text("\n".join(lines))
    return [sys.executable, "-m", "vmlab.engine", "machine.toml"]


def qemu(image: Image, directory: Path, number: int, segment: Path) -> list[str]:
    """QEMU's command line for the same machine."""
    server = "on" if number == 1 else "off"
    command = [
        *MACHINES[Architecture.RISCV64],
        *("-accel", "tcg", "-m", str(MEMORY >> 20), "-display", "none", "-nodefaults"),
        *("-no-user-config", "-global", "virtio-mmio.force-legacy=false"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", f"console=ttyS0 {image.cmdline}", "-serial", "null"),
        *("-drive", "if=none,id=disk,format=raw,file=disk.raw"),
        *("-device", "virtio-blk-device,drive=disk"),
        *("-netdev", f"stream,id=net,server={server},addr.type=unix,addr.path={segment}"),
        *("-device", f"virtio-net-device,netdev=net,mac={MAC}{number}"),
        *("-device", "virtio-serial-device"),
    ]
    for index, name in enumerate(CHANNELS):
        command += ["-chardev", f"socket,id=c{index},path={name},server=on,wait=off"]
        command += ["-device", f"virtserialport,chardev=c{index},name={name}"]
    return command


@contextlib.contextmanager
def machines(make: Make, image: Image, folder: Path) -> Iterator[list[Machine]]:
    """Two machines of a kind."""
    with contextlib.ExitStack() as stack:
        made: list[Machine] = []
        for number in (1, 2):
            directory = folder / str(number)
            directory.mkdir(parents=True)
            with (directory / "disk.raw").open("wb") as disk:
                disk.truncate(DISK)
            segment = folder / "net"
            made.append(Machine(make(image, directory, number, segment), directory))
            stack.callback(made[-1].process.wait)
            stack.callback(made[-1].process.kill)
            while number == 1 and not segment.exists():
                if made[0].process.poll() is not None:
                    raise RuntimeError("the first machine has ended")
                time.sleep(0.05)
        yield made


async def measured(pair: list[Machine], kernel: Kernel) -> float:
    """CPU seconds of one transfer, of all that take part."""
    busy = pair if kernel.neighbour else pair[:1]
    if kernel.neighbour:
        await pair[1].run(kernel.neighbour)
    before = sum(one.seconds() for one in busy)
    await pair[0].run(kernel.command)
    if kernel.arrived:
        await pair[1].run(kernel.arrived)
    return sum(one.seconds() for one in busy) - before


async def compare(pairs: dict[str, list[Machine]], rounds: int) -> None:
    """Run all kernels and print the table."""
    for made in pairs.values():
        for number, one in enumerate(made, 1):
            await one.agent.connect(timeout=PATIENCE)
            await one.run(f"ip addr add {ADDRESS}{number}/24 dev eth0 && ip link set eth0 up")
    print(f"{'':22} {'engine':>12} {'QEMU TCG':>12} {'ratio':>7}   (MB a CPU second)")
    for kernel in KERNELS:
        samples = [
            {name: await measured(made, kernel) for name, made in pairs.items()}
            for _ in range(rounds)
        ]
        ours, theirs = (
            kernel.megabytes / statistics.median(one[name] for one in samples) for name in pairs
        )
        ratio = statistics.median(one["QEMU TCG"] / one["engine"] for one in samples)
        print(f"{kernel.name:22} {ours:12.1f} {theirs:12.1f} {ratio:7.2f}", flush=True)
    for made in pairs.values():
        for one in made:
            await one.agent.close()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    image = ImageStore().ensure("debian-13-riscv64-tiny")
    with (
        tempfile.TemporaryDirectory(prefix="devices-") as folder,
        machines(engine, image, Path(folder, "e")) as ours,
        machines(qemu, image, Path(folder, "q")) as theirs,
    ):
        asyncio.run(compare({"engine": ours, "QEMU TCG": theirs}, arguments.rounds))
    print(f"medians of {arguments.rounds} interleaved rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the guest agent costs beside qemu-ga: round trips and copies, on guests that QEMU emulates.

    python benchmarks/agent.py [--rounds N] [IMAGE...]

Without images: vmlab's agent in the tiny images of amd64 and riscv64, and qemu-ga in the tiny amd64
image that has it. All guests are booted first and then measured in turns, one at a time while the
others are paused, so that each has the same share of this host. A guest's memory is touched once
before, since the first touch is the host's work. Rates are of whole `copy_in` and `copy_out` calls
of one file. Ends with status 1 if a median of round trips or rates breaks a promise of the agent.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.command import CommandChannel
from vmlab.guests.guest import Guest
from vmlab.guests.qga import PORT, QgaChannel
from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Hypervisor
from vmlab.hypervisors.ownership import Run
from vmlab.images import ImageStore
from vmlab.machine.spec import MachineSpec

IMAGES = ("debian-12-amd64-tiny", "debian-13-riscv64-tiny", "debian-12-amd64-tiny-qga")
MEGABYTE = 1_000_000
SIZE = {"agent": 32 * MEGABYTE, "qga": 4 * MEGABYTE}
ROUND_TRIPS = 30
"""In each round; the percentiles are of those of all rounds."""

PROMISED_ROUND_TRIP = 15.0
"""Milliseconds, median."""

PROMISED_RATE = 40.0
"""MB/s each way, median."""

PATIENCE = 600.0


class Subject:
    """One booted guest and what was measured of it."""

    def __init__(self, name: str, guest: Guest) -> None:
        self.name = name
        self.guest = guest
        self.agent = guest.channel.name
        self.trips: list[float] = []
        self.rates: dict[str, list[float]] = {"in": [], "out": []}

    async def measure(self, directory: Path) -> None:
        """One round: round trips, then a file in and out again."""
        size = SIZE[self.agent]
        source, back = directory / f"{self.agent}-in", directory / "out"
        if not source.exists():
            source.write_bytes(os.urandom(size))
        for _ in range(ROUND_TRIPS):
            result = await self.guest.execute("true", timeout=PATIENCE)
            self.trips.append(result.seconds * 1000)
        for way, copy in (
            ("in", self.guest.copy_in(source, "/tmp/file", timeout=PATIENCE)),
            ("out", self.guest.copy_out("/tmp/file", back, timeout=PATIENCE)),
        ):
            begun = time.monotonic()
            await copy
            self.rates[way].append(size / MEGABYTE / (time.monotonic() - begun))
        back.unlink()
        await self.guest.succeed("rm /tmp/file", timeout=PATIENCE)

    def report(self) -> bool:
        """Print what was measured; whether it is as promised."""
        figures = {"round trip": (self.trips, "ms", 95), "copy in": (self.rates["in"], "MB/s", 5)}
        figures["copy out"] = (self.rates["out"], "MB/s", 5)
        for what, (values, unit, worse) in figures.items():
            print(
                f"{self.name:26} {self.agent:6} {what:11} p50 {statistics.median(values):7.1f}  "
                f"p{worse:<2} {percentile(values, worse):7.1f} {unit}"
            )
        return self.agent != "agent" or (
            statistics.median(self.trips) < PROMISED_ROUND_TRIP
            and all(statistics.median(rates) >= PROMISED_RATE for rates in self.rates.values())
        )


def percentile(values: list[float], share: int) -> float:
    """The value that `share` percent of `values` do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


async def boot(hypervisor: Hypervisor, name: str) -> Subject:
    """Boot an image, wait until it answers, touch its memory, and pause it."""
    image = ImageStore().ensure(name)
    own = "agent" in image.channels
    spec = MachineSpec.of(
        name=name,
        architecture=image.architecture,
        memory="512M",
        boot={"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline},
        channels=CHANNELS if own else (PORT,),
    )
    machine = await hypervisor.create(spec)
    await machine.start()
    channel: CommandChannel = (AgentChannel if own else QgaChannel)(machine.channel)
    guest = Guest(machine, channel)
    await guest.connect(timeout=PATIENCE)
    await guest.execute(
        "dd if=/dev/zero of=/tmp/touched bs=1M count=300; rm /tmp/touched", timeout=PATIENCE
    )
    await machine.pause()
    return Subject(name, guest)


async def main(images: list[str], rounds: int) -> int:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmlab-bench-")))
        run = stack.enter_context(Run.begin())
        hypervisor = await stack.enter_async_context(registry.provider("qemu").open(run.owner))
        subjects = [await boot(hypervisor, name) for name in images]
        for _ in range(rounds):
            for subject in subjects:
                await subject.guest.machine.resume()
                await subject.measure(directory)
                await subject.guest.machine.pause()
        print(f"{rounds} rounds in turns; load average {os.getloadavg()[0]:.1f}")
        kept = [subject.report() for subject in subjects]
        for subject in subjects:
            await subject.guest.close()
    return 0 if all(kept) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", default=list(IMAGES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.images, arguments.rounds)))

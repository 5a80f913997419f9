"""Wall seconds of forks: of a running machine, of a template, and of forks of those.

A tiny Debian guest on TCG. "template" is a paused machine that was forked before, so that its
memory is there to be mapped; "fork of a template" is the same of a fork; "running" stops a running
machine, copies its memory and lets it run on; "fork of a fork" does that to a running fork. Beside
each, the seconds that a process of the same QEMU takes to start and answer, which every fork pays.

    python benchmarks/fork.py [--count 7] [--image NAME] [--memory 512M] [--limit 1.0]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.guest import Guest
from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.ownership import Home, Run
from vmlab.hypervisors.qemu import QemuHypervisor, provider
from vmlab.images.store.store import ImageStore
from vmlab.machine.spec import MachineSpec


async def seconds(work: Awaitable[object]) -> float:
    """Wall seconds of some work."""
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun


class Forks:
    """A booted machine and what is measured of it."""

    def __init__(self, qemu: QemuHypervisor, machine: Machine) -> None:
        self.qemu = qemu
        self.machine = machine
        self.count = 0

    async def fork(self, origin: Machine) -> tuple[Machine, float]:
        """A fork, and how long it took."""
        self.count += 1
        begun = time.perf_counter()
        fork = await origin.fork(f"fork{self.count}")
        return fork, time.perf_counter() - begun

    async def once(self, origin: Machine) -> float:
        """How long a fork takes, which goes again."""
        fork, took = await self.fork(origin)
        await fork.delete(force=True)
        return took

    async def running(self) -> float:
        return await self.once(self.machine)

    async def fork_of_a_fork(self) -> float:
        fork, _ = await self.fork(self.machine)
        guest = Guest(fork, AgentChannel(fork.channel))
        await guest.connect()
        await guest.succeed("head -c 4000000 /dev/urandom > /tmp/written")
        await guest.close()
        took = await self.once(fork)
        await fork.delete(force=True)
        return took

    async def bare(self) -> float:
        """A process that is started and speaks QMP."""
        spec = self.machine.spec.renamed("bare")
        bare = await self.qemu.create(spec)
        took = await seconds(bare.start())
        await bare.delete(force=True)
        return took


async def measured(arguments: argparse.Namespace, home: Path) -> dict[str, list[float]]:
    """Seconds of each kind of fork, interleaved."""
    image = ImageStore().ensure(arguments.image)
    boot = {"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline}
    spec = MachineSpec.of(
        name="origin",
        architecture=image.architecture,
        memory=arguments.memory,
        boot=boot,
        channels=CHANNELS,
        disks=[{"name": "data", "size": "64M"}],
        nics=[{"name": "net"}],
    )
    lease = Run.begin(Home.open(home), reap=False)
    try:
        async with provider.open(lease.owner) as qemu:
            machine = await qemu.create(spec)
            await machine.start()
            guest = Guest(machine, AgentChannel(machine.channel))
            await guest.connect()
            await guest.close()
            forks = Forks(qemu, machine)
            paused, _ = await forks.fork(machine)
            await paused.pause()
            generation, _ = await forks.fork(paused)
            kinds: dict[str, Callable[[], Awaitable[float]]] = {
                "a process alone": forks.bare,
                "template": lambda: forks.once(paused),
                "fork of a template": lambda: forks.once(generation),
                "running": forks.running,
                "fork of a fork": forks.fork_of_a_fork,
            }
            await forks.once(generation)
            samples: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(arguments.count):
                for kind, measure in kinds.items():
                    samples[kind].append(await measure())
            return samples
    finally:
        lease.close()


def main() -> int:
    """Print the table; exit status 1 where a median is above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=7)
    parser.add_argument("--image", default="debian-12-amd64-tiny")
    parser.add_argument("--memory", default="512M")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds, of each median")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fork-") as home:
        samples = asyncio.run(measured(arguments, Path(home)))
    print(f"{'fork of':20} {'median s':>9} {'least':>6} {'most':>6}")
    for kind, took in samples.items():
        print(f"{kind:20} {statistics.median(took):9.2f} {min(took):6.2f} {max(took):6.2f}")
    print(f"{arguments.count} of each, interleaved; at most {arguments.limit} s each")
    worst = max(statistics.median(took) for took in samples.values())
    return 0 if worst <= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main())

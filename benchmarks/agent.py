"""What the guest agent costs: round trips and copies, on a guest that QEMU emulates.

    python benchmarks/agent.py [debian-12-amd64-tiny|debian-13-riscv64-tiny]

Prints one line for each figure with the median and the 95th percentile. Copies are measured when
the guest has touched its memory once, since the first touch is the host's work and not the agent's.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.guest import Guest
from vmlab.hypervisors import registry
from vmlab.hypervisors.ownership import Run
from vmlab.images import ImageStore
from vmlab.machine.spec import MachineSpec

MIB = 1 << 20
SIZE = 64 * MIB
ROUNDS = 200
COPIES = 5


def line(name: str, values: list[float], unit: str) -> None:
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    print(f"{name:28} p50 {statistics.median(ordered):8.1f}  p95 {high:8.1f} {unit}")


async def measure(guest: Guest) -> None:
    for command in ("true", "/bin/true"):
        times = [(await guest.execute(command)).seconds * 1000 for _ in range(ROUNDS)]
        line(f"round trip of {command}", times, "ms")
    data = os.urandom(SIZE)
    rates: dict[str, list[float]] = {"in, to a file": [], "in, to nowhere": [], "out": []}
    for number in range(COPIES + 1):
        for name, command, given in (
            ("in, to a file", "cat >/tmp/file", data),
            ("in, to nowhere", "cat >/dev/null", data),
            ("out", "cat /tmp/file", None),
        ):
            begun = time.monotonic()
            await guest.execute(command, input=given)
            if number:
                rates[name].append(SIZE / MIB / (time.monotonic() - begun))
    for name, values in rates.items():
        line(f"copy {name}", values, "MiB/s")


async def main(image_name: str) -> None:
    image = ImageStore().ensure(image_name)
    with Run.begin() as run:
        async with registry.provider("qemu").open(run.owner) as hypervisor:
            spec = MachineSpec.of(
                name="bench",
                architecture=image.architecture,
                memory="512M",
                boot={"kernel": image.kernel, "initrd": image.initrd, "cmdline": image.cmdline},
                channels=CHANNELS,
            )
            machine = await hypervisor.create(spec)
            await machine.start()
            guest = Guest(machine, AgentChannel(machine.channel))
            begun = time.monotonic()
            await guest.connect()
            print(f"{image_name}: agent answered after {time.monotonic() - begun:.1f} s")
            await measure(guest)
            await guest.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "debian-12-amd64-tiny"))

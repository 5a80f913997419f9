"""What the simulator costs: CPU time of whole machine lives, and memory of many machines.

Two promises are measured, each in a process of its own, on one core and on the virtual clock: at
least 10,000 lifecycles (create, start, pause, resume, snapshot, stop, delete) a minute, and 1,000
machines running at once under 300 MB of resident memory. Beside them stand a bare loop of the same
number of awaits on the same clock, and a bare interpreter, measured in the same minute.

    python benchmarks/simulated.py [--lifecycles 2000] [--machines 1000] [--runs 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

LEAST_LIFECYCLES = 10_000
"""A minute of CPU time on one core."""
MOST_MEMORY = 300
"""MB (10^6 bytes) of resident memory."""
AT_ONCE = 50
"""Lifecycles that run at the same time."""
OPERATIONS = 7


def lifecycles(count: int) -> float:
    """CPU seconds of `count` machine lives."""
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.simulated import provider
    from vmlab.machine.spec import MachineSpec

    hypervisor = provider.open(
        Owner("run", "benchmark", Path()), {"profile": "performance", "seed": "1"}
    )

    async def life(turn: int) -> None:
        spec = MachineSpec.of(name=f"m{turn}", memory="128M", disks=[{"name": "d", "size": "1G"}])
        machine = await hypervisor.create(spec)
        await machine.start()
        await machine.pause()
        await machine.resume()
        await machine.snapshot("s")
        await machine.stop()
        await machine.delete()

    async def worker(turns: list[int]) -> None:
        while turns:
            await life(turns.pop())

    async def all_of_them() -> float:
        turns = list(range(count))
        async with hypervisor:
            began = time.process_time()
            await asyncio.gather(*(worker(turns) for _ in range(AT_ONCE)))
            return time.process_time() - began

    with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
        return runner.run(all_of_them())


def bare(count: int) -> float:
    """CPU seconds of as many timed waits on the same clock, with nothing behind them."""
    from vmlab.hypervisors.simulated.clock import VirtualClockLoop

    async def waits() -> None:
        for _ in range(count * OPERATIONS // AT_ONCE):
            async with asyncio.timeout(60):
                await asyncio.sleep(0.1)

    async def all_of_them() -> float:
        began = time.process_time()
        await asyncio.gather(*(waits() for _ in range(AT_ONCE)))
        return time.process_time() - began

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(all_of_them())


def machines(count: int) -> float:
    """MB of resident memory, at the most, while `count` machines run and have disks and NICs."""
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.simulated import provider
    from vmlab.machine.spec import MachineSpec
    from vmlab.machine.states import MachineState

    hypervisor = provider.open(
        Owner("run", "benchmark", Path()), {"profile": "performance", "seed": "1"}
    )

    async def begin(turn: int) -> None:
        spec = MachineSpec.of(
            name=f"m{turn}",
            memory="128M",
            disks=[{"name": "d", "size": "1G"}],
            nics=[{"name": "n", "network": "segment:rack"}],
        )
        await (await hypervisor.create(spec)).start()

    async def all_of_them() -> None:
        async with hypervisor:
            await asyncio.gather(*map(begin, range(count)))
            running = [machine.state is MachineState.RUNNING for machine in await hypervisor.list()]
            if running != [True] * count:
                raise RuntimeError(f"{sum(running)} of {count} machines run")

    with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
        runner.run(all_of_them())
    return peak_memory()


def interpreter(_count: int) -> float:
    """MB of resident memory of an interpreter that does nothing."""
    return peak_memory()


def peak_memory() -> float:
    """MB of resident memory of this process, at the most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


MEASUREMENTS = {
    measurement.__name__: measurement for measurement in (lifecycles, bare, machines, interpreter)
}


def in_child(measurement: str, count: int) -> float:
    """The result of one measurement in a fresh process."""
    # Measured with what a user has, not with what a test run has added.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
    }
    command = [sys.executable, __file__, "--measure", measurement, "--count", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(json.loads(done.stdout))


def main() -> int:
    """Print the table; exit status 1 where a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lifecycles", type=int, default=2000)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(MEASUREMENTS[arguments.measure](arguments.count)))
        return 0
    found: dict[str, list[float]] = {name: [] for name in MEASUREMENTS}
    for _ in range(arguments.runs):
        for name in ("lifecycles", "bare"):
            found[name].append(in_child(name, arguments.lifecycles))
        for name in ("machines", "interpreter"):
            found[name].append(in_child(name, arguments.machines))
    median = {name: statistics.median(values) for name, values in found.items()}
    rate = arguments.lifecycles * 60 / median["lifecycles"]
    empty = arguments.lifecycles * 60 / median["bare"]
    print(f"medians of {arguments.runs} runs, each in a process of its own, in turns")
    print(f"{'lifecycles a minute of CPU':<42}{rate:>10,.0f}   at least {LEAST_LIFECYCLES:,}")
    print(f"{'  the same waits with nothing behind them':<42}{empty:>10,.0f}")
    resident = f"MB resident with {arguments.machines:,} machines"
    print(f"{resident:<42}{median['machines']:>10,.0f}   at most {MOST_MEMORY}")
    print(f"{'  a bare interpreter':<42}{median['interpreter']:>10,.0f}")
    return 0 if rate >= LEAST_LIFECYCLES and median["machines"] <= MOST_MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())

"""From the start of an engine process to its guest's first instructions, beside QEMU's TCG.

The guest powers its machine off at once: four instructions. The engine is done when it says so on
standard error, QEMU when it has ended; a Python that does nothing is what no engine can be faster
than. The interpreter has been compiled before, and Python's modules are (a warm cache, of the
benchmark's own); the machine has a console, a channel and a SCSI host. Wall and CPU seconds,
medians, in turns. What counts is CPU seconds, to the engine's end: on an idle host the wall's are
fewer, on a busy one they say nothing.

    python benchmarks/engine_start.py [--rounds 15] [--limit 0.15]
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from boot import compiled

from vmlab.engine.accel.interpreter import prepare

MACHINE = """
name = "vm"
memory = 268435456
qmp = "qmp"
[boot]
kernel = "guest"
[serial]
socket = "serial"
[[channels]]
name = "org.example.0"
socket = "channel"
"""
# lui t0, 0x100; lui t1, 5; addi t1, t1, 0x555; sw t1, (t0): the test finisher's power-off; j .
GUEST = struct.pack("<5I", 0x001002B7, 0x00005337, 0x55530313, 0x0062A023, 0x0000006F)


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def engine(folder: Path) -> float:
    """Seconds until the guest's power-off is noticed."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "vmlab.engine", folder / "machine.toml"],
        stderr=subprocess.PIPE,
        env=compiled(folder / "modules"),
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        wall = time.monotonic() - begun
        process.stderr.read()
        if process.wait(60) != 0 or not said.startswith(b"poweroff"):
            raise RuntimeError(f"the engine said {said!r}")
    finally:
        process.kill()
        process.communicate()
    return wall


def ended(command: list[str | Path]) -> float:
    """Seconds until a command has ended."""
    begun = time.monotonic()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)
    return time.monotonic() - begun


def main() -> int:
    """Print the figures; exit status 1 where the engine takes longer than the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=0.15, help="CPU seconds, the median")
    arguments = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        folder = Path(name)
        (folder / "guest").write_bytes(GUEST)
        (folder / "machine.toml").write_text(MACHINE)
        qemu = ["qemu-system-riscv64", "-M", "virt", "-m", "256M", "-nographic", "-nodefaults"]
        runs: dict[str, Callable[[], float]] = {"engine": lambda: engine(folder)}
        if shutil.which(qemu[0]):
            runs["QEMU TCG"] = lambda: ended([*qemu, "-bios", folder / "guest"])
        runs["python"] = lambda: ended([sys.executable, "-c", "pass"])
        walls: dict[str, list[float]] = {each: [] for each in runs}
        cpus: dict[str, list[float]] = {each: [] for each in runs}
        for number in range(-1, arguments.rounds):
            for each, run in runs.items():
                before = cpu_seconds()
                wall = run()
                if number >= 0:  # the first round compiles modules and reads files
                    walls[each].append(wall)
                    cpus[each].append(cpu_seconds() - before)
    for each in runs:
        wall, cpu = statistics.median(walls[each]), statistics.median(cpus[each])
        print(f"{each:10} {wall:6.3f} s wall {cpu:6.3f} s CPU  (best {min(walls[each]):.3f} wall)")
    taken = statistics.median(cpus["engine"])
    load = os.getloadavg()[0]
    print(
        f"medians of {arguments.rounds}, load average {load:.1f}: {taken:.3f} s CPU from exec to "
        f"the first instructions (at most {arguments.limit})"
    )
    return 0 if taken <= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main())

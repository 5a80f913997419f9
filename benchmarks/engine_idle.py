"""What a guest that is idle at its prompt takes of a core on the embedded engine.

The tiny riscv64 image has booted and answered one command; then nothing is asked of it. The CPU
seconds of the whole process are counted, so that it does not matter what else the host does.

    python benchmarks/engine_idle.py [--seconds 60] [--limit 1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil
from boot import compiled
from engine_boot import booted

from vmlab.images.store.store import ImageStore


def used(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> int:
    """Print the figure; exit status 1 where it is above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--limit", type=float, default=1, help="percent of a core")
    arguments = parser.parse_args()
    image = ImageStore().ensure("debian-13-riscv64-tiny")
    with (
        tempfile.TemporaryDirectory(prefix="bytecode-") as bytecode,
        booted(image, compiled(Path(bytecode))) as made,
    ):
        process = psutil.Process(made.process.pid)
        time.sleep(10)  # what the guest still does after its first command
        before, begun = used(process), time.monotonic()
        time.sleep(arguments.seconds)
        share = 100 * (used(process) - before) / (time.monotonic() - begun)
    print(
        f"an idle guest takes {share:.2f}% of a core over {arguments.seconds:g} s "
        f"(at most {arguments.limit:g}%)"
    )
    return 0 if share <= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main())

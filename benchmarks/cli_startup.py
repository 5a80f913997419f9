"""CPU seconds of `vmlab --help` beside a bare `python -c pass`, in interleaved pairs.

Prints the medians of user + system time of the whole process. Fails where `--help` takes more than
the limit: what it may cost is promised to everybody who presses Tab or mistypes a flag.

    python benchmarks/cli_startup.py [--pairs 11] [--limit 0.15]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of `command`, its output thrown away."""
    # Measured with what a user has, not with what a test run has added.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
    }
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(pairs: int) -> tuple[float, float]:
    """Medians of `pairs` runs of the help and of the bare interpreter, in CPU seconds."""
    help_command = [sys.executable, "-m", "vmlab", "--help"]
    bare_command = [sys.executable, "-c", "pass"]
    cpu_seconds(help_command)  # the first run writes the bytecode
    help_times, bare_times = [], []
    for _ in range(pairs):
        help_times.append(cpu_seconds(help_command))
        bare_times.append(cpu_seconds(bare_command))
    return statistics.median(help_times), statistics.median(bare_times)


def main() -> int:
    """Print the table; exit status 1 above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--limit", type=float, default=0.15, help="CPU seconds, at the most")
    arguments = parser.parse_args()
    helped, bare = measure(arguments.pairs)
    print(f"vmlab --help   {helped:.3f} s of CPU (median of {arguments.pairs})")
    print(f"python -c pass {bare:.3f} s of CPU (median of {arguments.pairs}, in turns with it)")
    print(f"limit          {arguments.limit:.3f} s")
    return 0 if helped <= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main())

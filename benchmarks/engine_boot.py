"""The tiny riscv64 image from start to its first command: the embedded engine beside QEMU's TCG.

CPU seconds of the whole process and wall seconds up to the answer, in interleaved pairs; the
median of the ratios counts. Both boot the same kernel and initramfs and answer one `echo` by the
guest's agent. Also: Python calls that a boot needs (exits from native code), and the engine's own
memory, which is what is not the guest's (proportional set size).

    python benchmarks/engine_boot.py [--pairs 7] [--limit 1.5] [--memory 120]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from boot import (
    MARK,
    PORTS,
    Sample,
    children_seconds,
    compiled,
    connected,
    first_command,
    plainly,
)

from vmlab.guests.agent import CHANNELS
from vmlab.images.image import Image
from vmlab.images.store.store import ImageStore

MEMORY = 512 << 20


@dataclass(frozen=True)
class Boot:
    """One boot on the engine: what it took, its exits, and its memory without the guest's."""

    sample: Sample
    exits: int
    own_memory: int


@dataclass(frozen=True)
class Booted:
    """An engine whose guest has answered: its process, its sockets' folder, seconds of the wall."""

    process: subprocess.Popen[bytes]
    directory: Path
    wall: float


@contextlib.contextmanager
def booted(image: Image, environment: dict[str, str]) -> Iterator[Booted]:
    """The engine by hand: boot, one command over the agent's first port."""
    with tempfile.TemporaryDirectory(prefix="boot-") as name:
        directory = Path(name)
        lines = [f'name = "vm"\nmemory = {MEMORY}\nqmp = "qmp"']
        lines += [f'[boot]\nkernel = "{image.kernel}"\ninitrd = "{image.initrd}"']
        lines += [f'cmdline = "console=ttyS0 {image.cmdline}"']
        lines += ['[serial]\nsocket = "serial"\nlog = "console"']
        lines += [f'[[channels]]\nname = "{port}"\nsocket = "{port}"' for port in CHANNELS]
        (directory / "machine.toml").write_text("\n".join(lines))
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "vmlab.engine", directory / "machine.toml"], env=environment
        )
        try:
            with contextlib.ExitStack() as stack:
                *_, agent = [
                    stack.enter_context(connected(directory / port, process)) for port in PORTS
                ]
                answer = first_command(agent)
                wall = time.monotonic() - begun
                if MARK not in answer:
                    raise RuntimeError(f"the guest answered {answer!r}")
                yield Booted(process, directory, wall)
        finally:
            process.kill()
            process.wait()


def embedded(image: Image, environment: dict[str, str]) -> Boot:
    """Boot, one command, then quit."""
    cpu = children_seconds()
    with booted(image, environment) as made:
        own_memory = memory_of(made.process.pid)
        exits = asked_to_quit(made.directory / "qmp")
        made.process.wait(60)
    return Boot(Sample(made.wall, children_seconds() - cpu), exits, own_memory)


def asked_to_quit(path: Path) -> int:
    """The exits from native code so far; the engine quits."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        for command in ("qmp_capabilities", "x-query-harts", "quit"):
            client.sendall(json.dumps({"execute": command, "id": command}).encode())
        for line in client.makefile("rb"):
            message = json.loads(line)
            if message.get("id") == "x-query-harts":
                exits = [each["count"] for hart in message["return"] for each in hart["exits"]]
        return sum(exits)


def memory_of(pid: int) -> int:
    """Bytes of a process's memory (proportional set size) but for the guest's RAM."""
    total, guests = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0] and not value.strip().endswith("kB"):
            guests = "vmlab-ram" in line
        elif name == "Pss" and not guests:
            total += int(value.split()[0]) << 10
    return total


def main() -> int:
    """Print the figures; exit status 1 where a limit is passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=1.5, help="ratio of CPU seconds")
    parser.add_argument("--memory", type=float, default=120, help="megabytes of its own")
    arguments = parser.parse_args()
    image = ImageStore().ensure("debian-13-riscv64-tiny")
    with tempfile.TemporaryDirectory(prefix="bytecode-") as bytecode:
        environment = compiled(Path(bytecode))
        embedded(image, environment), plainly(image)
        pairs = [(embedded(image, environment), plainly(image)) for _ in range(arguments.pairs)]
    ratio = statistics.median(ours.sample.cpu / theirs.cpu for ours, theirs in pairs)
    wall = statistics.median(ours.sample.wall / theirs.wall for ours, theirs in pairs)
    for name, samples in (
        ("engine", [ours.sample for ours, _ in pairs]),
        ("QEMU TCG", [theirs for _, theirs in pairs]),
    ):
        cpu = statistics.median(one.cpu for one in samples)
        seconds = statistics.median(one.wall for one in samples)
        print(f"{name:10} {cpu:6.2f} s CPU {seconds:6.2f} s wall")
    exits = statistics.median(ours.exits for ours, _ in pairs)
    memory = statistics.median(ours.own_memory for ours, _ in pairs)
    print(
        f"medians of {len(pairs)} pairs: {ratio:.2f} x CPU (at most {arguments.limit}), "
        f"{wall:.2f} x wall; {exits:.0f} exits to Python; {memory / 1e6:.0f} MB of its own "
        f"(PSS, at most {arguments.memory:.0f})"
    )
    return 0 if ratio <= arguments.limit and memory <= arguments.memory * 1e6 else 1


if __name__ == "__main__":
    sys.exit(main())

"""Seconds from start to a guest's first command: `vmlab run`, beside a plain QEMU command line.

Both boot the same kernel and initramfs from a warm store on TCG and run `echo` in the guest by
its agent. The plain side is QEMU as a script would start it, with a socket for the one port that
is used and nothing of vmlab's around it. Wall seconds up to the first byte of output, and CPU
seconds of the whole, in interleaved pairs; the medians of the ratios count. vmlab runs from its
bytecode, as pip installs it, also where the environment says that none is written.

    python benchmarks/boot.py [--pairs 7] [--image NAME ...] [--limit 1.3]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vmlab.guests.agent import CHANNELS, shell_line
from vmlab.images.image import Image
from vmlab.images.store.store import ImageStore
from vmlab.machine.architecture import Architecture

MACHINES = {
    Architecture.X86_64: ["qemu-system-x86_64", "-M", "q35", "-cpu", "max"],
    Architecture.RISCV64: ["qemu-system-riscv64", "-M", "virt"],
}
MARK = b"the-first-command"
PORTS = ("vmlab.0.err", "vmlab.0")  # what one command needs: nobody has to read the first


@dataclass(frozen=True)
class Sample:
    """One run: wall seconds to the first output, CPU seconds of all its processes."""

    wall: float
    cpu: float


def children_seconds() -> float:
    """CPU seconds of all children that have ended and were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def compiled(bytecode: Path) -> dict[str, str]:
    """The environment of a Python that keeps its bytecode in that directory."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(bytecode)}


def with_vmlab(image: Image, environment: dict[str, str]) -> Sample:
    """One `vmlab run`."""
    begun, cpu = time.monotonic(), children_seconds()
    command = [sys.executable, "-m", "vmlab", "run", "--image", image.name, "--hypervisor", "qemu"]
    with subprocess.Popen(
        [*command, "--", "echo", MARK.decode()], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        output = process.stdout.readline()
        wall = time.monotonic() - begun
        status = process.wait()
    if status != 0 or output.strip() != MARK:
        raise RuntimeError(f"vmlab run ended with status {status} after {output!r}")
    return Sample(wall, children_seconds() - cpu)


def plainly(image: Image) -> Sample:
    """QEMU by hand: boot, one command over the agent's first port, then kill it."""
    with tempfile.TemporaryDirectory(prefix="boot-") as directory:
        begun, cpu = time.monotonic(), children_seconds()
        command = [
            *MACHINES[image.architecture],
            *("-accel", "tcg", "-m", "512", "-display", "none", "-nodefaults", "-no-user-config"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", f"console={image.architecture.console} {image.cmdline}"),
            *("-serial", f"file:{directory}/console", "-device", "virtio-serial-pci"),
        ]
        for number, name in enumerate(CHANNELS):
            kind = "null"
            if name in PORTS:
                kind = f"socket,path={directory}/{name},server=on,wait=off"
            command += ["-chardev", f"{kind},id=c{number}"]
            command += ["-device", f"virtserialport,chardev=c{number},name={name}"]
        process = subprocess.Popen(command)
        try:
            with contextlib.ExitStack() as stack:
                *_, agent = [
                    stack.enter_context(connected(Path(directory) / name, process))
                    for name in PORTS
                ]
                answer = first_command(agent)
            wall = time.monotonic() - begun
        finally:
            process.kill()
            process.wait()
        if MARK not in answer:
            raise RuntimeError(f"the guest answered {answer!r}")
        return Sample(wall, children_seconds() - cpu)


def connected(port: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    """A connection to one of QEMU's sockets, as soon as it is there."""
    end = socket.socket(socket.AF_UNIX)
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            end.connect(str(port))
            return end
        time.sleep(0.005)
    raise RuntimeError(f"QEMU ended with status {process.returncode}")


def first_command(agent: socket.socket) -> bytes:
    """What the guest answers to one `echo`."""
    agent.settimeout(300)
    agent.sendall(shell_line("run", "t", f"echo {MARK.decode()}"))
    answer = b""
    while MARK not in answer and (data := agent.recv(4096)):
        answer += data
    return answer


def main() -> int:
    """Print the table; exit status 1 where a ratio is above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--image", action="append", help="tiny images; default debian-12-amd64, debian-13-riscv64"
    )
    parser.add_argument("--limit", type=float, default=1.3, help="ratio of wall seconds")
    arguments = parser.parse_args()
    names = arguments.image or ["debian-12-amd64-tiny", "debian-13-riscv64-tiny"]
    with tempfile.TemporaryDirectory(prefix="bytecode-") as bytecode:
        worst = compare(names, arguments.pairs, compiled(Path(bytecode)))
    print(f"medians of {arguments.pairs} interleaved pairs; at most {arguments.limit} x wall")
    return 0 if worst <= arguments.limit else 1


def compare(names: list[str], count: int, environment: dict[str, str]) -> float:
    """Print a line for each image; returns the worst ratio of wall seconds."""
    store, worst = ImageStore(), 0.0
    print(
        f"{'image':24} {'vmlab s':>8} {'plain s':>8} {'ratio':>6} {'CPU s':>7} {'plain':>7} ratio"
    )
    for name in names:
        image = store.ensure(name)
        if shutil.which(MACHINES[image.architecture][0]) is None:
            raise SystemExit(f"{name} needs {MACHINES[image.architecture][0]}")
        with_vmlab(image, environment), plainly(image)
        pairs = [(with_vmlab(image, environment), plainly(image)) for _ in range(count)]
        ours, theirs = zip(*pairs, strict=True)
        ratio = statistics.median(our.wall / their.wall for our, their in pairs)
        work = statistics.median(our.cpu / their.cpu for our, their in pairs)
        worst = max(worst, ratio)
        print(
            f"{name:24} {statistics.median(one.wall for one in ours):8.2f} "
            f"{statistics.median(one.wall for one in theirs):8.2f} {ratio:6.2f} "
            f"{statistics.median(one.cpu for one in ours):7.2f} "
            f"{statistics.median(one.cpu for one in theirs):7.2f} {work:5.2f}"
        )
    return worst


if __name__ == "__main__":
    sys.exit(main())
